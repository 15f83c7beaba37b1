"""The task vector of in-context learning: a hidden state that takes the place of the query's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, choose
from thought_kernels.evaluation.rivals.places import answer_places
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.evaluation.rivals.states import answer_means
from thought_kernels.models import describe


class Replaced:
    """A block's output at the prompt's last token replaced by a vector.

    Args:
        layer: 0-based block index.
        vector: [d].
        suffix: token ids that every prompt ends with, at least one.
    """

    def __init__(self, layer: int, vector: Tensor, suffix: Sequence[int]) -> None:
        self._layer, self._vector, self._suffix = layer, vector, tuple(suffix)

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model with the state replaced, as a context manager."""
        with answer_places(model, self._suffix) as places:

            def replace(module: Any, args: Any, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                mask = places().end.to(stream.device)[..., None]
                stream = torch.where(mask, self._vector.to(stream.device, stream.dtype), stream)
                return (stream, *output[1:]) if isinstance(output, tuple) else stream

            handle = describe(model).blocks[self._layer].layer.register_forward_hook(replace)
            try:
                yield
            finally:
                handle.remove()


def fit(model: Any, rows: Rows, choice: Rows) -> Fitted:
    """The state at the prompt's last token behind the instruction, mean over inputs, at the best block.

    Args:
        model: unpatched; it is as it was afterwards.
        rows: to read the states of.
        choice: rows that are read, to choose the block by.

    Raises:
        ValueError: prompts that do not end alike.

    Source: Hendel et al., "In-context learning creates task vectors", §3.1-3.2, and the authors' code
        (roeehendel/icl_task_vectors, core/task_vectors.py): every block is tried, and the state is replaced in the
        first forward alone. They average over two dummy queries, here over all inputs to fit, and choose the block by
        accuracy, here by KL.
    """
    suffix = choice.suffix
    if not suffix:
        raise ValueError("task_vector: prompts must end alike, got different last tokens; use a chat template")
    modules = {block.index: block.layer for block in describe(model).blocks}
    found = answer_means(model, rows.prompts, rows.written, modules, inside=False, tokens=1)
    candidates = [(f"block {layer}", Replaced(layer, vector, suffix)) for layer, vector in found.items()]
    return choose(model, choice, candidates)
