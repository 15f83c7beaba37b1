"""`thought-kernels inspect --neighbours`: which matrices hold tokens or neurons, and who shares dimensions there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from thought_kernels.cli import inspect_tables, options
from thought_kernels.evaluation.records.files import write_text
from thought_kernels.spectral.neighbours import SharedFeatures, shared_features
from thought_kernels.spectral.stored import StoredMatrix, token_names

_TOKENS = ("embed_tokens", "wte", "lm_head", "token_embd", "output", "embed_out", "embed_in")
_NEURONS = ("down_proj", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "dense_4h_to_h", "fc2")
_NEURONS_BELOW = {"c_proj": ("mlp",), "w2": ("experts", "feed_forward")}  # attentions have such names too


def tell(place: Path, matrices: Sequence[StoredMatrix], path: Path) -> int:
    """Tells of tokens, the rows of embedding and unembedding without their mean, and of an MLP's neurons.

    Args:
        place: the model's folder or file, for the tokens.
        matrices: of the model.
        path: of the JSON file that has all of it.

    Returns:
        How many matrices were told of.

    Raises:
        ValueError: none of them has tokens or neurons.
    """
    tokens = token_names(place)
    found: dict[str, SharedFeatures] = {}
    for matrix in matrices:
        held = held_by(matrix)
        if held is None or not matrix.is_readable:
            continue
        what, side = held
        count = matrix.shape[0 if side == "rows" else 1]
        names = _names(tokens, count) if what == "tokens" and tokens is not None else None
        # Not kept in a variable, which would hold it in memory while the next one is read.
        found[matrix.name] = shared_features(
            matrix.read().T if side == "rows" else matrix.read(), names, centred=what == "tokens"
        )
        options.out.print(inspect_tables.neighbours(matrix.name, found[matrix.name]))
    if not found:
        raise ValueError(f"inspect: --neighbours must find an embedding or a down_proj in {place}, got none")
    write_text(json.dumps({name: one.to_dict() for name, one in found.items()}, indent=1, ensure_ascii=False), path)
    options.out.print(f"all of it in {path}", markup=False, soft_wrap=True)
    return len(found)


def held_by(matrix: StoredMatrix) -> tuple[Literal["tokens", "neurons"], Literal["rows", "columns"]] | None:
    """What vectors a matrix of this name holds, and whether they are its rows or its columns; None for others."""
    *above, last = matrix.kind.split(".")
    if last in _TOKENS:
        return "tokens", "rows"
    if last in _NEURONS:
        return "neurons", "columns"
    if not above or above[-1] not in _NEURONS_BELOW.get(last, ()):
        return None
    # GPT-2 stores [in, out], its namesakes [out, in]; an MLP has more neurons than outputs.
    return "neurons", "rows" if last == "c_proj" and matrix.shape[0] > matrix.shape[1] else "columns"


def _names(tokens: Sequence[str], count: int) -> list[str]:
    """The tokens; rows that pad the vocabulary, or that it has no token for, by number."""
    known = [*tokens[:count], *[""] * (count - len(tokens))]
    return [name or f"[{index}]" for index, name in enumerate(known)]
