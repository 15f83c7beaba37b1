"""From an instruction to patched weights; call the package itself: `thought_kernels.transmute(model, ...)`.

    prompt        instruction and example to token ids: H | I | e
    pairing       activations with and without the instruction, block by block
    accumulator   the streaming sums over tokens; rows checks what it is given
    estimators    sums to a thought matrix and vector
    patch         ThoughtPatch, its arithmetic and what it prints; site is one block's and site's part of it
    apply, merge  a patch in a model: by hooks, or in the weights
    storage       a patch as a folder
    recipe        the paper's Algorithm 1 as a set of options
    replay        the exactness theorem on real weights
    fitting       one recipe on one set of examples
    logprobs      what a model thinks of given completions; divergences
    padding       rows of different lengths in one batch of a model
    transmute     the function that joins them

All of it is about block indices counted from 0 and the sites "attention", "mlp", "down" and "residual".
"""

from thought_kernels.callable_package import make_callable

make_callable(__name__, "thought_kernels.transmute.transmute", "transmute")
