"""Running a model over prompts: completions that it writes, and what it thinks of given ones.

completions, continuations   what the prompted model writes where an example has no completion
logprobs                     log-probabilities of given completions; divergences
padding                      rows of different lengths in one batch of a model
"""
