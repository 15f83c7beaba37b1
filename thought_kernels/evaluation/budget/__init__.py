"""What a report will take, from forwards that are measured, and how much of everything fits into given minutes."""
