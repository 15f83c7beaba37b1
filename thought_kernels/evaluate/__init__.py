"""What a patch is worth; call the package itself: `thought_kernels.evaluate(model, tokenizer, patch, ...)`.

metrics, answers, scorers, intervals    divergences, right answers, who grades, bootstrap
trial                                   one instruction on fresh inputs
evaluate, arguments, sections, resume   the report: its function, its input, its parts, its progress on disk
effect, controls, baselines, side_effects, sweeps, generalisation     the parts
refit, steering, lora                   other uses of the same examples
report, verdict, page, plots            the object, its five lines, its page
"""

from thought_kernels.callable_package import make_callable

make_callable(__name__, "thought_kernels.evaluate.evaluate", "evaluate")
