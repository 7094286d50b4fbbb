"""Dropout_k: the mean loss under k masks a step, whose noise has 1/k of dropout's covariance (arXiv:2002.12915)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dropscope.masks import MaskKey, make_streams, replay_streams
from dropscope.training.sites import derived


class DropoutK:
    """The loss (1/k) Σⱼ ℓ(F(x, ηⱼ)) under k independent masks (arXiv:2002.12915, algorithm 1).

    Its mean over masks is that of dropout, the covariance of its gradient 1/k of it; k = 1 is dropout. What the model
    computes up to its first dropout call does not depend on the mask: it is computed and differentiated once and
    shared by the k passes. With ``reinject`` two further masks put the missing noise back (the paper's Fig. 2):
    √((1 − 1/k)/2)·(ℓ(η′) − ℓ(η″)) is added, and the covariance is that of dropout again, whatever k.

    Args:
        model: names the dropout calls; its masks are drawn by keys, and torch's generator is left alone.
        k: masks a step.
        reinject: whether to add the noise of two more masks.
        batch_dim: the dimension of the model's tensors that holds the samples.

    Raises:
        TypeError, ValueError: model is no module, or k no integer ≥ 1.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> dropout_4, x, y = DropoutK(net, 4), torch.ones(6, 2), torch.zeros(6, dtype=torch.long)
        >>> for step in range(3):
        ...     loss = dropout_4(lambda: nn.functional.cross_entropy(net(x), y), torch.arange(6), key=MaskKey(0, step))
        ...     loss.backward()
    """

    def __init__(self, model: nn.Module, k: int, *, reinject: bool = False, batch_dim: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"DropoutK: model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"DropoutK: k must be an integer, got {k!r}")
        if k < 1:
            raise ValueError(f"DropoutK: k must be at least 1, got {k}")
        self.model, self.k, self.reinject, self.batch_dim = model, k, reinject, batch_dim

    def __repr__(self) -> str:
        return f"DropoutK({type(self.model).__name__}, k={self.k}{', reinject=True' if self.reinject else ''})"

    def __call__(self, loss: Callable[[], Tensor], samples: Tensor, *, key: MaskKey) -> Tensor:
        """The step's loss.

        Args:
            loss: runs the model on the step's batch and returns the scalar loss; called once for every mask, so it must
                do the same at every call.
            samples: integer ids (B,) of the samples in the batch.
            key: seed and draw of the step; mask 0 is that of ``replay_dropout(key, samples, model=model)``.

        Returns:
            A scalar to call ``backward()`` on.

        Raises:
            TypeError, ValueError: arguments of another kind, or a random call that cannot be replayed.
        """
        if not isinstance(key, MaskKey):
            raise TypeError(f"DropoutK: key must be a MaskKey, got {type(key).__name__}")
        weights = [1.0 / self.k] * self.k
        if self.reinject:
            spread = math.sqrt((1.0 - 1.0 / self.k) / 2.0)
            weights += [spread, -spread]
        streams, prefix = make_streams(key.draw, samples), _Prefix()
        terms = []
        for j, weight in enumerate(weights):
            seed = derived(key.seed, f"mask {j}") if j else key.seed
            with replay_streams(seed, streams, model=self.model, batch_dim=self.batch_dim) as mode:
                with prefix.pass_over(mode):
                    value = loss()
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"DropoutK: loss must return a scalar tensor, got {value!r}")
            terms.append(weight * value)
        return torch.stack(terms).sum()


class _Prefix(TorchFunctionMode):
    """Remembers the results of torch calls before the first dropout call of a pass, and gives them again in the next.

    A result is given again only to the same function with the same arguments: the same tensors, which nothing has
    changed since. At the first call that differs, that changes its argument or that drops, the rest is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, tuple[int, ...], Any, tuple[int, ...]]] = []
        self._learning = True
        self._at: int | None = None
        self._mode: Any = None

    def pass_over(self, mode: Any) -> _Prefix:
        """Enter one pass under an interceptor that counts dropout calls."""
        self._mode, self._at = mode, 0
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._learning, self._at = False, None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._at is None:
            return func(*args, **kwargs)
        given = (*args, *kwargs.items())
        if not self._learning:
            if self._at < len(self._calls):
                known, before, versions, result, after = self._calls[self._at]
                same = known is func and len(before) == len(given) and all(map(_same, before, given))
                if same and versions == _versions(given) and after == _versions((result,)):
                    self._at += 1
                    return result
            self._at = None
            return func(*args, **kwargs)
        versions, sites = _versions(given), len(self._mode.sites)
        result = func(*args, **kwargs)
        if len(self._mode.sites) != sites or versions != _versions(given):
            self._at = None
        else:
            self._calls.append((func, given, versions, result, _versions((result,))))
        return result


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, (bool, int, float, str, torch.dtype, torch.device, slice)) and a == b)


def _versions(values: Any) -> tuple[int, ...]:
    found: list[int] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value._version)
        elif isinstance(value, (tuple, list)):
            found.extend(_versions(value))
    return tuple(found)
