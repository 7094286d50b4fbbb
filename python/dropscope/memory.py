"""How much memory a computation may take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

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


@contextmanager
def saved_bytes(excluded: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Count the bytes of what autograd saves inside the block, each storage once, ``excluded`` ones not.

    Yields:
        A function that returns the count so far.
    """
    seen: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in excluded}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(seen.values())
