"""What a patch is worth: the report behind `thought_kernels.evaluate`, and the experiments of the papers.

evaluate, arguments, resume   the report: its function, its input, its progress on disk
measures      trials, scorers, divergences, intervals
rivals        other uses of the same examples: steering vectors, LoRA, refits
sections      a subject goes in, figures come out
pages         figures go in, a page comes out
experiments   the papers' experiments
"""
