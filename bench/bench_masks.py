"""Dropout masks against F.dropout and a copy; each answer is checked against the definition of the mask.

Every instruction set in turn: `python -m bench.bench_masks`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import Contest, contest
from dropscope import kernels, reference

UNITS = 2**27
THRESHOLD = 52429  # drop probability 0.2
KEY = {"seed": 2024, "site": 7, "threshold": THRESHOLD}


def masks(units: int, dtype: torch.dtype = torch.float32, total: int = UNITS) -> Contest:
    rows = total // units
    x = torch.empty(rows, units, dtype=dtype).uniform_(0.5, 1.5)
    out = torch.empty_like(x)
    streams = torch.arange(rows)

    def check(answers: Mapping[str, Any]) -> str:
        out.zero_()
        kernels.apply_mask(x, streams, out=out, **KEY)
        for part in (slice(0, 64), slice(rows - 64, rows)) if units < 2**16 else (slice(0, 1),):
            assert torch.equal(out[part], reference.apply_mask(x[part], streams[part], **KEY))
        rate = float((out != 0).double().mean())
        assert abs(rate - THRESHOLD / 65536) < 6 * (0.16 / total) ** 0.5
        assert abs(float((answers["F.dropout"] != 0).double().mean()) - 0.8) < 1e-3
        return kernels.isa()

    few = x[: max(1, 2**22 // units)]  # F.dropout is far too slow for all of it: its time is scaled up below

    def dropout() -> torch.Tensor:
        for _ in range(rows // len(few)):
            result = F.dropout(few, 0.2)
        return result

    return Contest(
        ours=lambda: kernels.apply_mask(x, streams, out=out, **KEY),
        competitors={"F.dropout": dropout},
        ceiling=("copy", lambda: out.copy_(x)),
        check=check,
        once=("F.dropout",),
    )


def register(
    name: str, work: str, units: int, within: float | None, threads: int, dtype: torch.dtype = torch.float32
) -> None:
    def build() -> Contest:
        return masks(units, dtype)

    build.__name__, build.__module__ = name, __name__
    contest(work, faster={"F.dropout": 15}, within=within, threads=threads)(build)


for THREADS in (1, 2):
    register(f"rows_of_10_threads_{THREADS}", "dropout mask, 2^27 floats, rows of 10", 10, 2.0, THREADS)
    register(f"rows_of_64_threads_{THREADS}", "dropout mask, 2^27 floats, rows of 64", 64, 1.5, THREADS)
    register(f"rows_of_1024_threads_{THREADS}", "dropout mask, 2^27 floats, rows of 1024", 1024, 1.5, THREADS)
register("bfloat16", "dropout mask, 2^27 bfloat16, rows of 1024", 1024, None, 1, torch.bfloat16)


def on_isa(isa: str) -> Callable[[], None]:
    """A process that times masks on one instruction set; the choice is made once, at import."""
    code = (
        "import time, torch\nfrom dropscope import kernels\ntorch.set_num_threads(1)\n"
        "x = torch.ones(2**17, 1024); out = torch.empty_like(x); s = torch.arange(2**17); ratios = []\n"
        "for _ in range(5):\n"
        "    a = time.perf_counter(); out.copy_(x); b = time.perf_counter()\n"
        "    kernels.apply_mask(x, s, seed=0, site=0, threshold=52429, out=out); c = time.perf_counter()\n"
        "    ratios.append((c - b) / (b - a))\n"
        "print(f'{kernels.isa()}: {sorted(ratios)[2]:.2f} times a copy, one thread, rows of 1024')"
    )

    def call() -> None:
        environment = {**os.environ, "DROPSCOPE_ISA": isa}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parents[1])

    return call


if __name__ == "__main__":
    from dropscope import _core

    for name in ("generic", "avx2", "avx512"):
        if _core.isa_supported(name):
            on_isa(name)()
