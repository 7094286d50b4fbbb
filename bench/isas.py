"""The CPU kernels on an instruction set other than the widest, in a process where torch stays as it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

from bench.harness import Unavailable
from dropscope import _core, kernels

ISAS = ("generic", "avx2", "avx512")


def use(isa: str) -> None:
    """Let :mod:`dropscope.kernels` run on one instruction set from here on.

    The extension makes its choice once, when it is loaded: so a copy of its file is loaded under another name.

    Raises:
        Unavailable: this CPU lacks the instruction set.
    """
    if not _core.isa_supported(isa):
        raise Unavailable(f"the CPU has no {isa}")
    if kernels.isa() == isa:
        return
    forced = os.environ.get("DROPSCOPE_ISA")
    os.environ["DROPSCOPE_ISA"] = isa
    try:
        core = _loaded_anew(f"{isa}._core")
    finally:
        os.environ.pop("DROPSCOPE_ISA")
        if forced is not None:
            os.environ["DROPSCOPE_ISA"] = forced
    for name, module in sys.modules.items():
        if name.startswith("dropscope.kernels.") and hasattr(module, "_core"):
            module._core = core  # type: ignore[attr-defined]
    assert kernels.isa() == isa


def _loaded_anew(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file may go
        path = shutil.copy(str(_core.__file__), Path(folder) / f"{name}.so")
        loader = ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        core = importlib.util.module_from_spec(spec)
        loader.exec_module(core)
        return core
