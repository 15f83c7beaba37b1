"""From an instruction and a few examples to a ThoughtPatch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from thought_kernels.fitting.checkpoint import Checkpoint
from thought_kernels.fitting.encoding import Prompt, Writing
from thought_kernels.fitting.fit import fit
from thought_kernels.fitting.prepared import prepared
from thought_kernels.fitting.recipe import Recipe
from thought_kernels.generation.processes import Processes
from thought_kernels.models.sharded import group_of
from thought_kernels.ops.checks import as_integer
from thought_kernels.pairing.pairings import MEMORY_BUDGET
from thought_kernels.patches.patch import ThoughtPatch
from thought_kernels.prompts.bad_examples import BadExamples
from thought_kernels.prompts.instruction import Instruction


@torch.no_grad()
def transmute(
    model: Any,
    tokenizer: Any,
    instruction: Instruction,
    examples: Any = None,
    *,
    without: Instruction | None = None,
    layers: Iterable[int] | None = None,
    sites: Iterable[str] | None = None,
    pairing: str = Recipe.pairing,
    estimator: str = Recipe.estimator,
    normalization: str = Recipe.normalization,
    mlp_activation: str = Recipe.mlp_activation,
    scale: float | Mapping[str, float] = Recipe.scale,
    ridge: float = Recipe.ridge,
    tokens: str = Recipe.tokens,
    header_weight: float = Recipe.header_weight,
    text_weight: float = Recipe.text_weight,
    separator: str = "\n",
    format: str | None = None,
    batch_size: int = 32,
    memory_budget: int = MEMORY_BUDGET,
    written_inputs: int = Recipe.written_inputs,
    completions: int = Recipe.completions,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: bool = False,
    bad_examples: str = "stop",
    checkpoint: str | os.PathLike[str] | None = None,
    distributed: Any = False,
) -> ThoughtPatch:
    """Turns an instruction into a weight update: the patched model follows it without being told. No training.

    Over the tokens i of e in every prompt [P, e], with δ_i = a'_i − a_i the activation with P minus that with P°, which
    is P without the instruction: in the plain case P = [H, I] and P° = H::

        C = Σ w_i δ_i a_iᵀ/ν_i      Z = Σ w_i a_i a_iᵀ/ν_i      ridge: Δ = C (Z + ε tr(Z)/d 1)⁻¹

    per block and site, and the patched module multiplies x + Δ x in place of x. At the "down" site, a is what down_proj
    multiplies, δ what the block's output still lacks, and Δ is added to down_proj's weight.

    The options that decide what a patch is are the fields of a Recipe: `transmute(..., **recipe)`.

    Args:
        model: a transformers causal language model; it is only read.
        tokenizer: its fast tokenizer.
        instruction: a text, or chat turns (a system message, few-shot demonstrations) that come before the example's.
        examples: user texts, {"prompt", "completion"} dicts, message lists, a path (txt, csv, json, jsonl), or a
            dataset of these. Where there is no completion the prompted model writes some. None for everyday requests
            (prompts/everyday.py); where the instruction is demonstrations, for what the model writes like their inputs.
        without: what the prompt on the other side says in the instruction's place, such as another wording or the
            opposite; None for the same chat without it, with what the template may write then.
        layers: 0-based block indices, None for all. Only blocks up to the last of them are run.
        sites: of "attention", "mlp", "down", "residual"; None for "attention" and "down", the two output projections
            of a block, or for "attention" alone where there is a mixture of experts, which has neither "mlp" nor
            "down". Within a block they are fitted in this order, each after the earlier ones are applied ("residual"
            beside "mlp", "down" after both): each mends what the others left.
        pairing: "two_pass", "layerwise" or "sequential", see pairing/pairings.py.
        estimator: "mean", "exact", "ridge", "second_order" or "affine", see estimators.solve.
        normalization: ν, "none", "norm" (‖a‖) or "squared_norm" (‖a‖²).
        mlp_activation: what a is at the mlp site, "input" (u, which the patched module multiplies) or "residual" (h,
            which u is the norm of: the paper's A(x)), see paper_recipe. The patch acts on u in both.
        scale: λ, one number or one per site. "exact", "ridge" and "affine" are made for 1. "mean" and "second_order"
            need it tuned: the latter grows without bound once λ passes 2 over Z's largest eigenvalue, and a warning
            says where a patch is worse than none, and with which scale it would not be on the same rows.
        ridge: ε, in units of Z's mean eigenvalue.
        tokens: which tokens of e are summed, "all" or "answer" (the completion with its end-of-turn token).
        header_weight: H's rows join the fit with δ = 0 and this total weight, that of all examples being 1; it keeps
            the patch from moving the keys that e sees in H. 0 leaves them out.
        text_weight: passages of ordinary text join the fit, with no instruction before them and this total weight, that
            of all examples being 1: what the model makes of them without a patch is wanted of them with it. A patch of
            0.1 to 1 moves other text less, and an instruction's effect is a little smaller. 0 leaves them out.
        separator: between instruction and example text; part of I.
        format: of one turn, "{prompt} -> {completion}\\n" or the like, in place of a chat template.
        batch_size: examples in a batch at most. It changes the result by rounding only.
        memory_budget: bytes of hidden states, 2 GiB unless given. "sequential" keeps of all examples two streams of the
            hidden size between blocks, and within a block what it needs again (pairing/sequential.py: with the default
            sites twice the attention's width, or twice the hidden size with the MLP's width, for every token): first
            on the model's device and, where that is not the CPU, as many bytes again in CPU memory; what is left over
            lies in a temporary file. The others need none of it.
        written_inputs: how many inputs the bare model writes beside the examples, like them: it is shown a list of
            their last user texts and goes on with it. A patch sees more of what an instruction does in many inputs.
            Each has half an example's weight and one completion, drawn from the prompted model's own distribution. None
            are written where an example brings its completion. They are in the patch's provenance.
        completions: that the prompted model writes for an example without one: the likeliest, and draws. They share the
            example's weight.
        max_new_tokens: longest completion that is generated.
        seed: of what is drawn, inputs and completions.
        progress: show progress bars on stderr, of the writing and of the fit.
        bad_examples: "stop" at an example that cannot be read, does not align or does not fit the context, or "skip"
            it: a warning counts them and says what is wrong with the first, the patch's provenance has the places.
        checkpoint: a folder of its own in which a long run keeps what the model has written and, for "sequential", the
            state between blocks, twice a minute at most. The same call goes on from there when it was stopped, to the
            same patch bit for bit, given as many threads; another call's content is not read, and replaced. Delete it
            when the patch is saved. None for none.
        distributed: True under torchrun, or a process group of torch.distributed: its processes, each with the model
            and all the inputs, make the same call and share the writing and the examples. Sums are added, in
            "sequential" by one all-reduce for each block and site. Each returns the patch that one process would make
            of the same rows, to rounding. False for this process alone, and for a model that tensor parallelism has
            divided (`tp_plan="auto"`), whose processes all make the same call and work on every example together.

    Returns:
        A ThoughtPatch, float32 (float64 for a float64 model), with the settings in its provenance.

    Raises:
        ValueError: an unknown or unfit option, a prompt that does not align, an example longer than the model's
            context or with a token that it has no embedding for, examples that all begin with the instruction, or NaN
            or an infinity in the model's activations: the message names block and example.
        TypeError: a model without an adapter, or arguments of another type.
        RuntimeError: a process is lost; the others say so as soon as the connection does, or when the group's time
            limit is over.

    Warns:
        UserWarning: completions that were cut, some examples that begin with the instruction, a model that a patch
            acts on, or a patch that leaves more of the difference than there was (ScaleWarning).

    Source: "Transmuting prompts into weights", Algorithm 1, eq. 5-8 and A.2; the attention site, the sequential pairing
        and the header's rows are ours.
    """
    recipe = Recipe(
        layers=layers, sites=sites, pairing=pairing, estimator=estimator, normalization=normalization,
        mlp_activation=mlp_activation, scale=scale, ridge=ridge, tokens=tokens,
        header_weight=header_weight, text_weight=text_weight, written_inputs=written_inputs,
        completions=completions,
    )  # fmt: skip
    batch_size = as_integer("transmute", "batch_size", batch_size, least=1)
    memory_budget = as_integer("transmute", "memory_budget", memory_budget, least=1)
    max_new_tokens = as_integer("transmute", "max_new_tokens", max_new_tokens, least=1)
    seed = as_integer("transmute", "seed", seed)
    prompt = Prompt(instruction, without, separator, format)
    processes, divided = Processes(distributed), Processes(group_of(model) or False)
    if distributed is not False and divided.size > 1:
        raise ValueError(
            f"transmute: distributed must be False where tensor parallelism has divided the model among "
            f"{divided.size} processes, which work on every example together, got {distributed!r}"
        )
    writing = Writing(recipe.completions, max_new_tokens, batch_size, seed, progress, processes)
    kept = None if checkpoint is None else Checkpoint(checkpoint, divided if divided.size > 1 else processes)
    bad = BadExamples(bad_examples)
    with divided.together():
        found = prepared(model, tokenizer, prompt, examples, recipe, writing, kept, bad)
        return fit(
            found.decoder, found.recipe, [*found.rows, *found.text], batch_size=batch_size,
            memory_budget=memory_budget, provenance=found.provenance, progress=progress, checkpoint=kept,
            processes=processes,
        )  # fmt: skip
