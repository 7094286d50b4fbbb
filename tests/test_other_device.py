"""Measurements on a device that is only pretended, in a process of its own: see ``other_device/pretended.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

# torch 2.13 scripts some of its own functions when forward mode meets a subclass of Tensor.
QUIET = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
TESTS = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch has no devices made in Python",
    ),
]


def test_no_tensor_is_made_on_the_wrong_device():
    folder = TESTS / "other_device"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", QUIET, str(folder / "checks.py")],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
