"""Condensation: how few directions the neurons of a layer point in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dropscope.analyses.saving import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Condensation(Result):
    """Orientations and amplitudes of a layer's neurons (the filters of a convolution).

    Attributes:
        directions: θ_j/‖θ_j‖ with θ_j = (w_j, b_j), float64 (m, inputs [+ 1]).
        amplitudes: A_j = ‖a_j‖‖θ_j‖ divided by the largest, float64 (m,); a_j the weights that read neuron j.
        active: A_j > floor, bool (m,).
        groups: index of the direction that covers neuron j, strongest cover first, −1 where it is not active.
        cosines: between active neurons, float64 (active, active).
        threshold: neurons are parallel when their cosine exceeds it; opposite directions count as two.
        floor: least amplitude, as a share of the largest, of a neuron that counts.
    """

    directions: Tensor
    amplitudes: Tensor
    active: Tensor
    groups: Tensor
    cosines: Tensor
    threshold: float
    floor: float

    @property
    def orientations(self) -> int:
        """How many directions cover all active neurons (a greedy cover)."""
        return int(self.groups.max()) + 1

    @property
    def effective_ratio(self) -> float:
        """Orientations divided by the number of active neurons."""
        return self.orientations / int(self.active.sum())

    @property
    def weighted_orientations(self) -> float:
        """(Σ_g A_g)² / Σ_g A_g² over the orientations g, A_g the sum of their neurons' amplitudes.

        It equals the number of orientations when all are equally strong, and counts weak ones for little.
        """
        strength = torch.zeros(self.orientations, dtype=torch.float64)
        strength.index_add_(0, self.groups[self.active], self.amplitudes[self.active])
        return float(strength.sum() ** 2 / strength.square().sum())

    @property
    def angles(self) -> Tensor | None:
        """The angle of (w, b) in [−π, π] when it has two components, else None."""
        if self.directions.shape[1] != 2:
            return None
        return torch.atan2(self.directions[:, 1], self.directions[:, 0])

    @property
    def leading_cosine(self) -> Tensor:
        """The cosine of every neuron with the one of largest amplitude, (m,)."""
        cosine: Tensor = self.directions @ self.directions[self.amplitudes.argmax()]
        return cosine

    def plot(self) -> Figure:
        """Return a figure: amplitude against orientation, and the matrix of cosines."""
        from dropscope import plots_losses

        return plots_losses.condensation(self)

    def __repr__(self) -> str:
        active = int(self.active.sum())
        return f"Condensation({self.orientations} orientations of {active} neurons, {len(self.active)} in the layer)"


def condensation(
    model: nn.Module,
    layer: str | nn.Module,
    readout: str | nn.Module | None = None,
    *,
    threshold: float = 0.95,
    floor: float = 0.05,
) -> Condensation:
    """Count the directions that the neurons of a layer point in (arXiv:2207.05952, §VI).

    Neurons i and j are parallel when cos(θ_i, θ_j) > threshold. The effective ratio is the least number of directions
    that cover all neurons, here found greedily, divided by their number. In few dimensions any set of neurons is
    covered by few cones (13 of them for a thousand random ones in the plane), so only neurons are counted whose
    amplitude exceeds ``floor`` times the largest; ``floor=0`` is the paper's ratio.

    Args:
        model: holds the layer.
        layer: a linear layer or convolution, or its name; its bias belongs to the neuron.
        readout: the layer that reads the neurons, linear or convolution, whose weights enter the amplitude; without
            it the amplitude is ‖θ_j‖.
        threshold: in (0, 1).
        floor: in [0, 1).

    Raises:
        TypeError: if model is no module or a layer is of another kind.
        ValueError: if a name is unknown, the readout does not fit, every weight is 0 or not finite, or a number is out
            of range.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
        >>> condensation(net, "0", "2").orientations > 1
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"condensation: model must be a torch.nn.Module, got {type(model).__name__}")
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"condensation: threshold must lie in (0, 1), got {threshold!r}")
    if not 0.0 <= floor < 1.0:
        raise ValueError(f"condensation: floor must lie in [0, 1), got {floor!r}")
    neurons, bias = _weights(model, layer, "layer")
    theta = neurons.flatten(1)
    if bias is not None:
        theta = torch.cat([theta, bias[:, None]], 1)
    norms = theta.norm(dim=1)
    amplitudes = norms.clone()
    if readout is not None:
        reading, _ = _weights(model, readout, "readout")
        m = len(theta)
        if reading.shape[1] % m:
            raise ValueError(f"condensation: readout must read the {m} neurons, got {reading.shape[1]} inputs")
        # Behind a flattened convolution every channel is read at several places.
        amplitudes *= reading.reshape(len(reading), m, -1).transpose(0, 1).flatten(1).norm(dim=1)
    largest = float(amplitudes.max())
    if not 0.0 < largest < float("inf"):
        raise ValueError(f"condensation: amplitudes must be finite and not all 0, got a largest of {largest}")
    amplitudes = amplitudes / largest
    active = (amplitudes > floor) & (norms > 0)
    directions = theta / norms.clamp_min(torch.finfo(theta.dtype).tiny)[:, None]
    counted = directions[active]
    cosines = (counted @ counted.T).clamp(-1.0, 1.0)
    groups = torch.full((len(theta),), -1, dtype=torch.int64)
    groups[active] = _greedy_cover(cosines > threshold)
    return Condensation(directions, amplitudes, active, groups, cosines, threshold, floor)


def _weights(model: nn.Module, layer: str | nn.Module, argument: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64 on the CPU."""
    if isinstance(layer, str):
        named = dict(model.named_modules())
        if layer not in named:
            raise ValueError(f"condensation: {argument} must name a module of the model, got {layer!r}")
        layer = named[layer]
    if not isinstance(layer, _LAYERS):
        raise TypeError(f"condensation: {argument} must be a linear layer or a convolution, got {type(layer).__name__}")
    bias = None if layer.bias is None else layer.bias.detach().double().cpu()
    return layer.weight.detach().double().cpu(), bias


def _greedy_cover(parallel: Tensor) -> Tensor:
    """For each neuron the number of the chosen neuron that covers it; each choice covers the most still uncovered."""
    covered_by = torch.full((len(parallel),), -1, dtype=torch.int64)
    left = torch.ones(len(parallel), dtype=torch.bool)
    left_matrix = parallel | torch.eye(len(parallel), dtype=torch.bool)  # rounding may deny a neuron its own cosine
    group = 0
    while bool(left.any()):
        gains = left_matrix[:, left].sum(1)
        chosen = left_matrix[int(gains.argmax())] & left
        covered_by[chosen] = group
        left &= ~chosen
        group += 1
    return covered_by
