"""Other uses of the same examples, each by `fit(model, rows, choice)`: vectors, an edit, LoRA, the paper's recipe."""
