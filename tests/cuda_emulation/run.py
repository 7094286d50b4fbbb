"""Runs pytest on the package with its extension replaced by one whose kernels are those of CUDA, emulated."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch  # before the extension, as the package does


def main(extension: str, arguments: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("dropscope._core", extension)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    sys.modules["dropscope._core"] = core
    torch.set_num_threads(1)
    from dropscope.kernels import _tiles

    _tiles.native_bfloat16 = lambda: True  # a device multiplies bfloat16; its kernels take no wider products
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
