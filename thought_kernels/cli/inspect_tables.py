"""The tables that `thought-kernels inspect` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from thought_kernels.spectral.inspect import MatrixRow
from thought_kernels.spectral.inspect_changes import ChangeRow
from thought_kernels.spectral.inspect_summary import KindSummary
from thought_kernels.spectral.neighbours import Feature, SharedFeatures, ShuffledEnd

LEGEND = """\
r, c      the features are the rows, or the columns; after a slash: the same with the entries shuffled
satur.    sum of fractional dimensionalities / rank; above: matrices above their shuffled entries
kinds     per cent of features that are localized / band-localized / broadband
CV        median distance of features from being eigenvectors
spikes    eigenvalues above the Marchenko-Pastur law of the bulk, their part of the whole, and that of shuffled entries;
          - where no such law fits the bulk
shuf.     distance of the spectrum to the shuffled one
alpha     exponent of the density's tail, half its 95 % interval
a-hat     mean of alpha times log10 of the largest eigenvalue; --csv has all figures
"""
CHANGES = """\
change    norm of the difference over that of the matrix; rank: its stable rank
top       its part in the tenth of directions with the largest eigenvalues; 0.1 if it knew nothing of them
KS        distance of the two spectra; |dD| mean change of fractional dimensionality, relatively
shuffled  what a change of the same entries in another order gives
"""
_SHOWN = 5


def matrices(rows: Sequence[MatrixRow]) -> Table:
    """A line for each matrix that was measured."""
    table = _table("matrix", ("shape", "satur.", "kinds", "CV", "spikes", "shuf.", "alpha"))
    for row in rows:
        if row.rank is None or row.localized is None or row.band_localized is None or row.broadband is None:
            continue  # nothing was measured: its note stands below the table, where it takes no column's place
        shares = "/".join(f"{100 * share:.0f}" for share in (row.localized, row.band_localized, row.broadband))
        alpha = "-"
        if row.alpha is not None and row.alpha_high is not None:
            alpha = f"{row.alpha:.2f}±{row.alpha_high - row.alpha:.2f}"
        table.add_row(
            Text(row.name.removesuffix(".weight")), f"{row.rows}x{row.columns} {row.features[0]}",
            _pair(row.saturation, row.saturation_null), shares, _pair(row.residual, row.residual_null),
            f"{_cell(row.spikes, 'd')} {_shares(row.spike_share, row.spike_share_null)}",
            _cell(row.shuffle_distance), alpha,
        )  # fmt: skip
    return table


def kinds(summaries: Sequence[KindSummary]) -> Table:
    """A line for each kind of matrix, and one for the model."""
    table = _table("medians", ("n", "satur.", "above", "CV", "spikes", "shuf.", "alpha", "a-hat"))
    for one in summaries:
        table.add_row(
            Text(one.kind), str(one.matrices), _pair(one.saturation, one.saturation_null), f"{100 * one.above:.0f}%",
            _pair(one.residual, one.residual_null), _shares(one.spike_share, one.spike_share_null),
            _cell(one.shuffle_distance),
            _pair(one.alpha, one.alpha_null), _cell(one.alpha_weighted),
        )  # fmt: skip
    return table


def neighbours(name: str, found: SharedFeatures) -> Group:
    """The features that share most and least, and the clusters, of one matrix."""
    head = (
        f"{name}: {found.features} features in {found.dimensions} dimensions, D {found.mean_dimensionality:.3g} "
        f"on average, {found.null.mean_dimensionality:.3g} with entries shuffled; {100 * found.common:.0f} % of their "
        "squared norm is the mean vector's"
    )
    table = _table("feature", ("D", "norm", "CV", "shares with (part, cosine)"))
    for title, members, null in (
        ("most shared", found.most_shared, found.null.most_shared),
        ("least shared", found.least_shared, found.null.least_shared),
    ):
        table.add_row(Text(title, style="bold"))
        for feature in members[:_SHOWN]:
            table.add_row(*_feature(feature))
        table.add_row(*_shuffled(null))
    lines = [
        Text(f"cluster of {len(one.names)} at {one.cosine:.2f}{f', {one.geometry}' if one.geometry else ''}: "
             + " ".join(repr(token) for token in one.names[:12]))
        for one in found.clusters[:_SHOWN]
    ]  # fmt: skip
    told = f"{found.clustered} features in clusters; shuffled {found.null.clustered}"
    return Group(Text(head), table, *lines, Text(told))


def changes(found: Sequence[ChangeRow]) -> Table:
    """A line for each matrix of two models that was compared."""
    table = _table("matrix", ("shape", "change", "rank", "top", "KS", "|dD|", "satur.", "then"))
    for one in found:
        if one.change is not None:
            table.add_row(
                Text(one.name.removesuffix(".weight")), f"{one.rows}x{one.columns}", f"{one.change:.2e}",
                f"{one.stable_rank:.1f}", f"{one.top_share:.2f}", f"{one.spectral_distance:.3f}",
                f"{one.dimensionality_change:.2e}", f"{one.saturation:.3f}", f"{one.other_saturation:.3f}",
            )  # fmt: skip
        if one.stable_rank_null is not None:
            table.add_row(
                Text("  shuffled", style="dim"), "", "", f"{one.stable_rank_null:.1f}", f"{one.top_share_null:.2f}",
                f"{one.spectral_distance_null:.3f}", f"{one.dimensionality_change_null:.2e}", "",
                f"{one.other_saturation_null:.3f}",
            )  # fmt: skip
    return table


def _feature(feature: Feature) -> tuple[Text, ...]:
    others = " ".join(f"{one.name!r} ({100 * one.share:.1f} %, {one.cosine:+.2f})" for one in feature.neighbours[:3])
    cells = (repr(feature.name), f"{feature.dimensionality:.3g}", f"{feature.norm:.2f}", f"{feature.residual:.2f}")
    return (*map(Text, cells), Text(others))


def _shuffled(null: ShuffledEnd) -> tuple[Text, ...]:
    cells = ("shuffled", f"{null.dimensionality:.3g}", f"{null.norm:.2f}", f"{null.residual:.2f}")
    return tuple(Text(text, style="dim") for text in (*cells, f"({100 * null.share:.1f} %, ±{null.cosine:.2f})"))


def _table(first: str, names: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold", min_width=16)
    for name in names:
        table.add_column(name, justify="left" if "shares" in name else "right", no_wrap="shares" not in name)
    return table


def _cell(value: float | None, digits: str = ".2f") -> str:
    return "-" if value is None else format(value, digits)


def _shares(value: float | None, null: float | None) -> str:
    return f"{_cell(value, '.0%')}/{_cell(null, '.0%')}"


def _pair(value: float | None, null: float | None, digits: str = ".2f") -> str:
    return f"{_cell(value, digits)}/{_cell(null, digits)}"
