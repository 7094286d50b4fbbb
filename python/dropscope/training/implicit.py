"""The implicit effect of dropout as gradient noise, alone or beside the explicit penalty (arXiv:2002.12915)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dropscope.masks import MaskKey
from dropscope.training.explicit import squares
from dropscope.training.likelihood import labels_seed, likelihood
from dropscope.training.sites import Site, Sites, checked


def implicit_noise(sites: Sites, loss: Tensor, *, key: MaskKey, k: int | None = None) -> Tensor:
    """A scalar of mean zero whose gradient is the noise of dropout to first order (arXiv:2002.12915, §4).

    ξ = Σᵢ √(q/(1−q)) ⟨∂ℓ/∂zᵢ, sᵢ ∘ zᵢ⟩ with independent signs ±1, drawn by ``key``, for every unit zᵢⱼ of every site i.
    Its gradient has the covariance Σᵢ q/(1−q) Σⱼ ∇(zᵢⱼ ∂ℓ/∂zᵢⱼ) ∇(zᵢⱼ ∂ℓ/∂zᵢⱼ)ᵀ.

    Args:
        sites: of the pass that gave ``loss``, from :func:`dropout_sites`.
        loss: the scalar that is trained.
        key: seed and draw of the signs; a fresh draw for each step.
        k: to be added to the mean over k masks of :class:`DropoutK`: multiplies by √(1 − 1/k), so that the covariance
            is that of one mask.

    Returns:
        ξ, a scalar, differentiable once more.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no dropout call was met, loss is no scalar, or k < 1.
    """
    checked("implicit_noise", sites, key)
    if not isinstance(loss, Tensor):
        raise TypeError(f"implicit_noise: loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"implicit_noise: loss must be a scalar, got shape {tuple(loss.shape)}")
    return _noise_scale("implicit_noise", k) * _signed(sites, sites.gradients(loss), key)


def explicit_and_implicit(
    sites: Sites,
    loss: Any,
    output: Any,
    target: Any,
    *,
    key: MaskKey,
    coefficient: float | None = None,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """R of :func:`explicit_penalty` (sampled) and ξ of :func:`implicit_noise` from one backward pass instead of two.

    Of every two neighbouring samples the key gives one to R, whose term is doubled, and the other to ξ, whose term is
    multiplied by √2. Over the key, R keeps its mean and ξ its mean zero and its covariance; R varies more. Where a site
    masks weights (DropConnect), whose gradients mix the samples, two passes are made after all, over all samples.

    Arguments, errors and references are those of the two functions.

    Returns:
        R and ξ.
    """
    checked("explicit_and_implicit", sites, key)
    form = likelihood("explicit_and_implicit", loss, output, target)
    scale = _noise_scale("explicit_and_implicit", k)
    if any(site.shared for site in sites) or len(sites.samples) < 2:
        penalty = squares(sites.gradients(form.sampled(labels_seed(key), key.draw).sum()), coefficient)
        noise = _signed(sites, sites.gradients(form.losses().sum()), key)
        return penalty / form.total, scale * noise / form.total
    first = sites.halves(key)
    mine = first[form.rows(sites)]
    score = form.either(mine, labels_seed(key), key.draw)
    return _parted(sites, score.sum(), first, key, coefficient, scale, form.total)


def _parted(
    sites: Sites, score: Tensor, first: Tensor, key: MaskKey, coefficient: float | None, scale: float, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Squares over the samples of ``first``, signed sums over the others."""
    penalty = noise = score.new_zeros(())
    for site, slope in sites.gradients(score):
        term = site.units * slope
        rows = term.movedim(site.dim, 0).reshape(len(first), -1) if site.dim else term.reshape(len(first), -1)
        chosen = first.to(rows.dtype).unsqueeze(1)
        factor = site.variance / 2.0 if coefficient is None else coefficient
        penalty = penalty + 2.0 * factor * (rows * chosen).square().sum()
        signs = sites.signed(site, torch.ones_like(term), key)
        signs = signs.movedim(site.dim, 0).reshape(rows.shape) if site.dim else signs.reshape(rows.shape)
        weight = signs * (math.sqrt(2.0 * site.variance) * (1.0 - chosen))
        noise = noise + (rows * weight).sum()
    return penalty / total, scale * noise / total


def _signed(sites: Sites, slopes: list[tuple[Site, Tensor]], key: MaskKey) -> Tensor:
    """Σᵢ √(q/(1−q)) ⟨∂S/∂zᵢ, sᵢ ∘ zᵢ⟩."""
    terms = [math.sqrt(site.variance) * (sites.signed(site, site.units, key) * slope).sum() for site, slope in slopes]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


def _noise_scale(name: str, k: int | None) -> float:
    if k is None:
        return 1.0
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{name}: k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"{name}: k must be at least 1, got {k}")
    return math.sqrt(1.0 - 1.0 / k)
