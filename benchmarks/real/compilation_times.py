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
UNUSED = ("token_prompted_cached_ms", "token_bare_cached_ms")


@torch.no_grad()
def request_times(model: Any, requests: Sequence[EncodedExample], rounds: int = ROUNDS) -> Row:
    """Medians over rounds of one request at a time; the kinds take turns, so that a busy machine slows them alike.

    Each side is read whole, and behind the kept keys and values of what all its requests begin with: with the prompt
    this is the prompt, without it the template's header, and what the template tells a model that is told nothing. A
    patch in the weights changes no shape, so that a patched model takes what the bare one does. Copying the cache is
    not timed: a server has requests share it.

    Args:
        model: a transformers causal language model.
        requests: with the instruction and without; a round takes the next one.
        rounds: how many.

    Returns:
        Milliseconds until the first token with the prompt and without it, each read anew and behind a cache;
        milliseconds of a later token behind the prompt and without it; tokens of a request, means.
    """
    sides = {
        "prompted": [[*row.with_prefix, *row.tokens] for row in requests],
        "bare": [[*row.without_prefix, *row.tokens] for row in requests],
    }
    shared = {side: shared_length(rows) for side, rows in sides.items()}
    times: dict[str, list[float]] = {}
    with undisturbed(model):
        caches = {side: run_prefix(model, rows[0][: shared[side]]) for side, rows in sides.items()}
        for index in range(-1, rounds):  # the first one warms up
            kinds = {}
            for side, rows in sides.items():
                ids = rows[index % len(rows)]
                cached = behind(caches[side], 1, len(ids) - shared[side], room=STEPS)
                kinds |= {side: (ids, {}), f"{side}_cached": (ids[shared[side] :], cached)}
            for name in _turn(list(kinds), index):
                first, later = _request(model, *kinds[name])
                if index >= 0:
                    times.setdefault(f"prefill_{name}_ms", []).append(first)
                    times.setdefault(f"token_{name}_ms", []).append(later)
    # A later token takes the same behind a cache as behind what was read anew.
    found = {name: round(statistics.median(ms), 3) for name, ms in times.items() if name not in UNUSED}
    return {**found, **{f"tokens_{side}": round(statistics.fmean(map(len, rows)), 1) for side, rows in sides.items()}}


def _turn(names: list[str], index: int) -> list[str]:
    """The names in another order each time, so that nobody always follows the same neighbour."""
    turn = index % len(names)
    return [*names[turn:], *names[:turn]]


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
