"""What a patch is worth: the report behind `thought_kernels.evaluate`, and the experiments of the papers.

evaluate, arguments, settings, resume, report
              the report: its function, its input, what it depends on, its progress on disk, what is returned
measures      trials, scorers, divergences, intervals, overlap of patches
rivals        other uses of the same examples: steering vectors, an edit, LoRA, refits, the paper's recipe
figures       the report as data, and the verdict
sections      a subject goes in, figures come out
budget        what a report will take, and what fits into given minutes
pages         figures go in, a page comes out
experiments   the papers' experiments: results come out
pictures      experiments' results go in, pictures come out
records       results on disk

Arrows: measures <- rivals <- sections <- budget, measures <- figures <- sections and pages, rivals <- experiments <-
pictures.
"""
