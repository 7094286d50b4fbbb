"""Data as a fixed sequence of batches: the same samples, in the same order, at every pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler
from torch.utils.data import WeightedRandomSampler as _Weighted

DEFAULT_BATCH = 256  # of a Dataset
MAX_SAMPLES = 2**32 - 1  # the largest sample id is 2³²−2; 2³²−1 names the mask that a batch shares
_HASHED = 1 << 14  # elements of a tensor that enter its fingerprint


@dataclass(frozen=True)
class Batch:
    """A batch and the ids of its samples.

    Attributes:
        index: position of the batch in a pass.
        samples: int64 ids, shape (size,): the samples' positions in the data set.
        content: tuple or mapping of tensors, as the loader gave it, on the model's device.
        batch_dim: the dimension of the sample.
    """

    index: int
    samples: Tensor
    content: Any
    batch_dim: int = 0

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.samples)

    @property
    def elements(self) -> int:
        """Number of elements of its tensors, the measure of its size."""
        return sum(t.numel() for t in _tensors(self.content))

    def repeat(self, draws: int) -> Batch:
        """Return the batch with every sample ``draws`` times in a row: row i·draws + m is draw m of sample i."""
        if draws == 1:
            return self
        size, dim = self.size, self.batch_dim
        content = _map(self.content, lambda t: _along(t, size, dim, lambda t, d: t.repeat_interleave(draws, d)))
        return replace(self, samples=self.samples.repeat_interleave(draws), content=content)

    def select(self, rows: slice | Tensor) -> Batch:
        """Return the batch of some of the rows, a slice or an index tensor."""
        size, dim = self.size, self.batch_dim
        if isinstance(rows, Tensor):
            content = _map(self.content, lambda t: _along(t, size, dim, lambda t, d: t.index_select(d, rows)))
            return replace(self, samples=self.samples[rows], content=content)
        start, stop, _ = rows.indices(size)
        content = _map(self.content, _cut(size, dim, start, stop - start))
        return replace(self, samples=self.samples[rows], content=content)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with ``fn`` of each of its tensors."""
        return replace(self, content=_map(self.content, fn))

    def take(self, rows: Tensor) -> Batch:
        """Return the batch of the rows with these indices."""
        size, dim = self.size, self.batch_dim
        content = _map(self.content, lambda t: _along(t, size, dim, lambda t, d: t.index_select(d, rows.to(t.device))))
        return replace(self, samples=self.samples[rows.to(self.samples.device)], content=content)


class Batches:
    """The data of a problem: iterable again and again, checked to be the same each time.

    Args:
        data: a tuple of tensors, a mapping of tensors, a Dataset, or a re-iterable loader of batches.
        batch_size: samples a batch, for tensors and Datasets.
        batch_dim: the dimension of the sample.
        device: where batches are moved.

    Raises:
        TypeError: if data cannot be iterated more than once, or is of another kind.
        ValueError: if it is empty, its lengths differ, it is not finite, or its loader shuffles or drops samples.
    """

    def __init__(self, data: Any, batch_size: int | None, batch_dim: int, device: torch.device) -> None:
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ValueError(f"Problem: batch_size must be a positive int, got {batch_size!r}")
        self.batch_dim, self.device = batch_dim, device
        self._marks: list[str] = []  # fingerprints of the first complete pass
        self._passes = 0
        self.n: int | None = None  # known for tensors at once, else after the first pass
        self._tensors: Any = None
        if isinstance(data, Tensor) or _is_tensors(data):
            self._tensors = tuple(data) if isinstance(data, list) else data
            self.n = self._check_tensors(data)
            self.step = batch_size or _step(data, self.n)
        else:
            self._loader = _loader(data, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass.

        Raises:
            ValueError: if a batch is not the one that stood there in the first pass, or is empty or not finite.
        """
        first, self._passes = not self._marks, self._passes + 1
        marks: list[str] = []
        start = 0
        for index, content in enumerate(self._contents()):
            size = self._size(content, index)
            mark = self._fingerprint(content)
            if first and self._tensors is None:
                _check_finite(content, f"batch {index}")
            if not first and (index >= len(self._marks) or mark != self._marks[index]):
                raise ValueError(
                    f"Problem: data must be the same at every pass, got a different batch {index} in pass "
                    f"{self._passes}: turn off shuffling, random augmentation and dropping of samples"
                )
            marks.append(mark)
            samples = torch.arange(start, start := start + size, device=self.device)
            if start > MAX_SAMPLES:
                raise ValueError(f"Problem: data must have at most {MAX_SAMPLES} samples, got more")
            yield Batch(index, samples, _map(content, lambda t: t.to(self.device)), self.batch_dim)
        if not marks:
            raise ValueError("Problem: data must not be empty, got no batch")
        if first:
            self._marks, self.n = marks, start
        elif len(marks) < len(self._marks):
            raise ValueError(
                f"Problem: data must be the same at every pass, got {len(marks)} batches in pass {self._passes} and "
                f"{len(self._marks)} in the first"
            )

    @property
    def count(self) -> int | None:
        """Number of batches, if known."""
        if self._tensors is not None and self.n is not None:
            return -(-self.n // self.step)
        return len(self._marks) or None

    def _contents(self) -> Iterator[Any]:
        """The raw batches. A loader draws from torch's default generator: it draws from its own here."""
        if self._tensors is not None:
            assert self.n is not None
            for start in range(0, self.n, self.step):
                count, n, dim = min(self.step, self.n - start), self.n, self.batch_dim
                yield _map(self._tensors, _cut(n, dim, start, count))
            return
        # Another seed for each pass, so that a loader that shuffles shows it.
        own = torch.Generator().manual_seed(self._passes).get_state()
        iterator: Iterator[Any] | None = None
        while True:
            outer = torch.default_generator.get_state()
            torch.default_generator.set_state(own)
            try:
                iterator = iter(self._loader) if iterator is None else iterator
                content = next(iterator)
            except StopIteration:
                return
            finally:
                own = torch.default_generator.get_state()
                torch.default_generator.set_state(outer)
            yield tuple(content) if isinstance(content, list) else content

    def _fingerprint(self, content: Any) -> str:
        # A tensor that we hold says by its version whether it was written to; others are hashed.
        if self._tensors is not None:
            return ",".join(f"{t.data_ptr()}v{t._version}" for t in _tensors(content))
        digest = hashlib.blake2s(digest_size=8)
        for t in _tensors(content):
            digest.update(f"{tuple(t.shape)}{t.dtype}".encode())
            digest.update(_sampled_bytes(t))
        return digest.hexdigest()

    def _size(self, content: Any, index: int) -> int:
        sizes = [_length(t, self.batch_dim) for t in _tensors(content) if t.ndim]
        if not sizes:
            raise TypeError(f"Problem: a batch must hold tensors, got {type(content).__name__} in batch {index}")
        if sizes[0] == 0:
            raise ValueError(f"Problem: data must not be empty, got no sample in batch {index}")
        if len(set(sizes)) > 1 and self._tensors is None and isinstance(content, tuple) and self.batch_dim == 0:
            raise ValueError(f"Problem: tensors of a batch must have one length, got {sizes} in batch {index}")
        return sizes[0]

    def _check_tensors(self, data: Any) -> int:
        tensors = [t for t in _tensors(data) if t.ndim]
        if not tensors:
            raise TypeError("Problem: data must hold at least one tensor with a sample dimension, got none")
        if any(len(t) == 0 for t in tensors):
            raise ValueError(f"Problem: data must not be empty, got shapes {[tuple(t.shape) for t in tensors]}")
        n = _length(tensors[0], self.batch_dim)
        for t in tensors:
            if n not in (_length(t, self.batch_dim), t.shape[0]):
                shapes = [tuple(t.shape) for t in tensors]
                raise ValueError(f"Problem: tensors of data must have one length, got shapes {shapes}")
        _check_finite(data, "data")
        return n


def _loader(data: Any, batch_size: int | None) -> Iterable[Any]:
    """A re-iterable source of batches."""
    if isinstance(data, DataLoader):
        if batch_size is not None:
            raise ValueError(f"Problem: batch_size must be None when data is a DataLoader, got {batch_size}")
        sampler = getattr(data.batch_sampler, "sampler", data.sampler)
        if isinstance(sampler, (RandomSampler, SubsetRandomSampler, _Weighted)):
            raise ValueError(
                f"Problem: data must keep its order, got a DataLoader with {type(sampler).__name__}: use shuffle=False"
            )
        if getattr(data.batch_sampler, "drop_last", data.drop_last):
            sized, step = not isinstance(data.dataset, IterableDataset), data.batch_size or 1
            if not sized or len(data.dataset) % step:  # type: ignore[arg-type]
                raise ValueError("Problem: data must keep all samples, got a DataLoader with drop_last=True")
        return data
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if not hasattr(data, "__len__"):
            raise TypeError(f"Problem: a Dataset must have a length, got {type(data).__name__}")
        if len(data) == 0:
            raise ValueError("Problem: data must not be empty, got a Dataset of length 0")
        return DataLoader(data, batch_size=batch_size or DEFAULT_BATCH)
    if isinstance(data, IterableDataset):
        return DataLoader(data, batch_size=batch_size or DEFAULT_BATCH)
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise TypeError(
            f"Problem: data must be a tuple of tensors (X, y), a mapping of tensors, a Dataset or a re-iterable "
            f"loader, got {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"Problem: data must be iterable more than once, got a one-shot {type(data).__name__}: pass the loader"
        )
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError(f"Problem: data must not be empty, got an empty {type(data).__name__}")
    return data


def _step(data: Any, n: int) -> int:
    """Samples a batch: up to 1024, fewer where a sample is large; a token stands for the vector that it becomes."""
    size = sum(t.numel() * (1 if t.is_floating_point() else 256) for t in _tensors(data) if t.ndim > 1) / n
    return int(min(1024, max(1, (1 << 20) // max(1, size))))


def _is_tensors(data: Any) -> bool:
    """Whether data are the whole data set as tensors, rather than a list of batches."""
    if isinstance(data, Mapping):
        return any(isinstance(t, Tensor) for t in data.values())
    return isinstance(data, (tuple, list)) and len(data) > 0 and all(isinstance(t, Tensor) for t in data)


def _tensors(content: Any) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    if isinstance(content, Mapping):
        return [t for value in content.values() for t in _tensors(value)]
    if isinstance(content, (tuple, list)):
        return [t for value in content for t in _tensors(value)]
    return []


def _map(content: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(content, Tensor):
        return fn(content)
    if isinstance(content, Mapping):
        return {key: _map(value, fn) for key, value in content.items()}
    if isinstance(content, tuple) and hasattr(content, "_fields"):
        return type(content)(*(_map(value, fn) for value in content))
    if isinstance(content, (tuple, list)):
        return type(content)(_map(value, fn) for value in content)
    return content


def all_finite(x: Tensor) -> bool:
    """Whether every entry is; a sum is one cheap read, and finite only where they all are."""
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())


def finite_sum(values: Tensor, batch: Batch) -> float:
    """Return Σ values in float64; ValueError naming batch and sample if it is not finite."""
    total = float(values.detach().double().sum())
    if total - total != 0.0:
        row = int((~torch.isfinite(values)).nonzero()[0])
        sample = int(batch.samples[row * batch.size // len(values)])
        seen = f"{float(values.detach()[row])} at batch {batch.index} (sample {sample})"
        raise ValueError(f"Problem: losses must be finite, got {seen}")
    return total


def _length(t: Tensor, dim: int) -> int:
    return t.shape[dim] if t.ndim > dim else t.shape[0]


def _along(t: Tensor, size: int, dim: int, fn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply fn along the sample dimension; a tensor without one is the same for every sample."""
    if t.ndim > dim and t.shape[dim] == size:
        return fn(t, dim)
    return fn(t, 0) if t.ndim and t.shape[0] == size else t


def _cut(n: int, dim: int, start: int, count: int) -> Callable[[Tensor], Tensor]:
    return lambda t: _along(t, n, dim, lambda t, d: t.narrow(d, start, count))


def _check_finite(content: Any, where: str) -> None:
    for position, t in enumerate(_tensors(content)):
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise ValueError(f"Problem: data must be finite, got NaN or Inf in tensor {position} of {where}")


def _sampled_bytes(t: Tensor) -> bytes:
    flat = t.detach().reshape(-1)
    if flat.numel() > _HASHED:
        generator = torch.Generator().manual_seed(flat.numel())
        flat = flat[torch.randint(flat.numel(), (_HASHED,), generator=generator).to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
