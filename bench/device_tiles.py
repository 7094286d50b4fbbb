"""`python -m bench.device_tiles results.json`: products of factors on a device by the size of their tiles.

The sizes in ``kernels/_tiles.py`` were chosen by reasoning from the second cache; this shows what others would give.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.bench_cuda import PRECISIONS, DeviceClock, factors
from dropscope.kernels import _tiles as tiles

MIB = (8, 16, 32, 64, 128, 512)
GRAM_SAMPLES = (1024, 2048, 4096, 8192, 16384)


def settings(kind: str) -> Iterator[tuple[str, Any]]:
    """Names of sizes, and contexts in which they hold."""
    if kind == "gram":
        for samples in GRAM_SAMPLES:
            yield f"{samples} samples", mock.patch.dict(tiles._GRAM_SAMPLES, cuda=samples)
        return
    for size in MIB:
        yield f"{size} MiB", mock.patch.dict(tiles._TILE_BYTES, cuda=size << 20)


def fastest(call: Any) -> float:
    clock = DeviceClock()
    clock(call, 1)
    repeats = max(1, int(0.02 / max(clock(call, 1)[0], 1e-6)))
    return min(clock(call, repeats)[0] for _ in range(3))


def main() -> int:
    path, found = Path(sys.argv[1]), []
    with mock.patch.dict(tiles._TILE_ROWS, cuda=1 << 20):
        for label, dtype, precision in PRECISIONS:
            for kind, N in (("project", 65536), ("accumulate", 65536), ("gram", 16384)):
                trial = factors(kind, dtype, precision, N, 1, (784, 512))
                assert trial.ceiling is not None
                bare = fastest(trial.ceiling[1])
                for name, setting in settings(kind):
                    with setting:
                        seconds = fastest(lambda call=trial.ours: call())
                    found.append(
                        {"kind": kind, "dtype": label, "tile": name, "seconds": seconds, "share": bare / seconds}
                    )
                    print(f"{kind:10s} {label:9s} {name:14s} {1e6 * seconds:9.1f} us, {bare / seconds:.0%}", flush=True)
                    path.write_text(json.dumps(found, indent=1) + "\n")
    torch.set_float32_matmul_precision("highest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
