"""The exact covariance of dropout noise, without sampling a mask, where dropout acts on the last hidden layer.

For f = W((1 + η) ∘ h) + b and R = (c/2n) Σ_i ‖f_i - y_i‖², with u_r = W_r h_r the contribution of unit r,
K_rs = (1/n) Σ_i ⟨u_r, u_s⟩, e = f - y without dropout, η² = κ + γη:

    R^drop / c = E R^drop / c + Σ_r η_r φ_r + Σ_{r<s} η_r η_s K_rs,    φ_r = (1/n) Σ_i ⟨e_i, u_r⟩ + (γ/2) K_rr.

The η_r and η_r η_s are orthogonal (a Walsh expansion), so that for a mask shared by all samples

    Σ = c² [κ Σ_r ∇φ_r ∇φ_rᵀ + κ² Σ_{r<s} ∇K_rs ∇K_rsᵀ],

and for a mask for each sample the same with n = 1 for every sample, summed and divided by n². One forward derivative
gives (φ̇, K̇) along v, one backward pass of what they weight gives Σv. Exact for any depth and number of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dropscope.masks import Sharing
from dropscope.memory import budget, readable
from dropscope.modes import dual
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.read_out import ReadOut, ReadOutForm
from dropscope.problem import Batch, Problem

# Exact traces take a gradient for each factor: up to so many.
MAX_EXACT_FACTORS = 20_000


class ExactNoise(SymmetricOperator):
    """Σ, the covariance over dropout masks of the full-batch gradient, by products that are exact.

    The operator follows the model: products are taken at the parameters that it has.

    Args:
        problem: dropout on the last hidden layer, a linear read-out, squared loss.
        sharing: ``"sample"`` for a mask for each sample, ``"batch"`` for one that all samples share.
        memory: bytes that stored factors may take.

    Attributes:
        keep: the keep probability T/65536.
        rank: number of factors, m(m+1)/2 for a shared mask, n times as many for masks per sample.

    Raises:
        ValueError: if the problem is not of that form; the message names what is not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
        >>> problem = Problem(model, torch.nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
        >>> ExactNoise(problem, sharing="batch").rank
        6
    """

    def __init__(self, problem: Problem, sharing: Sharing = "sample", *, memory: int | None = None) -> None:
        if sharing not in ("sample", "batch"):
            raise ValueError(f"ExactNoise: sharing must be 'sample' or 'batch', got {sharing!r}")
        self.problem, self.sharing, self.memory = problem, sharing, memory
        self.form = ReadOutForm(problem, "ExactNoise", "use method='sampled'")
        self.scale = self.form.curvature * problem.scale
        self.keep, self.kappa = self.form.keep, self.form.kappa
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks
        pairs = self.form.units * (self.form.units + 1) // 2
        self.rank = pairs if sharing == "batch" else pairs * problem.n

    def __repr__(self) -> str:
        return f"ExactNoise(dim={self.dim}, units={self.form.units}, keep={self.keep:.6g}, sharing={self.sharing!r})"

    def _matmat(self, V: Tensor) -> Tensor:
        shared = self.sharing == "batch"
        out = torch.zeros_like(V)
        slopes = [self._shared_slopes(v) for v in V.unbind(1)] if shared else []
        for batch in self.problem.batches():
            with torch.enable_grad():
                read = self.form.read(batch)
                for k, v in enumerate(V.unbind(1)):
                    weighted = (
                        self._weighted(*self._walsh(read), *slopes[k])
                        if shared
                        else self._weighted_samples(read, *self._dual_read(batch, v))
                    )
                    out[:, k] += self._gradient(weighted, keep=k + 1 < V.shape[1])
        return out

    def _walsh(self, read: ReadOut, n: int | None = None) -> tuple[Tensor, Tensor]:
        """A batch's part of φ (m,) and K (m, m)."""
        H, W, n = read.features, read.weight, n or self.problem.n
        return self.form.linear(read).sum(0) / n, (W.T @ W) * (H.T @ H) / n

    def _shared_slopes(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """c²κφ̇ and c²κ²K̇ along v, the second strictly above the diagonal."""
        slopes = [torch.zeros((), dtype=self.dtype, device=self.device)] * 2
        for batch in self.problem.batches():
            with forward_ad.dual_level(), torch.no_grad():
                read = self._read_along(batch, v)
                slopes = [total + _tangent(part) for total, part in zip(slopes, self._walsh(read), strict=True)]
        factor = self.scale**2 * self.kappa
        return factor * slopes[0], factor * self.kappa * slopes[1].triu(1)

    @staticmethod
    def _weighted(phi: Tensor, K: Tensor, a: Tensor, A: Tensor) -> Tensor:
        return (a * phi).sum() + (A * K).sum()

    def _dual_read(self, batch: Batch, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """h, G = WᵀW, and the derivatives of h, G and of each sample's φ along v."""
        with forward_ad.dual_level(), torch.no_grad():
            read = self._read_along(batch, v)
            G = read.weight.T @ read.weight
            phi = self.form.linear(read)
            values = (_primal(read.features), _primal(G))
            return *values, _tangent(read.features), _tangent(G), _tangent(phi)

    def _weighted_samples(self, read: ReadOut, h: Tensor, G0: Tensor, dh: Tensor, dG: Tensor, dphi: Tensor) -> Tensor:
        """What (φ̇, K̇) of every sample weight, in O(m²) memory: K_rs = G_rs h_r h_s, so that K̇ never has to stand.

        Σ_rs K̇_rs K_rs = (h₀h)ᵀ(Ġ∘G)(h₀h) + 2(ḣh)ᵀ(G₀∘G)(h₀h), less its diagonal, each r < s counted twice.
        """
        H, W = read.features, read.weight
        G = W.T @ W
        hh, dhh = h * H, dh * H
        pairs = (hh * (hh @ (dG * G))).sum() + 2.0 * (dhh * (hh @ (G0 * G))).sum()
        diagonal = (hh * hh * (dG * G).diagonal()).sum() + 2.0 * (dhh * hh * (G0 * G).diagonal()).sum()
        factor = (self.scale / self.problem.n) ** 2 * self.kappa
        first = (dphi * self.form.linear(read)).sum()
        return factor * (first + 0.5 * self.kappa * (pairs - diagonal))

    def _read_along(self, batch: Batch, v: Tensor) -> ReadOut:
        """The read-out of a batch as dual numbers along v, inside a dual level."""
        problem, parts = self.problem, self.problem.unflatten(v)
        duals = {name: dual(p.detach().clone(), parts[name]) for name, p in problem.params.items()}
        return problem.substituted(duals, lambda: self.form.read(batch))

    def _gradient(self, value: Tensor, keep: bool = False) -> Tensor:
        if not value.requires_grad:
            return torch.zeros(self.dim, dtype=self.dtype, device=self.device)
        grads = torch.autograd.grad(
            value, list(self.problem.params.values()), retain_graph=keep, materialize_grads=True
        )
        return self.problem.flatten(grads).detach()

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """A Gaussian vector of covariance Σ, (dim,), by one backward pass: Σ^{1/2} z without a factorisation.

        It is ∇[√κ Σ_r z_r φ_r + κ Σ_{r<s} z_rs K_rs], z standard normal.

        Args:
            generator: of z, on the CPU; by default torch's own.
        """
        problem, m = self.problem, self.form.units
        out = torch.zeros(self.dim, dtype=self.dtype, device=self.device)

        def normal(copies: int) -> Tensor:
            return torch.randn(copies, m, m, generator=generator, dtype=self.dtype).to(self.device)

        shared = normal(1) if self.sharing == "batch" else None
        step = problem.n if shared is not None else max(1, (1 << 24) // m**2)  # samples whose numbers fit
        for batch in problem.batches():
            for start in range(0, batch.size, step):
                with torch.enable_grad():
                    read = self.form.read(batch.select(slice(start, start + step)))
                    z = normal(read.rows) if shared is None else shared
                    out += self._gradient(self.form.potential(read, z))
        return out

    def factor_columns(self) -> Iterator[Tensor]:
        """Yield the factors F of Σ = F Fᵀ in blocks of columns, (dim, ·), ``rank`` columns in all.

        For masks per sample a block is one sample's; for a shared mask it is all.
        """
        if self.sharing == "batch":
            with torch.enable_grad():
                parts = [self._walsh(self.form.read(batch)) for batch in self.problem.batches()]
                phi, K = (sum(part[i] for part in parts) for i in (0, 1))
            yield self._columns(phi, K, self.scale)
            return
        for batch in self.problem.batches():
            for i in range(batch.size):
                with torch.enable_grad():
                    read = self.form.read(batch.select(slice(i, i + 1)))
                    yield self._columns(*self._walsh(read, 1), self.scale / self.problem.n)

    def _columns(self, phi: Tensor | int, K: Tensor | int, scale: float) -> Tensor:
        """Gradients of √κ φ_r and κ K_rs, r < s, as columns."""
        assert isinstance(phi, Tensor)
        assert isinstance(K, Tensor)
        m, params = self.form.units, list(self.problem.params.values())
        rows, columns = torch.triu_indices(m, m, 1, device=self.device)
        values = torch.cat([scale * math.sqrt(self.kappa) * phi, scale * self.kappa * K[rows, columns]])
        blocks = []
        for chunk in torch.split(torch.eye(len(values), dtype=self.dtype, device=self.device), 256):
            grads = torch.autograd.grad(
                values, params, chunk, is_grads_batched=True, retain_graph=True, materialize_grads=True
            )
            blocks.append(torch.cat([g.reshape(len(chunk), -1) for g in grads], 1))
        return torch.cat(blocks).detach().T

    def factors(self) -> Tensor:
        """F with Σ = F Fᵀ, (dim, rank): the square root that a simulation multiplies normal numbers by.

        Raises:
            ValueError: if it does not fit into the memory.
        """
        size = self.dim * self.rank * torch.empty(0, dtype=self.dtype).element_size()
        limit = budget("ExactNoise.factors", self.memory, self.device)
        if size > limit:
            raise ValueError(
                f"ExactNoise.factors: memory must hold {self.rank} factors of {self.dim}, {readable(size)}, "
                f"got {readable(limit)}; draw() needs none of them"
            )
        return torch.cat(list(self.factor_columns()), 1)

    def trace(self) -> float:
        """Tr Σ, exact; a gradient for each factor.

        Raises:
            ValueError: if there are more than 20 000 factors; :func:`dropscope.trace` then estimates it.
        """
        if self.rank > MAX_EXACT_FACTORS:
            raise ValueError(
                f"ExactNoise.trace: rank must be at most {MAX_EXACT_FACTORS}, got {self.rank}; use dropscope.trace"
            )
        return sum(float(F.double().square().sum()) for F in self.factor_columns())

    def loss_variance(self) -> float:
        """Var over masks of R^drop, c² [κ Σφ_r² + κ² Σ_{r<s} K_rs²] (for masks per sample: n⁻² times the sum)."""
        total, shared = 0.0, self.sharing == "batch"
        parts: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for batch in self.problem.batches():
                read = self.form.read(batch)
                if shared:
                    parts.append(self._walsh(read))
                    continue
                G, square = read.weight.T @ read.weight, read.features.double().square()
                phi = self.form.linear(read).double()
                G2 = G.double().square()
                pairs = (square * (square @ (G2 - torch.diag(G2.diagonal())))).sum()
                total += float(phi.square().sum() + 0.5 * self.kappa * pairs) / self.problem.n**2
            if shared:
                phi, K = (torch.stack([part[i].double() for part in parts]).sum(0) for i in (0, 1))
                total = float(phi.square().sum() + self.kappa * K.triu(1).square().sum())
        return self.scale**2 * self.kappa * total

    def penalty(self) -> float:
        """R1 = E R^drop - R = c (κ/2) Tr K, arXiv:2207.05952."""
        with torch.no_grad():
            parts = [float(self.form.penalty(self.form.read(batch)).double()) for batch in self.problem.batches()]
        return sum(parts) / self.problem.total_weight

    def mean_gradient(self) -> Tensor:
        """E ∇R^drop = ∇(R + R1), (dim,)."""
        out = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
        for batch in self.problem.batches():
            with torch.enable_grad():
                read = self.form.read(batch)
                values, _ = self.problem.losses_of(read.output, read.target, read.rows)
                out += self._gradient((values.sum() + self.form.penalty(read)) / self.problem.total_weight)
        return out


def _tangent(x: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(_primal(x)) if tangent is None else tangent.clone()


def _primal(x: Tensor) -> Tensor:
    primal: Tensor = forward_ad.unpack_dual(x).primal  # type: ignore[no-untyped-call]
    return primal.detach().clone()
