"""How much memory a computation may take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device, containers' limits respected."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2 if hasattr(os, "sysconf") else 1 << 31
    try:
        used, limit = (int((_CGROUP / name).read_text()) for name in ("memory.current", "memory.max"))
        free = min(free, limit - used)
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return max(free, 0)


def budget(function: str, memory: int | None, device: torch.device, share: float = 0.5) -> int:
    """Return the bytes that ``function`` may take: ``memory``, else a share of what is free.

    Raises:
        TypeError: if memory is not an int.
        ValueError: if it is not positive.
    """
    if memory is None:
        return int(share * free_bytes(device))
    if not isinstance(memory, int) or isinstance(memory, bool):
        raise TypeError(f"{function}: memory must be a number of bytes (int), got {type(memory).__name__}")
    if memory < 1:
        raise ValueError(f"{function}: memory must be at least 1 byte, got {memory}")
    return memory


def readable(size: float) -> str:
    """Return bytes as people write them.

    Example:
        >>> readable(3 << 20)
        '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors made inside the block that are alive, and their peak; each storage once.

    What an operation allocates and frees within itself is not seen.

    Attributes:
        peak: the most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}  # those that may be alive; a reference keeps its address
        self._total = 0
        self._known: dict[int, StorageWeakRef] = {}  # storages from outside; a reference keeps their addresses too

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._seen and storage._cdata not in self._known:
                self._known[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._known and storage._cdata not in self._seen:
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
                self._total += storage.nbytes()
        if self._total > self.peak:
            self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        """Bytes that are alive now."""
        self._seen = {key: held for key, held in self._seen.items() if not held[0].expired()}  # type: ignore[no-untyped-call]
        self._total = sum(size for _, size in self._seen.values())
        return self._total


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(tree, Tensor):
        if tree.layout == torch.strided:
            yield tree.untyped_storage()
    elif isinstance(tree, (tuple, list)):  # operators nest nothing else, so that torch's own walk is not needed
        for part in tree:
            yield from _storages(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _storages(part)
