"""`python -m bench`: run the benchmarks with pytest, keep the rows and write the table in bench/README.md."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import pytest

from bench import page
from bench.harness import REGISTRY
from bench.measure import HERE, load, modules


def chosen(patterns: list[str]) -> list[str]:
    """pytest's addresses of the contests whose name contains one of the patterns; all for none."""
    files = {module.removeprefix("bench."): file for file, module in modules().items()}
    found = []
    for entry in REGISTRY.values():
        if not patterns or any(pattern in entry.name for pattern in patterns):
            module, _, function = entry.name.partition(":")
            found.append(f"{files[module]}::{function}")
    return found


def gone(name: str) -> bool:
    """Whether no such benchmark exists; one whose module cannot be imported here may."""
    module = "bench." + name.partition(":")[0]
    return name not in REGISTRY and (module in sys.modules or module not in modules().values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="run the benchmarks whose name contains one of these; default all")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    parser.add_argument("--rounds", type=int, help="samples of each callable (default: each benchmark's own)")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", type=Path, help="write pytest-benchmark's JSON to this file")
    parser.add_argument("--keep", action="store_true", help="keep the rows in bench/results")
    parser.add_argument("--readme", action="store_true", help="keep the rows and rewrite the table in bench/README.md")
    args = parser.parse_args()
    for module in modules().values():
        with contextlib.suppress(ModuleNotFoundError):  # pytest says what is left out
            load(module)
    addresses = chosen(args.patterns)
    if args.list or not addresses:
        print("\n".join(REGISTRY))
        return 0 if args.list else 2
    options = ["-c", str(HERE / "pytest.ini"), "--benchmark-columns=median,iqr,min,rounds"]
    options += [] if args.rounds is None else ["--rounds", str(args.rounds)]
    options += ["--no-memory"] if args.no_memory else []
    options += [] if args.json is None else [f"--benchmark-json={args.json}"]
    options += ["--keep"] if args.keep or args.readme else []
    status = pytest.main([*options, *(addresses if args.patterns else [str(HERE)])])
    if args.readme:
        page.write(gone=gone)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
