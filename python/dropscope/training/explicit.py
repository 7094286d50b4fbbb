"""The explicit effect of dropout as a penalty, without dropout in the pass (arXiv:2002.12915)."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dropscope.masks import MaskKey
from dropscope.training.likelihood import Likelihood, labels_seed, likelihood, uniform
from dropscope.training.sites import Site, Sites, checked

Curvature = Literal["sampled", "exact", "jacobian", "identity"]


def explicit_penalty(
    sites: Sites,
    loss: Any,
    output: Any,
    target: Any,
    *,
    key: MaskKey,
    curvature: Curvature = "sampled",
    coefficient: float | None = None,
) -> Tensor:
    """What dropout adds to the loss in the mean, to second order: R ≈ E_η ℓ(F(x, η)) − ℓ(F(x)) (arXiv:2002.12915, §4).

    R = Σᵢ cᵢ ⟨Jᵢᵀ H Jᵢ, diag(zᵢ²)⟩,  cᵢ = q/(2(1−q)) of site i, 1 − q its keep probability T/65536, zᵢ what it masks,
    Jᵢ = ∂F/∂zᵢ and H = ∂²ℓ/∂F² for the output F: the Gauss–Newton part of the second-order term, never negative, and
    exact for squared loss and dropout before a linear read-out. What is neglected is small where single units matter
    little, that is in wide networks, whatever q.

    Args:
        sites: of the pass that gave ``output``, from :func:`dropout_sites`.
        loss: cross entropy, squared error or binary cross entropy on logits, as torch's module or function (its
            reduction, weights and ignored labels are heeded), or ``losses.causal_lm()``, ``losses.masked_lm()``.
        output: F: the model's output, or the tensor that the loss was given, tokens flattened or not.
        target: as the loss takes it.
        key: seed and draw of the labels sampled; a fresh draw for each step.
        curvature: how H enters.
            ``"sampled"``: H = E v vᵀ with one v for every element t: from a label ŷₜ drawn from the model's own
            prediction, so that R is unbiased at the price of one backward pass and what it adds to the next one:
            R̂ = Σᵢ (cᵢ/W) ‖zᵢ ∘ ∂(Σₜ log p̂_ŷₜ)/∂zᵢ‖². As in the paper, its gradient holds the probabilities of the
            sampled labels fixed.
            ``"exact"``: the sum over all classes (or outputs), a pass for each; for elements that share no unit.
            ``"jacobian"``: H replaced by ∇ℓ ∇ℓᵀ at the true labels. ``"identity"``: H replaced by 1/C for C outputs.
        coefficient: one number to take for every cᵢ, as a tuned strength is.

    Returns:
        R, a scalar of the dtype of the output, differentiable once more.

    Raises:
        TypeError: a loss, output, target or key of another kind.
        ValueError: no dropout call was met, or an option is unknown.

    Example:
        >>> import torch.nn as nn
        >>> from dropscope.training import dropout_sites
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        >>> with dropout_sites(torch.arange(4), model=net) as sites:
        ...     output = net(x)
        >>> loss = nn.functional.cross_entropy(output, y)
        >>> loss = loss + explicit_penalty(sites, nn.CrossEntropyLoss(), output, y, key=MaskKey(0, 1))
        >>> loss.backward()
    """
    checked("explicit_penalty", sites, key)
    if curvature not in get_args(Curvature):
        raise ValueError(f"explicit_penalty: curvature must be one of {get_args(Curvature)}, got {curvature!r}")
    form = likelihood("explicit_penalty", loss, output, target)
    if curvature == "exact":
        return _exact(sites, form, coefficient)
    if curvature == "jacobian":
        score = form.losses()
    elif curvature == "identity":
        score = _identity(form, output, key)
    else:
        score = form.sampled(labels_seed(key), key.draw)
    return squares(sites.gradients(score.sum()), coefficient) / form.total


def squares(slopes: list[tuple[Site, Tensor]], coefficient: float | None) -> Tensor:
    """Σᵢ cᵢ ‖zᵢ ∘ ∂S/∂zᵢ‖²."""
    terms = [
        (site.variance / 2.0 if coefficient is None else coefficient) * (site.units * slope).square().sum()
        for site, slope in slopes
    ]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())


def _exact(sites: Sites, form: Likelihood, coefficient: float | None) -> Tensor:
    """Σ over the columns of H's root; every element of the output must be a sample of its own."""
    if form.shape[0] != len(sites.samples) or any(site.shared for site in sites):
        raise ValueError(
            "explicit_penalty: curvature 'exact' must have one element a sample and no dropout on weights; "
            "take 'sampled'"
        )
    penalty: Tensor | None = None
    for score, factor in form.columns():
        if score.dim() > 1:
            raise ValueError(f"explicit_penalty: curvature 'exact' must have one element a sample, got {score.shape}")
        for site, slope in sites.gradients(score.sum()):
            rows = (site.units * slope).movedim(site.dim, 0).reshape(len(score), -1)
            c = site.variance / 2.0 if coefficient is None else coefficient
            term = c * (factor * rows.square().sum(1)).sum()
            penalty = term if penalty is None else penalty + term
    assert penalty is not None
    return penalty / form.total


def _identity(form: Likelihood, output: Any, key: MaskKey) -> Tensor:
    F = output if isinstance(output, Tensor) else output.logits
    classes = F.numel() / form.shape.numel()
    u = uniform(F.numel(), labels_seed(key), key.draw, F).view(F.shape)
    return torch.where(u < 0.5, 1.0, -1.0).to(F.dtype) * F / math.sqrt(classes)
