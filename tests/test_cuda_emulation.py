"""The CUDA kernels on any machine: compiled for the host against an emulation of CUDA's threads, blocks and barriers.

They pass the tests of the CPU's kernels, and those of ``cuda_emulation/checks.py``: nothing beyond the ends of memory,
64-bit offsets, and the same bits for every order in which a device may run its threads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC, EMULATION = TESTS.parent / "csrc", TESTS / "cuda_emulation"
COMPILER = shutil.which("g++")
SOURCES = [
    *(CSRC / "cuda" / f"{room}.cu" for room in ("masks", "factors", "spectral")),
    CSRC / "cuda" / "kernels.cpp",
    CSRC / "bindings.cpp",
    EMULATION / "emulation.cpp",
]
# Left out: tests of the CPU's threads, instruction sets and float products of bfloat16 factors, and the same checks at
# sizes that take minutes here.
LEFT_OUT = (
    "every_thread_count",
    "products_in_float",
    "by_units_and_without",
    "many_rows_and",
    "lanes_are_the_halves",
    "masks_equal",
    "any_shape",
    "units_are_kept",
)
SELECTION = f"not ({' or '.join(LEFT_OUT)})"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CSRC.is_dir(), reason="the sources are not beside the tests"),
    pytest.mark.skipif(COMPILER is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux"),
]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The extension with the CUDA kernels in the place of the CPU's."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags.append("-DDROPSCOPE_MOST_BLOCKS=3")  # blocks stride over the work as they do over much work on a device
    includes = [EMULATION, CSRC, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [COMPILER, *flags, *(f"-I{path}" for path in includes)]
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    runs = [
        subprocess.Popen(
            [*command, "-x", "c++", "-c", source, "-o", object_file], stderr=subprocess.PIPE, stdout=None, text=True
        )
        for source, object_file in zip(SOURCES, objects, strict=True)
    ]
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    library = folder / "_core.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", library], check=True)
    return library


def run(extension, *arguments, seed=0):
    done = subprocess.run(
        [sys.executable, EMULATION / "run.py", extension, "-q", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "DROPSCOPE_EMULATION_SEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_tests_of_the_kernels_pass(extension):
    files = [str(TESTS / f"test_{room}_kernels.py") for room in ("mask", "factor", "spectral")]
    assert " passed" in run(extension, *files, "-k", SELECTION)


def test_memory_offsets_and_order(extension):
    checks = str(EMULATION / "checks.py")
    output = [run(extension, checks), run(extension, checks, "-k", "kernels_are or digest", seed=1)]
    digests = [line for text in output for line in text.splitlines() if line.startswith("digest ")]
    assert len(digests) == 2
    assert len(set(digests)) == 1
