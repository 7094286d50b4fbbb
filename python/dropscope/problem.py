"""The problem: model, loss and data as an empirical risk and its per-sample parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dropscope import probes
from dropscope.data import Batch, Batches, all_finite, finite_sum
from dropscope.entry_points import direct_checkpoints
from dropscope.intercept import Handler, Interceptor
from dropscope.losses import Loss, SampleLoss
from dropscope.masks import MaskKey, Sharing, make_streams, replay_streams
from dropscope.modes import mode
from dropscope.parameters import Params, choose, with_tensors

__all__ = ["Batch", "Problem"]

T = TypeVar("T")


class Problem:
    """An empirical risk R(θ) = Σᵢ sᵢ(θ) / W, W = Σᵢ wᵢ, over every sample i of the data.

    Under mean reduction sᵢ sums the weighted losses of sample i's elements and wᵢ their weights, so R is the loss of
    the whole data set as one batch, however it is split. With ``scale`` = n/W, gᵢ = scale·∇sᵢ and ∇R = (1/n) Σᵢ gᵢ.

    A mask key, not ``model.training``, switches dropout on: without one the model runs in eval mode; under one in
    train mode, with normalisation layers that couple samples in eval mode. The model is left as it was found.
    Activation checkpoints are passed over, for they cannot be differentiated twice: to save memory, take smaller
    batches. Compiled callables run eagerly.

    Args:
        model: any module; dim ``batch_dim`` of its inputs is the sample.
        loss: a torch loss, or ``loss(output, target)`` with one value per sample, shape (batch,), or (values, weights).
        data: a tuple of tensors ``(X, y)``, a mapping of tensors, a Dataset, or a re-iterable loader of batches.
            A batch (x, y) is read as ``loss(model(x), y)``; a longer tuple as ``loss(model(*batch[:-1]), batch[-1])``;
            a mapping as ``loss(model(**inputs), batch)``, the inputs being all but ``"labels"``.
        params: what to differentiate: names, patterns such as ``"blocks.0.*"``, or parameters; default all trainable.
        batch_size: samples a batch for tensors and Datasets, default up to 1024 for tensors, 256 for Datasets.
        forward: ``forward(model, batch)`` instead of the above.
        batch_dim: the dimension of the sample.

    Attributes:
        params: name -> parameter, in the order of ``model.named_parameters()``, tied parameters once.
        blocks: name -> slice of the flat vector.
        dim: number of coordinates.
        dtype: dtype of the parameters.
        device: device of the parameters.
        sample: a few samples of the first batch, once :meth:`check` has run.
        shared: calls whose mask all samples of a pass share (DropConnect, LayerDrop), as met under masks so far.
        routes: name -> how its per-sample gradients are taken and why; filled by the first noise measurement.

    Raises:
        TypeError: if an argument is of the wrong kind, or a parameter is not of a floating dtype.
        ValueError: if no parameter is trainable, a name is unknown, or the data are empty, uneven or not finite.

    Example:
        >>> problem = Problem(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
        >>> problem.dim, problem.n
        (3, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        params: Params | None = None,
        batch_size: int | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        batch_dim: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Problem: model must be a torch.nn.Module, got {type(model).__name__}")
        if forward is not None and not callable(forward):
            raise TypeError(f"Problem: forward must be callable as forward(model, batch), got {forward!r}")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
            raise ValueError(f"Problem: batch_dim must be an int >= 0, got {batch_dim!r}")
        self.model, self.forward, self.batch_dim = model, forward, batch_dim
        self.params = choose(model, params)
        first = next(iter(self.params.values()))
        self.dtype, self.device = first.dtype, first.device
        self.blocks: dict[str, slice] = {}
        self.dim = 0
        for name, p in self.params.items():
            self.blocks[name] = slice(self.dim, self.dim + p.numel())
            self.dim += p.numel()
        self.loss = SampleLoss.of(loss, batch_dim, self.device)
        self.data = Batches(data, batch_size, batch_dim, self.device)
        self.routes: dict[str, str] = {}
        self.shared: set[str] = set()
        self._weight: float | None = None  # known once the probes have passed
        self._masks_probed = False
        self.curvature_checked = False  # by the first Hessian product that needs it
        self.sample: Batch

    def __repr__(self) -> str:
        n = "?" if self.data.n is None else self.data.n
        return f"Problem({type(self.model).__name__}, {self.loss.loss}, n={n}, dim={self.dim}, {self.dtype})"

    @property
    def n(self) -> int:
        """Number of samples; the data are read once if their number is not known."""
        if self.data.n is None:
            self.check()
        assert self.data.n is not None
        return self.data.n

    @property
    def total_weight(self) -> float:
        """W = Σᵢ wᵢ; 1 under sum reduction. The first use reads the data once."""
        self.check()
        assert self._weight is not None
        return self._weight

    @property
    def scale(self) -> float:
        """n/W: the gradient of sample i is gᵢ = scale·∇sᵢ."""
        return self.n / self.total_weight

    def batches(self, progress: bool = False, desc: str = "") -> Iterator[Batch]:
        """Yield the batches, the same at every pass.

        Args:
            progress: whether to show a progress bar.
            desc: what it is labelled with.

        Raises:
            ValueError: if a batch differs from the one that stood there before.
        """
        self.check()
        with tqdm(self.data, total=self.data.count, desc=desc, disable=not progress, leave=False) as bar:
            yield from bar

    def sample_losses(
        self,
        batch: Batch,
        masks: MaskKey | None = None,
        draws: int = 1,
        *,
        sharing: Sharing = "sample",
        handlers: Mapping[Callable[..., Any], Handler] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the values sᵢ, graph attached, and the weights wᵢ of a batch.

        Args:
            batch: one of :meth:`batches`.
            masks: the draw of every mask; None switches dropout off.
            draws: number of draws, ``masks.draw``, ``masks.draw + 1``, ...
            sharing: ``"sample"`` for a mask per sample, ``"batch"`` for one that all samples share.
            handlers: torch function -> what is called in its place; see :mod:`dropscope.intercept`.

        Returns:
            Two vectors of shape (batch.size·draws,), row i·draws + m being draw m of sample i.
        """
        self._ready("sample_losses", masks)
        return self.raw_losses(batch, masks, draws, sharing=sharing, handlers=handlers)

    def raw_losses(
        self,
        batch: Batch,
        masks: MaskKey | None = None,
        draws: int = 1,
        *,
        sharing: Sharing = "sample",
        handlers: Mapping[Callable[..., Any], Handler] | None = None,
        train: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`sample_losses` without the probes, which are made of it; ``train`` as in :meth:`raw_outputs`."""
        return self.losses_of(*self.raw_outputs(batch, masks, draws, sharing=sharing, handlers=handlers, train=train))

    def raw_outputs(
        self,
        batch: Batch,
        masks: MaskKey | None = None,
        draws: int = 1,
        *,
        sharing: Sharing = "sample",
        handlers: Mapping[Callable[..., Any], Handler] | None = None,
        train: bool = False,
    ) -> tuple[Any, Any, int]:
        """Return the model's output, what the loss compares it with, and the number of rows.

        ``train`` calls dropout although there are no masks, for handlers that answer every such call.
        """
        if draws != 1 and masks is None:
            raise ValueError(f"sample_losses: draws must be 1 when masks is None, got {draws}")
        rows = batch.repeat(draws)
        with ExitStack() as stack:
            stack.enter_context(mode(self.model, train=train or masks is not None))
            stack.enter_context(direct_checkpoints())
            if masks is not None:
                draw = torch.arange(masks.draw, masks.draw + draws, device=self.device).repeat(batch.size)
                replay = replay_streams(
                    masks.seed,
                    make_streams(draw, rows.samples),
                    model=self.model,
                    sharing=sharing,
                    batch_dim=self.batch_dim,
                    handlers=handlers,
                )
                interceptor = stack.enter_context(replay)
                stack.callback(lambda: self.shared.update(interceptor.shared))
            elif handlers:
                stack.enter_context(Interceptor(handlers, self.model))
            return *self._call(rows.content), rows.size

    def losses_of(self, output: Any, target: Any, rows: int) -> tuple[Tensor, Tensor]:
        """Return values and weights of outputs, as :meth:`sample_losses` does."""
        with direct_checkpoints():
            values, weights = self.loss(output, target, rows)
        if self.loss.reduction == "sum":
            weights = weights / (self.data.n or 1)
        return values, weights

    def _call(self, content: Any) -> tuple[Any, Any]:
        """The model's output and what the loss compares it with."""
        target = content[-1] if isinstance(content, tuple) else content
        if self.forward is not None:
            return self.forward(self.model, content), target
        if isinstance(content, Mapping):
            return self.model(**{key: value for key, value in content.items() if key != "labels"}), target
        if isinstance(content, tuple) and len(content) > 1:
            return self.model(*content[:-1]), target
        seen = f"a tuple of {len(content)}" if isinstance(content, tuple) else type(content).__name__
        raise TypeError(f"Problem: a batch must be (x, y), a longer tuple or a mapping, got {seen}; give forward=")

    def risk(self, masks: MaskKey | None = None) -> float:
        """Return R(θ), summed in float64; under one draw of the masks if given.

        Raises:
            ValueError: if a loss is not finite.
        """
        self._ready("risk", masks)
        total = 0.0
        with torch.no_grad():
            for batch in self.batches():
                total += finite_sum(self.raw_losses(batch, masks)[0], batch)
        return total / self.total_weight

    @torch.inference_mode(False)
    def gradient(self, masks: MaskKey | None = None, draws: int = 1, sharing: Sharing = "sample") -> Tensor:
        """Return ∇R, shape (dim,), or its mean over ``draws`` draws of the masks.

        Raises:
            ValueError: if a loss or the gradient of a parameter is not finite, or draws < 1.
        """
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"gradient: draws must be an int >= 1, got {draws!r}")
        self._ready("gradient", masks)
        half = self.dtype in (torch.float16, torch.bfloat16)
        total = torch.zeros(self.dim, dtype=torch.float32 if half else self.dtype, device=self.device)
        weight = self.total_weight * draws
        for batch in self.batches():
            for draw in range(draws):
                key = None if masks is None else MaskKey(masks.seed, masks.draw + draw)
                total += self._batch_gradient(batch, key, sharing, weight).to(total.dtype)
        return total.to(self.dtype)

    def _batch_gradient(self, batch: Batch, key: MaskKey | None, sharing: Sharing, weight: float) -> Tensor:
        with torch.enable_grad():
            values, _ = self.raw_losses(batch, key, sharing=sharing)
            finite_sum(values, batch)
            parameters = list(self.params.values())
            grads = torch.autograd.grad(values.sum() / weight, parameters, materialize_grads=True)
        flat = self.flatten(grads).detach()  # older torch gives zeros in place of no gradient a graph
        self.require_finite(flat, batch)
        return flat

    def require_finite(self, gradient: Tensor, batch: Batch) -> None:
        """Raise ValueError naming batch and parameter if a flat gradient holds NaN or Inf."""
        if not all_finite(gradient):
            name = next(name for name, part in self.blocks.items() if not torch.isfinite(gradient[part]).all())
            raise ValueError(f"Problem: gradients must be finite, got NaN or Inf in {name!r} at batch {batch.index}")

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Return one vector, shape (dim,), of a tensor per parameter, in the order of :attr:`params`.

        Raises:
            ValueError: if a tensor is missing or its shape is not the parameter's.
        """
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.params):
                raise ValueError(f"flatten: names must be {list(self.params)}, got {list(tensors)}")
            tensors = [tensors[name] for name in self.params]
        if len(tensors) != len(self.params):
            raise ValueError(f"flatten: tensors must be {len(self.params)}, one per parameter, got {len(tensors)}")
        for (name, p), t in zip(self.params.items(), tensors, strict=True):
            if t.shape != p.shape:
                raise ValueError(f"flatten: {name} must have shape {tuple(p.shape)}, got {tuple(t.shape)}")
        return torch.cat([t.reshape(-1) for t in tensors])

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat vector by parameter name, as views.

        Raises:
            TypeError: if v is no tensor.
            ValueError: if v is not of shape (dim,).
        """
        if not isinstance(v, Tensor):
            raise TypeError(f"unflatten: v must be a torch.Tensor, got {type(v).__name__}")
        if v.shape != (self.dim,):
            raise ValueError(f"unflatten: v must have shape ({self.dim},), got {tuple(v.shape)}")
        return {name: v[part].view(self.params[name].shape) for name, part in self.blocks.items()}

    @contextmanager
    def displaced(self, delta: Tensor) -> Iterator[None]:
        """Within the context the parameters are θ + delta; then the very tensors of before are put back.

        Args:
            delta: flat displacement, shape (dim,).

        Raises:
            ValueError: if delta is not of shape (dim,), or not finite.
        """
        parts = self.unflatten(delta.detach())
        if not all_finite(delta.detach()):
            raise ValueError("displaced: delta must be finite, got NaN or Inf")
        before = {name: p.data for name, p in self.params.items()}
        try:
            for name, p in self.params.items():
                p.data = before[name] + parts[name].to(before[name])
            yield
        finally:
            for name, p in self.params.items():
                p.data = before[name]

    def substituted(self, tensors: Mapping[str, Tensor], fn: Callable[[], T]) -> T:
        """Call ``fn`` with tensors in place of the parameters: dual numbers, or a differentiable function of others.

        Args:
            tensors: parameter name -> tensor of its shape.
            fn: what to compute, e.g. ``lambda: problem.sample_losses(batch)``.

        Returns:
            What ``fn`` returns.
        """
        return with_tensors(self.model, tensors, fn)

    def check(self, masks: bool = False) -> None:
        """Run the probes on a few samples, then read the data once for n and W; nothing the second time.

        Args:
            masks: whether to probe also what a mask key needs.

        Raises:
            ValueError: if the model and the data do not make one risk; the message says what failed and what it means.
        """
        if self._weight is None or (masks and not self._masks_probed):  # else this costs a product nothing
            self._check(masks)

    def _ready(self, function: str, masks: MaskKey | None) -> None:
        if masks is not None and not isinstance(masks, MaskKey):
            raise TypeError(f"{function}: masks must be a MaskKey or None, got {type(masks).__name__}")
        self.check(masks is not None)

    @torch.inference_mode(False)
    def _check(self, masks: bool) -> None:
        if self._weight is None:
            self.sample = next(iter(self.data)).select(slice(0, probes.SAMPLES))
            probes.run(self, self.sample, masks=False)
            self._weight = 1.0 if self.loss.reduction == "sum" else self._sum_weights()
        if masks and not self._masks_probed:
            probes.run(self, self.sample, masks=True)
            self._masks_probed = True

    def _sum_weights(self) -> float:
        weight = 0.0
        with torch.no_grad():
            for batch in self.data:
                values, weights = self.raw_losses(batch)
                finite_sum(values, batch)
                weight += float(weights.double().sum())
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"Problem: the total weight must be positive, got {weight}: is every target ignored?")
        return weight

    def plan(self) -> str:
        """Return which route each parameter's per-sample gradients take and why, one line a parameter."""
        width = max(len(name) for name in self.params)
        return "\n".join(
            f"{name:<{width}}  {tuple(p.shape)!s:<16}  {self.routes.get(name, 'not measured yet')}"
            for name, p in self.params.items()
        )
