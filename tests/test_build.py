"""The compiled module: one OpenMP runtime, torch's threads, one instruction set chosen at import, no CUDA needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dropscope import _core, kernels

ISAS = ("generic", "avx2", "avx512")

# Prints a digest of everything that must not depend on instruction set, thread count or import order.
DIGEST = """
import hashlib, torch
from dropscope import kernels

def digest(threads):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for rows, units in ((9001, 10), (700, 64), (3, 40001), (513, 77)):
            x = torch.randn(rows, units, generator=generator).to(dtype)
            streams = torch.randint(2**63 - 1, (rows,), generator=generator)
            y = kernels.apply_mask(x, streams, seed=2**64 - 3, site=2**63 + 9, threshold=52429)
            digest.update(y.view(torch.uint8).numpy().tobytes())
            digest.update(kernels.keep_mask(streams, units, seed=1, site=2, threshold=999).numpy().tobytes())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        Q = torch.randn(9, 30011, generator=generator).to(dtype)
        w = torch.randn(30011, generator=generator).to(dtype)
        c, norm, reads = kernels.orthogonalize(Q, w, force=True)
        kernels.rotate(Q, torch.randn(9, 5, generator=generator, dtype=torch.float64))
        probe = kernels.probe(torch.empty(40001, dtype=dtype), seed=3, index=4, kind="normal")
        for x in (c, w, Q, probe):
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(repr((norm, reads)).encode())
    return digest.hexdigest()

print(kernels.isa(), digest(1), digest(2))
"""


# The extension alone, without the seconds that importing torch takes.
LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_core", {_core.__file__!r})
_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_core)
"""


def run(code, **environment):
    """Standard output of a fresh interpreter; its errors when it fails."""
    libraries = str(Path(torch.__file__).parent / "lib")  # torch's libgomp, where the system has none
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "2", "LD_LIBRARY_PATH": libraries, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_every_instruction_set_and_thread_count_gives_the_same_bits():
    isas = [isa for isa in ISAS if _core.isa_supported(isa)]
    lines = [run(DIGEST, DROPSCOPE_ISA=isa).split() for isa in isas]
    assert [line[0] for line in lines] == isas
    assert len({digest for line in lines for digest in line[1:]}) == 1


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx5120"])
def test_an_instruction_set_that_cannot_be_is_refused_by_name(name):
    error = run(LOAD, DROPSCOPE_ISA=name)
    assert "ImportError: DROPSCOPE_ISA must be one of generic" in error
    assert f"got '{name}'" in error


def test_the_best_supported_instruction_set_is_the_default():
    supported = [isa for isa in ISAS if _core.isa_supported(isa)]
    assert run(LOAD + "print(_core.isa())", DROPSCOPE_ISA="") == supported[-1]
    assert [run(LOAD + "print(_core.isa())", DROPSCOPE_ISA=isa) for isa in supported] == supported
    assert not _core.isa_supported("sse9")


@pytest.mark.skipif(not Path("/proc/self/maps").exists() or not _core.openmp, reason="needs /proc and OpenMP")
def test_one_openmp_runtime_is_loaded_and_honours_torchs_thread_count():
    code = """
import os, re, torch
from dropscope import kernels

def started_by(threads):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    x = torch.empty(1, 2**20).fill_(1.0)
    kernels.apply_mask(x, torch.zeros(1, dtype=torch.int64), seed=0, site=0, threshold=9)
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(1)
runtimes = re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[-.\\w]*\\.so\\S*", open("/proc/self/maps").read())
print(started_by(1), started_by(3), torch.get_num_threads(), len(set(runtimes)))
"""
    assert run(code) == "0 2 3 1"


def test_a_forked_data_loader_worker_finishes():
    code = """
import torch
from dropscope import kernels

class Masked(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        return kernels.apply_mask(torch.ones(2**12, 64), torch.arange(2**12), seed=0, site=i, threshold=40000)

torch.set_num_threads(2)
here = torch.stack([Masked()[i] for i in range(2)])  # starts the threads that a fork does not inherit
loader = torch.utils.data.DataLoader(Masked(), batch_size=2, num_workers=1, multiprocessing_context="fork")
there = next(iter(loader))
print(torch.equal(here, there))
"""
    assert run(code) == "True"


def test_the_module_needs_no_cuda_driver():
    # The static runtime is inside: nothing of CUDA is linked, and nothing of torch.
    libraries = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=False).stdout
    assert "libgomp" in libraries or not _core.openmp
    assert not any(name in libraries for name in ("libcuda", "libtorch", "libc10", "not found"))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a device, and its memory would be overwritten")
def test_a_device_that_is_not_there_is_told():
    rule = "rotate: " if _core.cuda_built() else "built without CUDA"
    with pytest.raises(RuntimeError, match=rule):
        _core.rotate(1, (8, 0, 1, 1, 1), 8, 1, 0)


@pytest.mark.parametrize(
    ("x", "rule"),
    [
        ((0, 0, 2, 2, 2), "null pointer"),
        ((8, 0, 2, 2, 1), "rows overlap"),
        ((8, 0, -1, 2, 2), "negative size"),
        ((8, 9, 2, 2, 2), "unknown dtype"),
        ((8, 0, 2, 2), "a matrix is"),
    ],
)
def test_the_extension_refuses_views_that_it_could_not_read(x, rule):
    with pytest.raises(ValueError, match=rule):
        _core.apply_mask(0, x, x, 8, 0, 0, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="threshold"):
        _core.apply_mask(0, (8, 0, 0, 0, 0), (8, 0, 0, 0, 0), 8, 0, 0, 65536, 1, 0, 1)
    with pytest.raises(ValueError, match="rows of x"):
        _core.apply_mask(0, (8, 0, 2, 1, 1), (8, 0, 6, 1, 1), 8, 0, 0, 1, 3, 1, 1)


def test_kernels_run_in_many_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    x, streams = torch.randn(500, 64), torch.arange(500)
    expected = kernels.apply_mask(x, streams, seed=0, site=0, threshold=9)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: kernels.apply_mask(x, streams, seed=0, site=0, threshold=9), range(40)))
    assert all(torch.equal(r, expected) for r in results)
