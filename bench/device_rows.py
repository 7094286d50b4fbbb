"""`python -m bench.device_rows results.json`: the contests of a device one after another, each row kept at once.

One process for all: a process each, as on the CPU, would spend most of a lent device's minutes on starting. A fault
on a device leaves its process without it, so the process then ends, and the next call goes on after the contest that
failed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from bench import page
from bench.harness import Entry, Row, described, run
from bench.measure import load, machine

LOST = "failed: the process ended while it ran"
UNFINISHED = 3  # exit status: some contests are left


def left(entries: list[Entry], path: Path) -> list[Entry]:
    """The contests without a row, in their order."""
    done = {row.name for row in page.read(path)[1]} if path.exists() else set()
    return [entry for entry in entries if entry.name not in done]


def measured(entry: Entry, rounds: int) -> Row:
    """The row of a contest; whatever goes wrong becomes its status."""
    torch.set_float32_matmul_precision("highest")
    try:
        return run(entry, rounds)
    except Exception as error:
        return Row(entry.name, entry.work, f"failed: {described(error)}", str(entry.bars))


def usable() -> bool:
    """Whether the device still computes in this process."""
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device="cuda") + 1).sum() == 16)
    except RuntimeError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device_rows", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("patterns", nargs="*", help="contests whose name contains one of these; default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no contest after so many")
    args = parser.parse_args()
    start, about = time.perf_counter(), machine()
    entries = [e for e in load("bench.bench_cuda") if not args.patterns or any(p in e.name for p in args.patterns)]
    if not entries:
        print("no contest: no device, no build with CUDA, or no such name", file=sys.stderr)
        return 1
    for entry in left(entries, args.results):
        if time.perf_counter() - start > args.seconds:
            return UNFINISHED
        page.keep(Row(entry.name, entry.work, LOST, str(entry.bars)), about, args.results)
        row = measured(entry, args.rounds)
        page.keep(row, about, args.results)
        print(page.report(row), flush=True)
        del row
        gc.collect()
        if not usable():
            return UNFINISHED
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
