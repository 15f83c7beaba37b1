"""Every formula of the Gram flow against finite differences of gradient steps taken on the toy loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thought_kernels.spectral.dynamics import GramFlow, gradient_kernel
from thought_kernels.spectral.toy.models import reconstruction_loss

STEP = 1e-5
# Central differences err by STEP² times a third derivative, about 1e-9 here, and by rounding / STEP, about 1e-10.
CLOSE = 1e-6


class Toy:
    """A random toy model in float64 with inputs on which it errs."""

    def __init__(self, W: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = W.shape[1]
        self.W = W.double()
        self.bias = 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.importance = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
        self.x = torch.rand(64, n, generator=generator, dtype=torch.float64)
        self.x *= torch.rand(64, n, generator=generator) > 0.6
        self.kernel = gradient_kernel(self.W, self.bias, self.x, self.importance)
        self.flow = GramFlow(self.W, self.kernel)

    def stepped(self, rate: float) -> Tensor:
        """W after one plain gradient step on the loss, by autograd and SGD."""
        parameter = torch.nn.Parameter(self.W.clone())
        optimizer = torch.optim.SGD([parameter], lr=abs(rate), maximize=rate < 0)
        reconstruction_loss(parameter, self.bias, self.x, self.importance).backward()
        optimizer.step()
        return parameter.detach()

    def grams(self) -> tuple[Tensor, Tensor]:
        """M a step before and a step after."""
        before, after = self.stepped(-STEP), self.stepped(STEP)
        return before.T @ before, after.T @ after

    def projectors(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Mean eigenvalue [E] and projector [E, n, n] of each group of M's eigenvalues, of this flow's dimensions."""
        values, vectors = torch.linalg.eigh(M)
        sizes = self.flow.multiplicities.tolist()
        parts = vectors.flip(1).split(sizes, 1)
        means = torch.stack([part.mean() for part in values.flip(0).split(sizes)])
        return means, torch.stack([part @ part.T for part in parts])


def random_toy(m: int, n: int, seed: int) -> Toy:
    return Toy(torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / math.sqrt(m))


def polygon(points: int, radius: float) -> Tensor:
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    return radius * torch.stack([angle.cos(), angle.sin()])


def tight_toy() -> Toy:
    """A triangle, a pentagon and a digon: eigenspaces of 2, 2 and 1 dimensions, and a kernel of 5."""
    return Toy(torch.block_diag(polygon(3, 1.0), polygon(5, 1.1), torch.tensor([[0.7, -0.7]], dtype=torch.float64)))


TOYS = {
    "wide": lambda: random_toy(4, 7, 1),
    "square": lambda: random_toy(5, 5, 2),
    "tall": lambda: random_toy(6, 3, 3),
    "one dimension": lambda: random_toy(1, 4, 4),
    "tight frames": tight_toy,
}


@pytest.fixture(params=TOYS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return TOYS[request.param]()


def rate(before: Tensor, after: Tensor) -> Tensor:
    return (after - before) / (2 * STEP)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3  # something moves
    torch.testing.assert_close(actual, expected, rtol=0, atol=CLOSE * float(expected.abs().max()))


def test_the_gradient_is_w_times_the_kernel(toy: Toy) -> None:
    parameter = torch.nn.Parameter(toy.W.clone())
    reconstruction_loss(parameter, toy.bias, toy.x, toy.importance).backward()
    torch.testing.assert_close(toy.W @ toy.kernel, parameter.grad, rtol=0, atol=1e-13)


def test_gram_velocity(toy: Toy) -> None:
    assert_close(toy.flow.gram_velocity(), rate(*toy.grams()))


def test_eigenvalue_velocity(toy: Toy) -> None:
    before, after = (toy.projectors(M)[0] for M in toy.grams())
    assert_close(toy.flow.eigenvalue_velocity(), rate(before, after))


def test_projector_velocity(toy: Toy) -> None:
    before, after = (toy.projectors(M)[1] for M in toy.grams())
    velocity = torch.stack([toy.flow.projector_velocity(e) for e in range(len(toy.flow.eigenvalues))])
    assert_close(velocity, rate(before, after))


def test_mass_velocity(toy: Toy) -> None:
    before, after = (toy.projectors(M)[1].diagonal(dim1=1, dim2=2).T for M in toy.grams())
    expected = rate(before, after)
    velocity = toy.flow.mass_velocity()
    assert_close(velocity, expected)
    # eq. F.4 and Theorem 21 as printed have the other sign, which is off by twice the velocity
    assert (-velocity - expected).abs().max() > expected.abs().max()
    torch.testing.assert_close(toy.flow.mass(), toy.projectors(toy.flow.gram)[1].diagonal(dim1=1, dim2=2).T)


def test_transfers_are_antisymmetric_and_add_up(toy: Toy) -> None:
    velocity = toy.flow.mass_velocity()
    for feature in range(toy.W.shape[1]):
        transfers = toy.flow.transfers(feature)
        torch.testing.assert_close(transfers, -transfers.T)
        torch.testing.assert_close(transfers.sum(1), velocity[feature])


@pytest.mark.parametrize("name", ["wide", "square", "tall", "one dimension"])  # simple eigenvalues
def test_rayleigh_velocity(name: str) -> None:
    toy = TOYS[name]()
    before, after = ((M @ M).diagonal() / M.diagonal() for M in toy.grams())
    drift, transport = toy.flow.rayleigh_velocity()
    assert_close(drift + transport, rate(before, after))


def test_residual_is_that_of_the_commutators(toy: Toy) -> None:
    expected = []
    for e in range(len(toy.flow.eigenvalues)):
        projector = toy.flow.projector(e)
        commutator = projector @ toy.kernel - toy.kernel @ projector
        expected.append(torch.linalg.matrix_norm(commutator) / torch.linalg.matrix_norm(toy.kernel))
    torch.testing.assert_close(toy.flow.fixed_point_residual(), torch.stack(expected))


def test_a_kernel_that_commutes_turns_nothing() -> None:
    toy = tight_toy()
    projectors = [toy.flow.projector(e) for e in range(4)]
    flow = GramFlow(toy.W, sum(weight * P for weight, P in zip((3.0, -1.0, 2.0, 0.5), projectors, strict=True)))
    assert flow.fixed_point_residual().max() < 1e-12
    assert flow.mass_velocity().abs().max() < 1e-12
    assert flow.eigenvalue_velocity().abs().max() > 1  # and yet eigenvalues move


def test_a_pentagon_under_uniform_inputs_is_a_spectral_fixed_point() -> None:
    """Theorem 22: every one-hot input and its rotations at once, so that Φ lies in the pentagon's algebra."""
    W = polygon(5, 1.2)
    x = torch.cat([size * torch.eye(5, dtype=torch.float64) for size in (0.3, 0.6, 1.0)])
    flow = GramFlow(W, gradient_kernel(W, torch.full((5,), -0.05, dtype=torch.float64), x))
    assert flow.fixed_point_residual().max() < 1e-12
    uneven = gradient_kernel(W, torch.full((5,), -0.05, dtype=torch.float64), x[:-1])
    assert GramFlow(W, uneven).fixed_point_residual().max() > 1e-2


@pytest.mark.parametrize(
    ("W", "kernel", "sentence"),
    [
        (torch.zeros(2, 3), torch.eye(3), "GramFlow: W must have rank at least 1"),
        (torch.ones(2, 3), torch.eye(2), r"GramFlow: kernel must be \[3, 3\], got \[2, 2\]"),
        (torch.ones(2, 3), torch.ones(3, 3).triu(), "GramFlow: kernel must be symmetric"),
        (torch.ones(2, 3), torch.full((3, 3), math.nan), "GramFlow: kernel must be finite"),
    ],
)
def test_bad_flows_are_refused(W: Tensor, kernel: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GramFlow(W, kernel)


def test_bad_inputs_are_refused() -> None:
    W = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"gradient_kernel: x must be \[samples, 3\]"):
        gradient_kernel(W, torch.zeros(3), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"gradient_kernel: importance must be \[3\]"):
        gradient_kernel(W, torch.zeros(3), torch.ones(4, 3), torch.ones(1))
    with pytest.raises(TypeError, match="gradient_kernel: W must be float64"):
        gradient_kernel(W.long(), torch.zeros(3), torch.ones(4, 3))
    with pytest.raises(TypeError, match="gradient_kernel: bias must be a tensor, got list"):
        gradient_kernel(W, [0.0, 0.0, 0.0], torch.ones(4, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gradient_kernel: x must have W's dtype torch.float32, got torch.float64"):
        gradient_kernel(W, torch.zeros(3), torch.ones(4, 3).double())
    with pytest.raises(ValueError, match="gradient_kernel: x must be finite, got NaN or an infinity"):
        gradient_kernel(W, torch.zeros(3), torch.full((4, 3), math.nan))
