"""The report as data: figures in sections, their headings, and the verdict that follows from them."""
