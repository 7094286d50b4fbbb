"""Is this installation sound? Versions, instruction set, threads, CUDA, OpenMP, and the masks against known bits."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import dropscope
from dropscope import kernels

CheckStatus = Literal["ok", "warning", "failed"]

# Mask format 1: keep bits of 64 units, bit u for unit u, for seed 2024, site 0x0123456789abcdef, T = 52429
# and the streams (draw, sample) = (0, 0), (3, 5), (2^32-1, 7).
GOLDEN = (0xFF67FFCFFBFBECFF, 0x7BEECFEBF7F7E2E7, 0x3DFBFFEFFF37DFEF)
GOLDEN_STREAMS = ((0, 0), (3, 5), (0xFFFFFFFF, 7))


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``"ok"``, ``"warning"`` (works, but slower or partly) or ``"failed"``.
        detail: what was found.
        remedy: what to do, empty when ``"ok"``.
    """

    name: str
    status: CheckStatus
    detail: str
    remedy: str = ""


def diagnose() -> list[Check]:
    """Return every check, in reading order."""
    return [_versions(), _isa(), _threads(), _openmp(), _cuda(), _masks("cpu"), *_device_masks()]


def kernel_facts() -> dict[str, str]:
    """Instruction set, OpenMP and CUDA of the compiled kernels, for provenance."""
    from dropscope import _core

    return {
        "kernels": f"{_core.isa()}, OpenMP {'on' if _core.openmp else 'off'}, "
        f"CUDA {'built' if _core.cuda_built() else 'not built'}"
    }


def _versions() -> Check:
    return Check(
        "versions",
        "ok",
        f"dropscope {dropscope.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
    )


def _isa() -> Check:
    from dropscope import _core

    names = [name for name in ("generic", "avx2", "avx512") if _core.isa_supported(name)]
    forced = os.environ.get("DROPSCOPE_ISA")
    why = f"forced by DROPSCOPE_ISA={forced}" if forced else "chosen at import"
    return Check("instruction set", "ok", f"{_core.isa()} ({why}); this CPU has {', '.join(names)}")


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    detail = f"{threads} (torch's own number) on {cores} usable cores"
    if threads > cores:
        return Check("threads", "warning", detail, f"more threads than cores: torch.set_num_threads({cores})")
    return Check("threads", "ok", detail)


def openmp_runtimes() -> list[str] | None:
    """Files of the OpenMP runtimes mapped into this process; None where that cannot be seen."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.search(r"/lib(g|i|)omp[^/]*\.so|/libomp[^/]*\.so", path))


def _openmp() -> Check:
    from dropscope import _core

    if not _core.openmp:
        return Check("OpenMP", "warning", "the kernels were built without it", "build with OpenMP to use every core")
    runtimes = openmp_runtimes()
    if runtimes is None:
        return Check("OpenMP", "ok", "on; the runtimes of this process cannot be listed here")
    shared = [path for path in runtimes if "/torch/" in path and ".libs/" not in path]
    others = [path for path in runtimes if path not in shared]
    if len(runtimes) > 1 and not shared:
        remedy = "two runtimes can hang or oversubscribe: import torch first, and install torch >= 2.8"
        return Check("OpenMP", "failed", f"{len(runtimes)} runtimes, none torch's own: {', '.join(runtimes)}", remedy)
    if others and shared:
        detail = f"shared with torch ({shared[0]}); another package loaded one more: {', '.join(others)}"
        return Check("OpenMP", "warning", detail, "import torch before that package")
    where = "torch's own" if shared else "shared with torch"
    return Check("OpenMP", "ok", f"one runtime, {where}: {runtimes[0] if runtimes else 'linked statically'}")


def _cuda() -> Check:
    from dropscope import _core

    built, usable = _core.cuda_built(), torch.cuda.is_available()
    if built and usable:
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
        return Check("CUDA", "ok", f"kernels built, {count} device(s): {name}")
    if usable:
        remedy = "reinstall with nvcc on the PATH; until then GPU tensors take the slower reference kernels"
        return Check("CUDA", "warning", "torch sees a device, the kernels were built without CUDA", remedy)
    state = "kernels built" if built else "kernels not built (no nvcc at build time)"
    return Check("CUDA", "ok", f"{state}; torch sees no device: everything runs on the CPU")


def _masks(device: str) -> Check:
    """The masks of this build against known bits."""
    streams = torch.tensor([(draw << 32 | sample) - (draw >> 31 << 64) for draw, sample in GOLDEN_STREAMS])
    mask = kernels.keep_mask(streams.to(device), 64, seed=2024, site=0x0123456789ABCDEF, threshold=52429)
    seen = tuple(sum(int(bit) << unit for unit, bit in enumerate(row)) for row in mask.tolist())
    name = "masks" if device == "cpu" else f"masks on {device}"
    if seen == GOLDEN:
        return Check(name, "ok", "mask format 1: the known bits come out")
    remedy = "this build draws wrong masks: report it, and use none of its results"
    return Check(name, "failed", f"got {[hex(s) for s in seen]}", remedy)


def _device_masks() -> list[Check]:
    return [_masks("cuda")] if torch.cuda.is_available() else []
