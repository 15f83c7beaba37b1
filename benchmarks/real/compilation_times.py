"""What a system prompt costs a request: reading it, uncached and cached, and attending to it at each token written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from results import Row

from thought_kernels.generation.prefix import behind, cache_of, run_prefix, shared_length
from thought_kernels.models.undisturbed import undisturbed
from thought_kernels.prompts.prompt import EncodedExample

ROUNDS, STEPS = 9, 8


@torch.no_grad()
def request_times(model: Any, requests: Sequence[EncodedExample], rounds: int = ROUNDS) -> Row:
    """Medians over rounds of one request at a time; the kinds take turns, so that a busy machine slows them alike.

    A request without the prompt is read whole. A patch in the weights changes no shape, so that a patched model takes
    what the bare one does.

    Args:
        model: a transformers causal language model.
        requests: with the instruction and without; a round takes the next one.
        rounds: how many.

    Returns:
        Milliseconds until the first token with the prompt read anew, with its keys and values kept, and without it;
        milliseconds of a later token behind the prompt and without it; tokens of a request, means.
    """
    prompts = [[*row.with_prefix, *row.tokens] for row in requests]
    bare_prompts = [[*row.without_prefix, *row.tokens] for row in requests]
    shared = shared_length(prompts)
    times: dict[str, list[float]] = {}

    def told(name: str, milliseconds: float) -> None:
        times.setdefault(name, []).append(milliseconds)

    with undisturbed(model):
        kept = run_prefix(model, prompts[0][:shared])
        for index in range(-1, rounds):  # the first one warms up
            prompt, bare = (rows[index % len(rows)] for rows in (prompts, bare_prompts))
            kinds = {"prompted": (prompt, {}), "cached": (prompt[shared:], behind(kept, 1)), "bare": (bare, {})}
            turn = index % len(kinds)  # nobody always follows the same neighbour
            for name in (list(kinds) * 2)[turn : turn + len(kinds)]:
                first, later = _request(model, *kinds[name])
                if index >= 0:
                    told(f"prefill_{name}_ms", first)
                    told(f"token_{name}_ms", later)
    del times["token_cached_ms"]  # as behind the prompt read anew
    found = {name: round(statistics.median(values), 3) for name, values in times.items()}
    lengths = {"tokens_prompted": prompts, "tokens_bare": bare_prompts}
    return {**found, **{name: round(statistics.fmean(map(len, rows)), 1) for name, rows in lengths.items()}}


def _request(model: Any, ids: list[int], cache: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds of reading these ids behind a cache, and the median of those of each token after them."""
    device = model.get_input_embeddings().weight.device
    row = torch.tensor([ids], device=device)
    first, output = _timed(device, lambda: model(input_ids=row, use_cache=True, logits_to_keep=1, **cache))
    later = []
    for _ in range(STEPS):
        token, held = output.logits[:, -1].argmax(-1, keepdim=True), cache_of(output)
        took, output = _timed(device, lambda token=token, held=held: model(input_ids=token, use_cache=True, **held))
        later.append(took)
    return first, statistics.median(later)


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    on_device = device.type == "cuda"
    if on_device:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    output = call()
    if on_device:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * 1e3, output
