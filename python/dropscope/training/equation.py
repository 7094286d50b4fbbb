"""One step of a modified equation, or of dropout's own descent, for one path."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.func import grad, jvp

from dropscope.training.diffusion import Enumerated, LowRank, Noise, Sampled, Walsh
from dropscope.training.flat_risk import FlatRisk

Scheme = Literal["rk4", "euler"]
Root = Literal["auto", "exact", "enumerated", "sampled"]


def directional(fn: Callable[[Tensor], Tensor], point: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """fn and its derivative along a direction, in forward mode."""
    with warnings.catch_warnings():
        # The first dual number of a process makes torch compile rules with its own, deprecated, compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        value, moved = jvp(fn, (point,), (along,))[:2]
    return value, moved


def slope(fn: Callable[..., Tensor], theta: Tensor, *rest: Any) -> Tensor:
    """∇fn with respect to its first argument."""
    gradient: Tensor = grad(fn)(theta, *rest)
    return gradient


def choose_noise(risk: FlatRisk, kind: Root, masks: int, rank: int | None, order: int) -> Noise:
    """The root of Σ asked for, or the first that applies: exact, enumerated, sampled."""
    if kind not in ("auto", "exact", "enumerated", "sampled"):
        raise ValueError(f"simulate: noise must be 'auto', 'exact', 'enumerated' or 'sampled', got {kind!r}")
    if not risk.sites:
        raise ValueError("simulate: the network must have an active dropout, got none")
    if kind == "exact" and rank is not None:
        raise ValueError("simulate: rank must be None with exact noise, which has no masks to take components of")
    base: Noise | None = None
    if kind in ("auto", "exact") and rank is None:
        try:
            base = Walsh(risk)
        except ValueError:
            if kind == "exact":
                raise
    few = sum(units for units, _ in risk.sites) <= Enumerated.LIMIT
    if base is None and (kind == "enumerated" or (kind == "auto" and few)):
        base = Enumerated(risk)
    if base is None:
        least = 2 if order == 1 else 4
        if isinstance(masks, bool) or not isinstance(masks, int) or masks < least:
            raise ValueError(f"simulate: masks must be an int >= {least}, got {masks!r}")
        base = Sampled(risk, masks)
    if rank is None:
        return base
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"simulate: rank must be an int >= 1, got {rank!r}")
    assert isinstance(base, (Enumerated, Sampled))
    return LowRank(base, rank)


class Equation:
    """One step of Euler–Maruyama for one path."""

    def __init__(self, noise: Noise, epsilon: float, h: float, order: int, scheme: Scheme) -> None:
        self.noise, self.epsilon, self.h, self.order, self.scheme = noise, epsilon, h, order, scheme
        own = h / (epsilon * noise.masks) if noise.masks else 0.0  # the share of the noise that a sampled mean brings
        self.scale = math.sqrt(epsilon * h * max(0.0, 1.0 - own))

    def drift(self, theta: Tensor, z: Tensor) -> Tensor:
        """−∇L, or −∇L − (ε/2)∇²L∇L, the product by one forward derivative of the gradient."""
        if self.order == 1:
            return -slope(self.noise.mean, theta, z)
        mean = self.noise.mean
        if self.noise.exact:
            g = slope(mean, theta, z)
            return -g - 0.5 * self.epsilon * directional(lambda t: slope(mean, t, z), theta, g)[1]
        # The product of two estimates is unbiased when they come from different masks.
        half = z.shape[0] // 2
        first = slope(mean, theta, z[:half])
        other, bent = directional(lambda t: slope(mean, t, z[half:]), theta, first)
        share = half / z.shape[0]
        return -share * first - (1.0 - share) * other - 0.5 * self.epsilon * bent

    def noiseless(self, theta: Tensor, z: Tensor) -> Tensor:
        """Φ_h(θ)."""
        h = self.h

        def b(t: Tensor) -> Tensor:
            return self.drift(t, z)

        k1 = b(theta)
        if self.scheme == "euler":
            return theta + h * k1
        k2 = b(theta + 0.5 * h * k1)
        k3 = b(theta + 0.5 * h * k2)
        return theta + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + b(theta + h * k3))

    def __call__(self, theta: Tensor, z: Tensor) -> Tensor:
        """Φ_h(θ) + √(εh) Σ^½ z."""
        if isinstance(self.noise, LowRank):
            return self.noiseless(theta, z) + self.scale * self.noise.sample(theta, z)
        return self.noiseless(theta, z) + self.scale * slope(self.noise.potential, theta, z)


class Descent:
    """One step of gradient descent with dropout for one path."""

    def __init__(self, risk: FlatRisk, mean: Noise | None, epsilon: float) -> None:
        self.risk, self.mean, self.h = risk, mean, epsilon

    def noiseless(self, theta: Tensor, z: Tensor) -> Tensor:
        """θ − ε∇L."""
        assert self.mean is not None
        return theta - self.h * slope(self.mean.mean, theta, z)

    def __call__(self, theta: Tensor, draw: Tensor) -> Tensor:
        """θ − ε∇R^drop under a draw of the masks."""
        return theta - self.h * slope(lambda t: self.risk.under_draw(t, draw).sum(), theta)
