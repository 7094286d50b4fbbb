"""Dropout masks against a copy, for every instruction set, dtype and length of rows, and against F.dropout.

Each answer is checked against the definition of the mask. `python -m bench bench_masks` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bench import isas
from bench.harness import Contest, contest
from dropscope import kernels, reference

BYTES = 2**27  # of x, beyond every cache
THRESHOLD = 52429  # drop probability 0.2
KEY = {"seed": 2024, "site": 7, "threshold": THRESHOLD}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def masks(units: int, dtype: torch.dtype, size: int, competitors: bool) -> Contest:
    rows = size // units // dtype.itemsize
    x = torch.empty(rows, units, dtype=dtype).uniform_(0.5, 1.5)
    out = torch.empty_like(x)
    streams = torch.arange(rows)

    def ours() -> torch.Tensor:
        return kernels.apply_mask(x, streams, out=out, **KEY)

    def check(answers: Mapping[str, Any]) -> str:
        out.zero_()
        ours()
        for part in (slice(0, 64), slice(rows - 64, rows)):
            assert torch.equal(out[part], reference.apply_mask(x[part], streams[part], **KEY))
        kept = int(torch.count_nonzero(out))
        assert abs(kept / out.numel() - THRESHOLD / 65536) < 6 * (0.16 / out.numel()) ** 0.5
        if competitors:
            assert abs(float((answers["F.dropout"] != 0).double().mean()) - 0.8) < 1e-3
        return f"{kernels.isa()}, bits as defined"

    few = x[: max(1, 2**22 // units)]  # F.dropout takes new memory each time: in pieces it is at its best

    def dropout() -> torch.Tensor:
        for _ in range(rows // len(few)):
            result = F.dropout(few, 0.2)
        return result

    return Contest(
        ours, check, {"F.dropout": dropout} if competitors else {}, ("copy", lambda: out.copy_(x)), ("F.dropout",)
    )


def register(name: str, work: str, build: Callable[[], Contest], within: float | None, **bars: Any) -> None:
    build.__name__, build.__module__ = name, __name__
    contest(work, within=within, **bars)(build)


def bar(isa: str, units: int) -> float | None:
    """What the design asks for with the widest vectors, and what its prototypes reached with others."""
    if isa == "generic":
        return 2.1 if units >= 64 else None
    return 1.5 if units >= 64 else 2.0


def on_isa(isa: str, units: int, dtype: torch.dtype) -> Callable[[], Contest]:
    def build() -> Contest:
        isas.use(isa)
        return masks(units, dtype, BYTES, competitors=False)

    return build


for ISA in isas.ISAS:
    for DTYPE_NAME, DTYPE in DTYPES.items():
        for UNITS in (10, 64, 500, 4096):
            register(
                f"{ISA}_{DTYPE_NAME}_rows_of_{UNITS}",
                f"dropout mask, 128 MiB of {DTYPE_NAME}, rows of {UNITS}, {ISA}",
                on_isa(ISA, UNITS, DTYPE),
                bar(ISA, UNITS),
                threads=1,
            )


def large(units: int) -> Callable[[], Contest]:
    return lambda: masks(units, torch.float32, 2**29, competitors=True)


for THREADS in (1, 2):
    for UNITS, WITHIN in ((10, 2.0), (64, 1.5), (1024, 1.5)):
        register(
            f"rows_of_{UNITS}_threads_{THREADS}",
            f"dropout mask, 2^27 floats, rows of {UNITS}",
            large(UNITS),
            WITHIN,
            threads=THREADS,
            # The design asks it of a thread, for rows from 64. F.dropout draws on one thread however many there are.
            faster={"F.dropout": 15} if THREADS == 1 and UNITS >= 64 else {},
        )
