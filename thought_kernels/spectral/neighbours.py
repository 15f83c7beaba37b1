"""Who shares dimensions with whom: the features of a weight matrix by name, tokens or neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from thought_kernels.ops.library import message
from thought_kernels.spectral.frames import check_matrix, column_blocks, fractional_dimensionality
from thought_kernels.spectral.geometry import identify_geometry
from thought_kernels.spectral.measure import eigenvector_residual
from thought_kernels.spectral.nulls import null_saturation

GROUPED = 4096  # features that share the most, among which clusters are sought
_WHOLE = 1 << 24  # entries that may be widened at once
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
class SharedFeatures:
    """What the features of one matrix share.

    Attributes:
        features, dimensions: n and m.
        common: n ‖w̄‖² / Σ ‖w_i‖², the part of all squared norm that is the mean vector's.
        mean_dimensionality: mean D.
        null_dimensionality: max(m, n) / (m + n) · min(m, n) / n.
        linked: the cosine that links two features of a cluster: halfway to 1 from the largest that n independent
            directions would have, √(2 ln(n²/2) / m).
        most_shared, least_shared: features of smallest, of largest D, zero ones left out.
        clusters: of the features that share the most, largest first.
    """

    features: int
    dimensions: int
    common: float
    mean_dimensionality: float
    null_dimensionality: float
    linked: float
    most_shared: tuple[Feature, ...]
    least_shared: tuple[Feature, ...]
    clusters: tuple[Cluster, ...]

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

    Args:
        W: ``[m, n]``, features in columns: token vectors of an embedding or unembedding, columns of a down_proj.
        names: of the features; their numbers if not given.
        centred: take the mean vector away first. Of an unembedding it adds the same to all logits, which softmax does
            not see, and there it is often most of what tokens share.
        count: features at each end.
        neighbours: of each.
        clusters: at most.

    Returns:
        SharedFeatures. Clusters are the connected components of absolute cosines above ``linked`` among the 4,096
        features that share the most.

    Raises:
        TypeError, ValueError: as frame_operator does; W is all zero; names are fewer than features.

    Source: Spectral superposition, eq. 3.1 and §A.4.
    """
    largest = check_matrix("shared_features", W)
    m, n = W.shape
    if largest == 0:
        raise ValueError(message("shared_features", "W", "have a nonzero feature", "zeros"))
    if names is not None and len(names) < n:
        raise ValueError(message("shared_features", "names", f"be {n}, one for each feature", len(names)))
    mean = W.double().mean(1) if W.numel() < _WHOLE else W.mean(1).double()
    size = sum(float(W[:, part].double().square().sum()) for part in column_blocks(W))
    if centred:
        W = W.detach() - mean[:, None].to(W.dtype)
    D, residual = fractional_dimensionality(W, dtype=torch.float64), eigenvector_residual(W)
    norms = torch.cat([torch.linalg.vector_norm(W[:, part].double(), dim=0) for part in column_blocks(W)])
    present = (norms > 0).nonzero()[:, 0]
    order = present[D[present].argsort()]
    link = (1 + min(1.0, math.sqrt(2 * math.log(max(n * n / 2, 1)) / m))) / 2
    mean_square = norms.square().mean().sqrt()

    def told(chosen: Tensor) -> tuple[Feature, ...]:
        indices, cosines, shares = _interference(W, chosen, norms, neighbours)
        found = []
        for row, index in enumerate(chosen.tolist()):
            beside = zip(indices[row].tolist(), shares[row].tolist(), cosines[row].tolist(), strict=True)
            others = tuple(Neighbour(_name(names, j), share, cosine) for j, share, cosine in beside)
            size = float(norms[index] / mean_square)
            found.append(Feature(_name(names, index), index, float(D[index]), size, float(residual[index]), others))
        return tuple(found)

    return SharedFeatures(
        n, m, n * float(mean.square().sum()) / size, float(D.mean()), null_saturation(m, n) * min(m, n) / n, link,
        told(order[:count]), told(order.flip(0)[:count]), _clusters(W, order[:GROUPED], norms, names, link, clusters),
    )  # fmt: skip


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


def _clusters(
    W: Tensor, chosen: Tensor, norms: Tensor, names: Sequence[str] | None, link: float, limit: int
) -> tuple[Cluster, ...]:
    unit = W[:, chosen].double() / norms[chosen]
    linked = (unit.T @ unit).abs() > link
    labels = torch.arange(len(chosen))
    while True:  # the smallest label of a component spreads along its links
        spread = torch.where(linked, labels, len(chosen)).amin(1)
        spread = torch.minimum(spread, labels)[torch.minimum(spread, labels)]
        if torch.equal(spread, labels):
            break
        labels = spread
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
        found.append(Cluster(tuple(_name(names, int(chosen[i])) for i in members), cosine, geometry))
    return tuple(found)


def _name(names: Sequence[str] | None, index: int) -> str:
    return str(index) if names is None else names[index]
