"""Who shares dimensions with whom: the features of a weight matrix by name, tokens or neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thought_kernels.ops.checks import as_integer
from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import (
    accumulator_dtype,
    check_matrix,
    column_blocks,
    fractional_dimensionality,
    in_range,
)
from thought_kernels.spectral.geometry import identify_geometry
from thought_kernels.spectral.measure import eigenvector_residual
from thought_kernels.spectral.nulls import null_saturation, shuffled

GROUPED = 4096  # features that share the most, among which clusters are sought
_TOLERANCE = 0.05  # of inner products of unit vectors, for a cluster's name


@dataclass(frozen=True)
class Neighbour:
    """One feature beside another.

    Attributes:
        name: of the neighbour.
        share: (w_i · w_j)² / Σ_k (w_i · w_k)²: its part of all that the feature interferes with, itself included.
        cosine: of the two.
    """

    name: str
    share: float
    cosine: float


@dataclass(frozen=True)
class Feature:
    """A feature and those that take most of its dimension.

    Attributes:
        name, index: which.
        dimensionality: D.
        norm: ‖w‖ over the root mean square of all.
        residual: CV: how far from one eigenspace.
        neighbours: largest share first.
    """

    name: str
    index: int
    dimensionality: float
    norm: float
    residual: float
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Cluster:
    """Features linked by cosines that chance does not make.

    Attributes:
        names: of its features.
        cosine: mean over its pairs.
        geometry: the figure they form to within 0.05 of inner products, or None.
    """

    names: tuple[str, ...]
    cosine: float
    geometry: str | None


@dataclass(frozen=True)
class ShuffledEnd:
    """Means over the features that share most, or least, where the entries are shuffled.

    Attributes:
        dimensionality, norm, residual: as Feature has them.
        share, cosine: of the first neighbour; the cosine without its sign.
    """

    dimensionality: float
    norm: float
    residual: float
    share: float
    cosine: float


@dataclass(frozen=True)
class ShuffledShares:
    """What SharedFeatures has of the matrix with its entries in another order.

    Attributes:
        mean_dimensionality: mean D.
        most_shared, least_shared: over as many features as are told.
        clustered: features in clusters.
        largest_cluster: features in the largest; 0 where there is none.
    """

    mean_dimensionality: float
    most_shared: ShuffledEnd
    least_shared: ShuffledEnd
    clustered: int
    largest_cluster: int


@dataclass(frozen=True)
class SharedFeatures:
    """What the features of one matrix share.

    Attributes:
        features, dimensions: n and m.
        zero_features: features that are zero; all other figures are of the rest.
        common: n ‖w̄‖² / Σ ‖w_i‖², the part of all squared norm that is the mean vector's.
        mean_dimensionality: mean D.
        null_dimensionality: max(m, n) / (m + n) · min(m, n) / n.
        linked: the cosine that links two features of a cluster: halfway to 1 from the largest that n independent
            directions would have, √(2 ln(n²/2) / m).
        most_shared, least_shared: features of smallest, of largest D.
        clusters: of the features that share the most, largest first.
        clustered: features in all such clusters.
        null: what shuffled entries give, after the mean was taken away where it was.
    """

    features: int
    dimensions: int
    zero_features: int
    common: float
    mean_dimensionality: float
    null_dimensionality: float
    linked: float
    most_shared: tuple[Feature, ...]
    least_shared: tuple[Feature, ...]
    clusters: tuple[Cluster, ...]
    clustered: int
    null: ShuffledShares

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)


def shared_features(
    W: Tensor,
    names: Sequence[str] | None = None,
    *,
    centred: bool = False,
    count: int = 10,
    neighbours: int = 5,
    clusters: int = 10,
) -> SharedFeatures:
    """The features that share most and least of their dimension, with whom, and the clusters they form.

    1/D_i = Σ_j (w_i · w_j)² / ‖w_i‖⁴: each j's part of the sum is what it takes of feature i

    Zero features, with which vocabularies are padded, are left out before anything else. Beside W itself one copy of it
    is in memory.

    Args:
        W: ``[m, n]``, features in columns: token vectors of an embedding or unembedding, columns of a down_proj.
        names: of the features; their numbers if not given.
        centred: take the mean vector away first. Of an unembedding it adds the same to all logits, which softmax does
            not see, and there it is often most of what tokens share.
        count: features at each end, at least 1.
        neighbours: of each, 0 or more.
        clusters: at most, 0 or more.

    Returns:
        SharedFeatures. Clusters are the connected components of absolute cosines above ``linked`` among the 4,096
        features that share the most.

    Raises:
        TypeError, ValueError: as frame_operator does; W is all zero, or all mean where that is taken away; names are
            fewer than features; another number is no such integer.

    Source: Spectral superposition, eq. 3.1 and §A.4.
    """
    largest = check_matrix("shared_features", W)
    count = as_integer("shared_features", "count", count, least=1)
    neighbours = as_integer("shared_features", "neighbours", neighbours, least=0)
    clusters = as_integer("shared_features", "clusters", clusters, least=0)
    m, n = W.shape
    if names is not None and len(names) < n:
        raise ValueError(message("shared_features", "names", f"be {n}, one for each feature", len(names)))
    present, common, kept = _present(in_range(W.detach(), largest, torch.float64)[0], centred)
    numbers = present.tolist()
    named = [str(number) if names is None else names[number] for number in numbers]
    left = len(numbers)
    link = (1 + min(1.0, math.sqrt(2 * math.log(max(left * left / 2, 1)) / m))) / 2
    found = _measured(kept)

    def told(chosen: Tensor) -> tuple[Feature, ...]:
        indices, cosines, shares = _interference(kept, chosen, found.norms, neighbours)
        features = []
        for row, i in enumerate(chosen.tolist()):
            beside = zip(indices[row].tolist(), shares[row].tolist(), cosines[row].tolist(), strict=True)
            others = tuple(Neighbour(named[j], share, cosine) for j, share, cosine in beside)
            D, size, residual = (float(values[i]) for values in (found.dimensionality, found.size, found.residual))
            features.append(Feature(named[i], numbers[i], D, size, residual, others))
        return tuple(features)

    ends = told(found.order[:count]), told(found.order.flip(0)[:count])
    unit, labels = _components(kept, found, link)
    groups = _clusters(unit, labels, found.order[:GROUPED], named, clusters)
    null = _null(kept if centred or left < n else kept.clone(), link, count)  # its own copy, or the caller's W
    return SharedFeatures(
        n, m, n - left, common, float(found.dimensionality.mean()), null_saturation(m, left) * min(m, left) / left,
        link, *ends, groups, _clustered(labels)[0], null,
    )  # fmt: skip


class _Measured(NamedTuple):
    """D, CV and norm of each feature, the norm over the root mean square, and nonzero features by rising D."""

    dimensionality: Tensor
    residual: Tensor
    norms: Tensor
    size: Tensor
    order: Tensor


def _measured(W: Tensor) -> _Measured:
    D, norms = fractional_dimensionality(W, dtype=torch.float64), _norms(W)
    some = (norms > 0).nonzero()[:, 0]  # a feature that was the mean has nothing left
    return _Measured(D, eigenvector_residual(W), norms, norms / norms.square().mean().sqrt(), some[D[some].argsort()])


def _norms(W: Tensor) -> Tensor:
    return torch.cat([torch.linalg.vector_norm(W[:, part].double(), dim=0) for part in column_blocks(W)])


def _present(W: Tensor, centred: bool) -> tuple[Tensor, float, Tensor]:
    """Which features are not zero, the mean's part of their squared norm, and they, without the mean if centred."""
    norms = _norms(W)
    present = (norms > 0).nonzero()[:, 0]
    if not len(present):
        raise ValueError(message("shared_features", "W", "have a nonzero feature", "zeros"))
    mean = sum((W[:, part].double().sum(1) for part in column_blocks(W)), norms.new_zeros(W.shape[0])) / len(present)
    common = len(present) * float(mean.square().sum() / norms.square().sum())
    if not centred:
        return present, common, W if len(present) == len(norms) else W.T.index_select(0, present).T
    dtype = accumulator_dtype("shared_features", W, None)
    kept = W.T.index_select(0, present).T.to(dtype).sub_(mean.to(dtype)[:, None])
    if float(_norms(kept).max()) <= torch.finfo(W.dtype).eps * float(mean.norm()):
        actual = "features that are all the same"
        raise ValueError(message("shared_features", "W", "differ from its mean where centred", actual))
    return present, common, kept


def shuffle_(W: Tensor) -> Tensor:
    """W with its entries in another order, in place: those of some columns from all over it at a time."""
    parts = len(list(column_blocks(W)))
    for part in range(parts):
        W[:, part::parts] = shuffled(W[:, part::parts], part)
    return W


def _null(W: Tensor, link: float, count: int) -> ShuffledShares:
    """The figures of W with its entries shuffled in place, of the features that are then not zero."""
    present = (_norms(shuffle_(W)) > 0).nonzero()[:, 0]
    W = W if len(present) == W.shape[1] else W[:, present]
    found = _measured(W)

    def end(chosen: Tensor) -> ShuffledEnd:
        means = [float(values[chosen].mean()) for values in (found.dimensionality, found.size, found.residual)]
        _, cosines, shares = _interference(W, chosen, found.norms, 1)
        first = [float(values.abs().sum()) / len(chosen) for values in (shares, cosines)]  # none has one, where n is 1
        return ShuffledEnd(*means, *first)

    ends = end(found.order[:count]), end(found.order.flip(0)[:count])
    labels = _components(W, found, link)[1]
    return ShuffledShares(float(found.dimensionality.mean()), *ends, *_clustered(labels))


def _interference(W: Tensor, chosen: Tensor, norms: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The neighbours of some features: indices, cosines and shares, each ``[chosen, count]``."""
    w = W[:, chosen].double()
    products = torch.cat([W[:, part].double().T @ w for part in column_blocks(W)])  # [n, chosen]
    total = products.square().sum(0)
    own = products[chosen, torch.arange(len(chosen))].clone()
    products[chosen, torch.arange(len(chosen))] = 0
    best = products.square().topk(min(count, len(products) - 1) if len(products) > 1 else 0, dim=0)
    values = products.gather(0, best.indices)
    cosines = values / (own.sqrt() * norms[best.indices].clamp(min=1e-300))
    return best.indices.T, cosines.T, (best.values / total).T


def _components(W: Tensor, found: _Measured, link: float) -> tuple[Tensor, Tensor]:
    """Unit vectors of the features that share the most, and for each the first of those that links lead to."""
    chosen = found.order[:GROUPED]
    unit = W[:, chosen].double() / found.norms[chosen]
    linked = (unit.T @ unit).abs_() > link
    labels = torch.arange(len(chosen), dtype=torch.int32)
    while True:  # the smallest label of a component spreads along its links
        spread = torch.where(linked, labels, len(chosen)).amin(1)
        spread = torch.minimum(spread, labels)[torch.minimum(spread, labels)]
        if torch.equal(spread, labels):
            return unit, labels
        labels = spread


def _clustered(labels: Tensor) -> tuple[int, int]:
    """Features in components of two and more, and in the largest of these."""
    sizes = torch.bincount(labels)
    sizes = sizes[sizes > 1]
    return int(sizes.sum()), int(sizes.max()) if len(sizes) else 0


def _clusters(unit: Tensor, labels: Tensor, chosen: Tensor, names: Sequence[str], limit: int) -> tuple[Cluster, ...]:
    sizes = torch.bincount(labels)
    found = []
    for label in sizes.argsort(descending=True, stable=True)[:limit].tolist():
        if sizes[label] < 2:
            break
        members = (labels == label).nonzero()[:, 0]
        members = members[chosen[members].argsort()]
        inside = unit[:, members]
        pairs = len(members) * (len(members) - 1)
        cosine = float((inside.sum(1).square().sum() - len(members)) / pairs)
        geometry = identify_geometry(inside, tol=_TOLERANCE)
        found.append(Cluster(tuple(names[i] for i in chosen[members].tolist()), cosine, geometry))
    return tuple(found)
