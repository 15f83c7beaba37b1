"""Other uses of the same examples: steering vectors, LoRA, refits of a patch, the paper's recipe."""
