"""Drift and diffusion of dropout's stochastic modified equations, and a root of Σ that needs no factorisation."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.func import grad, vmap

from dropscope.masks import keep_probability
from dropscope.operators.read_out import ReadOutForm
from dropscope.training.flat_risk import FlatRisk


class Noise(ABC):
    """The mean L(θ) = E R^drop over masks and a random potential whose gradient has the covariance Σ(θ).

    Both are scalar functions of the flat parameters for ``torch.func``: the drift is −∇L, the noise ∇(potential).

    Attributes:
        exact: whether ``mean`` is L itself rather than an estimate from masks of its own.
        masks: how many masks an estimated mean is of, else 0.
    """

    exact = True
    masks = 0

    def __init__(self, risk: FlatRisk) -> None:
        self.risk = risk

    @abstractmethod
    def draw(self, paths: int, generator: torch.Generator, step: int) -> Tensor:
        """The random numbers of one step, a row for each path."""

    @abstractmethod
    def mean(self, theta: Tensor, z: Tensor) -> Tensor:
        """L(θ)."""

    @abstractmethod
    def potential(self, theta: Tensor, z: Tensor) -> Tensor:
        """A scalar, linear in standard normal numbers, whose gradient's covariance is Σ(θ)."""

    def _normal(self, *shape: int, generator: torch.Generator) -> Tensor:
        theta = self.risk.theta
        return torch.randn(shape, generator=generator, dtype=theta.dtype).to(theta.device)


class Walsh(Noise):
    """Dropout before a linear read-out, squared error: R^drop − L is a polynomial of degree two in η, exactly.

    The formulas are those of :class:`~dropscope.operators.read_out.ReadOutForm`: Σ is a sum of gradients' squares, so
    that with normal numbers in place of the products of η one backward pass of the sum is a sample of the noise. Here
    it is a function of θ, for many paths at once; products with Σ at one θ are
    :class:`~dropscope.operators.exact_noise.ExactNoise`'s, which walks through the batches and cannot be mapped.
    """

    def __init__(self, risk: FlatRisk) -> None:
        super().__init__(risk)
        self.form = ReadOutForm(risk.problem, "simulate", "take noise='sampled'")
        self.copies = 1 if risk.sharing == "batch" else risk.problem.n

    def draw(self, paths: int, generator: torch.Generator, step: int) -> Tensor:  # noqa: ARG002
        """z of φ on the diagonal, of the pairs above it: (paths, copies, m, m), one copy a mask of its own."""
        return self._normal(paths, self.copies, self.form.units, self.form.units, generator=generator)

    def mean(self, theta: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """R_S + R1."""
        problem, form = self.risk.problem, self.form
        reads = self.risk.read_outs(theta, form)
        parts = [problem.losses_of(r.output, r.target, r.rows)[0].sum() + form.penalty(r) for r in reads]
        return torch.stack(parts).sum() / problem.total_weight

    def potential(self, theta: Tensor, z: Tensor) -> Tensor:
        """√κ Σ z_r φ_r + κ Σ_{r<s} z_rs K_rs, summed over the masks."""
        reads = self.risk.read_outs(theta, self.form)
        copies = [z] * len(reads) if self.copies == 1 else torch.split(z, [read.rows for read in reads])
        parts = [self.form.potential(read, copy) for read, copy in zip(reads, copies, strict=True)]
        return torch.stack(parts).sum()


class Enumerated(Noise):
    """All masks η_j with their probabilities π_j: Σ^½ Z = Σ_j √π_j (g_j − ḡ) z_j."""

    LIMIT = 12  # units, 4096 masks

    def __init__(self, risk: FlatRisk) -> None:
        super().__init__(risk)
        units = sum(count for count, _ in risk.sites)
        if units > self.LIMIT:
            raise ValueError(f"simulate: enumeration must be of at most {self.LIMIT} units, got {units}")
        keep = torch.cat([torch.full((n,), keep_probability(p), dtype=torch.float64) for n, p in risk.sites])
        bits = torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)
        self.weights = (bits * keep + (1.0 - bits) * (1.0 - keep)).prod(1).to(risk.theta)
        self.bits = bits.to(risk.theta)
        self.copies = 1 if risk.sharing == "batch" else risk.problem.n

    def draw(self, paths: int, generator: torch.Generator, step: int) -> Tensor:  # noqa: ARG002
        """(paths, masks, copies)."""
        return self._normal(paths, len(self.weights), self.copies, generator=generator)

    def _values(self, theta: Tensor) -> Tensor:
        values: Tensor = vmap(self.risk.under_mask, in_dims=(None, 0))(theta, self.bits)
        return values

    def mean(self, theta: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """Σ_j π_j R(θ, η_j)."""
        return self.weights @ self._values(theta).sum(1)

    def potential(self, theta: Tensor, z: Tensor) -> Tensor:
        """Σ_j c_j R(θ, η_j) with c_j = √π_j z_j − π_j Σ_k √π_k z_k, for each sample if its mask is its own."""
        z = self.weights.sqrt()[:, None] * z
        return ((z - self.weights[:, None] * z.sum(0)) * self._values(theta)).sum()


class Sampled(Noise):
    """N fresh masks a step: (N−1)^−½ Σ_j (g_j − ḡ) z_j, whose covariance is that of the sample, Σ in the mean."""

    exact = False

    def __init__(self, risk: FlatRisk, masks: int) -> None:
        super().__init__(risk)
        self.masks = masks
        self.copies = 1 if risk.sharing == "batch" else risk.problem.n

    def draw(self, paths: int, generator: torch.Generator, step: int) -> Tensor:
        """(paths, N, 1 + copies): the number of the draw, then normal numbers."""
        base = step * paths * self.masks
        if base + paths * self.masks > 1 << 32:
            raise ValueError("simulate: steps x paths x masks must stay below 2**32; take fewer")
        z = self._normal(paths, self.masks, 1 + self.copies, generator=generator).double()
        z[:, :, 0] = torch.arange(base, base + paths * self.masks, dtype=torch.float64).view(paths, self.masks)
        return z

    def _values(self, theta: Tensor, z: Tensor) -> Tensor:
        draws = z[:, 0].to(torch.int64)
        values: Tensor = vmap(self.risk.under_draw, in_dims=(None, 0))(theta, draws)
        return values

    def mean(self, theta: Tensor, z: Tensor) -> Tensor:
        """The mean over the masks."""
        return self._values(theta, z).sum(1).mean()

    def potential(self, theta: Tensor, z: Tensor) -> Tensor:
        """Σ_j c_j R(θ, η_j), c_j = (z_j − z̄)/√(N−1)."""
        normal = z[:, 1:].to(theta.dtype)
        c = (normal - normal.mean(0)) / math.sqrt(self.masks - 1)
        return (c * self._values(theta, z)).sum()


class LowRank(Noise):
    """The leading ``rank`` principal components of another noise's centred gradients: Σ_l s_l v_l z_l."""

    def __init__(self, base: Enumerated | Sampled, rank: int) -> None:
        super().__init__(base.risk)
        self.base, self.rank, self.exact, self.masks = base, rank, base.exact, base.masks

    def draw(self, paths: int, generator: torch.Generator, step: int) -> Tensor:
        """Those of the base, of which the first ``rank`` normal numbers are used anew."""
        return self.base.draw(paths, generator, step)

    def mean(self, theta: Tensor, z: Tensor) -> Tensor:
        """That of the base."""
        return self.base.mean(theta, z)

    def potential(self, theta: Tensor, z: Tensor) -> Tensor:
        """Not a gradient: see :meth:`sample`."""
        raise NotImplementedError

    def sample(self, theta: Tensor, z: Tensor) -> Tensor:
        """The noise itself, from the singular vectors of the gradients (masks, dim)."""
        base = self.base
        if isinstance(base, Enumerated):
            of_mask = grad(lambda t, kept: base.risk.under_mask(t, kept).sum())
            gradients, weights, normal = vmap(of_mask, in_dims=(None, 0))(theta, base.bits), base.weights, z[:, 0]
        else:
            of_draw = grad(lambda t, draw: base.risk.under_draw(t, draw).sum())
            gradients = vmap(of_draw, in_dims=(None, 0))(theta, z[:, 0].to(torch.int64))
            weights, normal = torch.full_like(gradients[:, 0], 1.0 / base.masks), z[:, 1].to(theta.dtype)
        scale = 1.0 if isinstance(base, Enumerated) else math.sqrt(base.masks / (base.masks - 1))
        centred = scale * weights.sqrt()[:, None] * (gradients - weights @ gradients)
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        noise: Tensor = (normal[: self.rank] * s[: self.rank]) @ vh[: self.rank]
        return noise
