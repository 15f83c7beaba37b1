"""What the rows of a whole model come to: a line for each kind of matrix, and one for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from thought_kernels.spectral.inspect import MatrixRow
from thought_kernels.spectral.stored import kind_of

MODEL = "all"


@dataclass(frozen=True)
class KindSummary:
    """Medians over the matrices of one kind, or of a model.

    Attributes:
        kind: the name without numbers; "all" for the model.
        matrices: how many were measured.
        saturation, saturation_null, half_width, half_width_null, residual, residual_null, spike_share,
            spike_share_null, bulk_distance, bulk_distance_null, shuffle_distance, alpha, alpha_null: as MatrixRow has
            them, of the matrices that have one; None where none has.
        above: share of the matrices whose saturation is above that of their shuffled entries.
        without_bulk: how many have no bulk that spikes could stand out from.
        alpha_weighted, log_norm, log_alpha_norm: means, as WeightWatcher's summary has them.
    """

    kind: str
    matrices: int
    saturation: float
    saturation_null: float
    above: float
    half_width: float
    half_width_null: float
    residual: float
    residual_null: float
    spike_share: float | None
    spike_share_null: float | None
    bulk_distance: float
    bulk_distance_null: float
    without_bulk: int
    shuffle_distance: float
    alpha: float | None
    alpha_null: float | None
    alpha_weighted: float | None
    log_norm: float
    log_alpha_norm: float | None


_MEDIANS = ("saturation", "saturation_null", "half_width", "half_width_null", "residual", "residual_null",
            "spike_share", "spike_share_null", "bulk_distance", "bulk_distance_null", "shuffle_distance", "alpha",
            "alpha_null")  # fmt: skip
_MEANS = ("alpha_weighted", "log_norm", "log_alpha_norm")


def summarise(rows: Sequence[MatrixRow]) -> list[KindSummary]:
    """A summary of each kind of matrix in the order of its first one, and of all together.

    Args:
        rows: of one model; those without figures are left out.

    Returns:
        A KindSummary for each kind, and for "all" last; none where nothing was measured.
    """
    kinds: dict[str, list[MatrixRow]] = {}
    for row in rows:
        if row.rank is not None:
            kinds.setdefault(kind_of(row.name), []).append(row)
    everything = [row for members in kinds.values() for row in members]
    found = [_summary(kind, members) for kind, members in kinds.items()]
    return [*found, _summary(MODEL, everything)] if everything else []


def _summary(kind: str, rows: list[MatrixRow]) -> KindSummary:
    figures: dict[str, float | None] = {}
    for names, middle in ((_MEDIANS, median), (_MEANS, fmean)):
        for name in names:
            values = [value for row in rows if (value := getattr(row, name)) is not None]
            figures[name] = float(middle(values)) if values else None
    above = fmean((row.saturation or 0) > (row.saturation_null or 0) for row in rows)
    bare = sum(row.spikes is None for row in rows)
    return KindSummary(kind=kind, matrices=len(rows), above=above, without_bulk=bare, **figures)  # type: ignore[arg-type]
