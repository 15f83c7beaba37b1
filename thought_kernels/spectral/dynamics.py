"""How the spectrum of M = WᵀW moves while a toy model is trained by gradient flow, Ẇ = −∇_W L.

Where the loss sees W through M alone, ∇_W L = WΦ with Φ = ∇_M L + (∇_M L)ᵀ, and everything below follows from M and Φ
at one moment. The paper prints some of it twice, with signs and factors that disagree; what is followed here is
Theorem 18 (M), Theorem 19 (projectors), Theorem 20 (eigenvalues) and, for the mass, the diagonal of Theorem 19:

- eq. F.2 has λ_e − λ_f where Theorem 19 has λ_f − λ_e, the wrong sign, and E_eΦE_f twice instead of its transpose;
- eq. F.4 and Theorem 21 have λ_e − λ_f too, though their proof takes the diagonal of Theorem 19: wrong sign;
- "Φ = Sym(∇_M L)" stands for twice the symmetric part (appendix F.1), not for half the sum (Lemma F.3).

The tests hold each to finite differences of gradient steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thought_kernels.ops.checks import check_float_tensor, check_like
from thought_kernels.ops.library import message
from thought_kernels.spectral.measure import nonzero_spectrum
from thought_kernels.spectral.scheme import AssociationScheme
from thought_kernels.spectral.spectrum import RTOL


def gradient_kernel(W: Tensor, bias: Tensor, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """The gradient kernel of a toy model's loss on given inputs.

    Φ = −mean_x [δ xᵀ + x δᵀ],  δ = I ⊙ (x − x') ⊙ 1(Mx + b > 0),  x' = ReLU(Mx + b),  so that ∇_W L = WΦ
    for L = ½ mean_x Σ_i I_i (x_i − x'_i)².

    Args:
        W: [m, n], features in columns, float32 or float64.
        bias: b, [n].
        x: inputs, [samples, n].
        importance: I, [n]; 1 for all if not given.

    Returns:
        Φ, [n, n], symmetric. For the loss of §4.1, without the ½, it is twice this.

    Raises:
        ValueError: shapes that do not agree, NaN or an infinity.
        TypeError: an argument that is no floating tensor, or not of W's dtype.

    Source: SS Theorem 18 and appendix F.2; Φ = 2 Sym(∇_M L) as derived in F.1.
    """
    check_float_tensor("gradient_kernel", "W", W)
    if W.dim() != 2:
        raise ValueError(message("gradient_kernel", "W", "be a matrix [m, n], features in columns", list(W.shape)))
    n = W.shape[1]
    given = {"W": W, "bias": bias, "x": x, **({} if importance is None else {"importance": importance})}
    for name, tensor in given.items():
        check_like("gradient_kernel", name, tensor, "W", W)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(message("gradient_kernel", name, "be finite", "NaN or an infinity"))
    if x.dim() != 2 or x.shape[1] != n or x.shape[0] == 0:
        raise ValueError(message("gradient_kernel", "x", f"be [samples, {n}], samples >= 1", list(x.shape)))
    for name, vector in (("bias", bias), ("importance", importance)):
        if vector is not None and vector.shape != (n,):
            raise ValueError(message("gradient_kernel", name, f"be [{n}]", list(vector.shape)))
    drive = x @ W.T @ W + bias
    error = (x - drive.relu()) * (drive > 0)
    if importance is not None:
        error = error * importance
    half = error.T @ x / x.shape[0]
    return -(half + half.T)


class GramFlow:
    """One moment of the flow Ṁ = −(MΦ + ΦM), and the velocities it gives to the spectrum of M.

    E is the number of eigenspaces: those of the positive eigenvalues, largest first, and the kernel of M last, where M
    has one (λ = 0). An eigenspace is a group of near-equal eigenvalues, which may split: velocities are then those of
    the group as a whole. All tensors are float64.

    Args:
        W: [m, n], features in columns, finite and not zero.
        kernel: Φ, [n, n], symmetric.
        rtol: eigenvalues within this times the largest of one another form one eigenspace. Velocities of
            eigenspaces closer than the step taken are of no use; group them.

    Attributes:
        gram: M, [n, n].
        kernel: Φ.
        eigenvalues: [E].
        multiplicities: [E].

    Raises:
        ValueError: W is no finite, nonzero matrix; a kernel of another shape, not finite or not symmetric; a tolerance
            outside [0, 1).
        TypeError: not floating tensors.

    Source: SS appendix F.
    """

    def __init__(self, W: Tensor, kernel: Tensor, *, rtol: float = RTOL) -> None:
        spectrum = nonzero_spectrum("GramFlow", W, rtol, None)
        check_float_tensor("GramFlow", "kernel", kernel)
        n = W.shape[1]
        if kernel.shape != (n, n):
            raise ValueError(message("GramFlow", "kernel", f"be [{n}, {n}]", list(kernel.shape)))
        self.kernel = kernel.detach().double()
        size = float(self.kernel.abs().max())
        if not size < float("inf"):
            raise ValueError(message("GramFlow", "kernel", "be finite", "NaN or an infinity"))
        skew = float((self.kernel - self.kernel.T).abs().max())
        if skew > 1e-5 * size:  # room for a float32 product summed in another order
            raise ValueError(message("GramFlow", "kernel", "be symmetric", f"a difference of {skew:.2g}"))
        wide = W.detach().double()
        self.gram = wide.T @ wide
        basis, _ = torch.linalg.qr(spectrum.gram_basis, mode="complete")
        # QR may turn a vector round; what it appends spans the kernel of M.
        self._basis = torch.cat([spectrum.gram_basis, basis[:, spectrum.rank :]], 1)
        self.eigenvalues, self.multiplicities = spectrum.eigenvalues, spectrum.multiplicities
        self._groups = spectrum.groups
        if spectrum.rank < n:
            rest = n - spectrum.rank
            self.eigenvalues = torch.cat([self.eigenvalues, self.eigenvalues.new_zeros(1)])
            self.multiplicities = torch.cat([self.multiplicities, self.multiplicities.new_tensor([rest])])
            last = self._groups.new_full((rest,), len(self.eigenvalues) - 1)
            self._groups = torch.cat([self._groups, last])
        self._kernel = self._basis.T @ self.kernel @ self._basis  # Φ in M's eigenbasis
        values = self.eigenvalues[self._groups]
        gap = values - values[:, None]  # [a, b]: λ_b − λ_a
        same = self._groups == self._groups[:, None]
        # (λ_e + λ_f)/(λ_f − λ_e) ⟨a|Φ|b⟩ for a in e and b in f, 0 within an eigenspace
        self._turning = torch.where(same, 0, (values + values[:, None]) / torch.where(same, 1, gap)) * self._kernel

    def gram_velocity(self) -> Tensor:
        """Ṁ = −(MΦ + ΦM), [n, n] (SS Theorem 18, eq. F.1)."""
        product = self.gram @ self.kernel
        return -(product + product.T)

    def eigenvalue_velocity(self) -> Tensor:
        """λ̇_e = −2 λ_e tr(E_eΦE_e) / dim E_e, [E]: of the mean over a group that splits (SS Theorem 20)."""
        return -2 * self.eigenvalues * self._sum_groups(self._kernel.diagonal()) / self.multiplicities

    def projector(self, e: int) -> Tensor:
        """E_e, [n, n]."""
        inside = self._basis[:, self._groups == e]
        return inside @ inside.T

    def projector_velocity(self, e: int) -> Tensor:
        """Ė_e = Σ_{f≠e} (λ_e + λ_f)/(λ_f − λ_e) (E_eΦE_f + E_fΦE_e), [n, n] (SS Theorem 19, not eq. F.2)."""
        inside = self._groups == e
        half = self._basis[:, inside] @ self._turning[inside] @ self._basis.T
        return half + half.T

    def mass(self) -> Tensor:
        """q_ie = (E_e)_ii, [n, E]; each row sums to 1 (SS Corollary 16)."""
        return self._sum_groups(self._basis.square())

    def mass_velocity(self) -> Tensor:
        """q̇_ie = Σ_{f≠e} 2 (λ_e + λ_f)/(λ_f − λ_e) (E_eΦE_f)_ii, [n, E].

        The diagonal of Theorem 19, as Theorem 21's proof says; its printed λ_e − λ_f, and eq. F.4's, is the wrong sign.
        """
        return 2 * self._sum_groups(self._basis * (self._basis @ self._turning.T))

    def transfers(self, feature: int) -> Tensor:
        """What eigenspace e gains from f at one feature, [E, E]: antisymmetric, and its rows sum to mass_velocity's.

        T_ef = 2 (λ_e + λ_f)/(λ_f − λ_e) (E_eΦE_f)_ii  (SS Theorem 21, with the sign of Theorem 19)
        """
        row = self._basis[feature]
        return 2 * self._sum_groups(self._sum_groups(row[:, None] * self._turning * row).T).T

    def rayleigh_velocity(self) -> tuple[Tensor, Tensor]:
        """The two parts of κ̇_i = Σ_e λ̇_e p_ie + Σ_e λ_e ṗ_ie: eigenvalue drift [n] and mass transport [n].

        Their sum is κ̇ exactly where no eigenspace splits, as where all positive eigenvalues are simple. 0 for a zero
        feature.

        Source: SS Corollary 7; ṗ from p_ie = λ_e q_ie / M_ii (Lemma B.11).
        """
        size = self.gram.diagonal()
        inverse = torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 0)[:, None]
        share = self.eigenvalues * self.mass() * inverse
        values = self.eigenvalue_velocity()
        growth = self.gram_velocity().diagonal()[:, None] * inverse
        share_velocity = (values * self.mass() + self.eigenvalues * self.mass_velocity()) * inverse - share * growth
        return share @ values, share_velocity @ self.eigenvalues

    def fixed_point_residual(self) -> Tensor:
        """‖[E_e, Φ]‖ / ‖Φ‖ in Frobenius norms, [E]: 0 for every e where the flow turns no eigenspace; 0 if Φ = 0.

        Eigenvalues may still move there: a spectral fixed point is not yet a minimum.

        Source: SS Theorem 22, Corollary 17.
        """
        size = torch.linalg.matrix_norm(self._kernel)
        if size == 0:
            return torch.zeros_like(self.eigenvalues)
        # [E, Φ] = EΦ(1 − E) − (1 − E)ΦE, two blocks of equal norm.
        outside = torch.where(self._groups == self._groups[:, None], 0, self._kernel)
        return (2 * self._sum_groups(outside.square().sum(1))).sqrt() / size

    def _sum_groups(self, values: Tensor) -> Tensor:
        """[..., n] over eigenvectors summed over each eigenspace, [..., E]."""
        total = values.new_zeros(*values.shape[:-1], len(self.eigenvalues))
        return total.index_add_(-1, self._groups, values)


def angle_velocity(scheme: AssociationScheme, gram: Tensor, kernel: Tensor) -> Tensor:
    """The flow of inner products inside a scheme's algebra: one number for each relation instead of a matrix.

    M = Σ_r θ_r A_r, Φ = Σ_r φ_r A_r:  θ̇_u = −Σ_{r,s} θ_r φ_s (c[r, s, u] + c[s, r, u])

    Args:
        scheme: of s + 1 relations.
        gram: θ ``[s + 1]``, M's entry on each relation.
        kernel: φ ``[s + 1]``, Φ's.

    Returns:
        θ̇ ``[s + 1]`` float64: norms first, then the inner products, so the angles between features.

    Raises:
        ValueError: other lengths.

    Source: SS eq. F.1 and F.6, Lemma F.1.
    """
    count = len(scheme.valencies)
    for name, vector in (("gram", gram), ("kernel", kernel)):
        if vector.shape != (count,):
            raise ValueError(message("angle_velocity", name, f"be [{count}]", list(vector.shape)))
    c = scheme.intersections.double()
    return -torch.einsum("r,s,rsu->u", gram.double(), kernel.double(), c + c.transpose(0, 1))
