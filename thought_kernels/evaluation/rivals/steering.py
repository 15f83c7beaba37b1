"""Vectors added to a model's activations as it writes, and the choice of block, place and multiplier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from thought_kernels.evaluation.rivals.choice import Fitted, choose
from thought_kernels.evaluation.rivals.places import answer_places
from thought_kernels.evaluation.rivals.rows import Rows
from thought_kernels.models import describe

SCALES = (0.5, 1.0, 2.0, 4.0)
PLACES = ANSWER, EVERYWHERE = ("from the last prompt token on", "everywhere")


class Steering:
    """Adds vectors to the outputs of blocks, or to what their heads give to o_proj.

    Args:
        vectors: by 0-based block index, [d], or [Hq·D] for heads.
        suffix: token ids that every prompt ends with, see places.prompt_end; they are added from their last token on.
            Empty adds everywhere.
        heads: whether to add to the heads' outputs, concatenated.
    """

    def __init__(self, vectors: Mapping[int, Tensor], suffix: Sequence[int] = (), *, heads: bool = False) -> None:
        self._vectors, self._suffix, self._heads = dict(vectors), tuple(suffix), heads

    def __mul__(self, factor: float) -> Steering:
        scaled = {layer: factor * vector for layer, vector in self._vectors.items()}
        return Steering(scaled, self._suffix, heads=self._heads)

    __rmul__ = __mul__

    @contextlib.contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """The model with the vectors added, as a context manager."""
        blocks = describe(model).blocks
        with answer_places(model, self._suffix) as places, contextlib.ExitStack() as handles:
            for layer, vector in self._vectors.items():

                def added(stream: Tensor, vector: Tensor = vector) -> Tensor:
                    mask = places().answer.to(stream.device)[..., None]
                    return stream + mask * vector.to(stream.device, stream.dtype)

                if self._heads:
                    handle = blocks[layer].o_proj.register_forward_pre_hook(
                        lambda module, args, added=added: (added(args[0]), *args[1:])
                    )
                else:
                    handle = blocks[layer].layer.register_forward_hook(
                        lambda module, args, output, added=added: (
                            (added(output[0]), *output[1:]) if isinstance(output, tuple) else added(output)
                        )
                    )
                handles.callback(handle.remove)
            yield


def steered(model: Any, choice: Rows, vectors: Mapping[int, Tensor], places: Sequence[str] = PLACES) -> Fitted:
    """The best block, place and multiplier; the best multiplier depends on the block, so none is fixed first.

    Args:
        model: unpatched.
        choice: rows that are read.
        vectors: by block index, [d].
        places: of ANSWER and EVERYWHERE, which to try.
    """
    suffix = choice.suffix
    return choose(
        model, choice,
        (
            (f"block {layer}, added {place}, scale {scale:g}",
             Steering({layer: scale * vector}, suffix if place == ANSWER else ()))
            for layer, vector in vectors.items()
            for place in places
            for scale in SCALES
        ),
    )  # fmt: skip
