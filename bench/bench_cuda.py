"""The CUDA kernels against the ceilings of the device: a copy, a read of the basis, the library's own products.

Registered where a device and a build with nvcc are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import Contest, contest
from dropscope import _core, kernels, reference

KEY = {"seed": 2024, "site": 7, "threshold": 52429}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISIONS = (
    ("float32", torch.float32, "highest"),
    ("TF32", torch.float32, "high"),
    ("bfloat16", torch.bfloat16, "highest"),
)


class DeviceClock:
    """Seconds of the device's per call: replays of a graph that holds the call, between two events.

    Launched one by one, calls of some 10 us would show the time of the host instead.
    """

    def __init__(self) -> None:
        self.graphs: dict[int, tuple[Callable[[], Any], torch.cuda.CUDAGraph | None, Any]] = {}

    def __call__(self, call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
        _, graph, answer = self._captured(call)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            if graph is None:
                answer = call()
            else:
                graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats, answer

    def _captured(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], torch.cuda.CUDAGraph | None, Any]:
        if id(call) not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries make their workspaces, kernels are loaded
                call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
            answer = None
            try:
                with torch.cuda.graph(graph):
                    answer = call()
            except RuntimeError as error:
                print(f"not captured, so timed with the host's launches: {error}", file=sys.stderr)
                graph = None
                torch.cuda.synchronize()
            self.graphs[id(call)] = call, graph, answer
        return self.graphs[id(call)]


def ceilings() -> dict[str, float]:
    """What this device does at most: bytes moved by a copy of 4 GiB, and products of random matrices of 8192."""
    rates: dict[str, float] = {}
    x = torch.empty(2**30, device="cuda").normal_()
    y = torch.empty_like(x)
    rates["copy, GB/s"] = 2 * x.numel() * 4 / _fastest(lambda: y.copy_(x)) / 1e9
    rates["read, GB/s"] = x.numel() * 4 / _fastest(lambda: x.view(torch.int64).amax()) / 1e9
    for name, dtype, precision in PRECISIONS:
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.empty(8192, 8192, dtype=dtype, device="cuda").normal_() for _ in range(2))
        rates[f"{name} products, TFLOP/s"] = 2 * 8192**3 / _fastest(lambda a=a, b=b: a @ b) / 1e12
    torch.set_float32_matmul_precision("highest")
    return {name: round(rate, 1) for name, rate in rates.items()}


def _fastest(call: Callable[[], Any]) -> float:
    clock = DeviceClock()
    return min(clock(call, 5)[0] for _ in range(5))


def masks(units: int, dtype: torch.dtype) -> Contest:
    rows = 2**28 // units
    x = torch.empty(rows, units, dtype=dtype, device="cuda").uniform_(0.5, 1.5)
    out, streams = torch.empty_like(x), torch.arange(rows, device="cuda")

    def check(_: Mapping[str, Any]) -> str:
        kernels.apply_mask(x, streams, out=out, **KEY)
        for part in (slice(0, 64), slice(rows - 64, rows)):
            assert torch.equal(out[part].cpu(), reference.apply_mask(x[part].cpu(), streams[part].cpu(), **KEY))
        return "bits of the CPU"

    return Contest(
        ours=lambda: kernels.apply_mask(x, streams, out=out, **KEY),
        competitors={"F.dropout": lambda: F.dropout(x, 0.2)},
        ceiling=("copy", lambda: out.copy_(x)),
        check=check,
        clock=DeviceClock(),
    )


def orthogonalization(m: int, dim: int, dtype: torch.dtype, force: bool) -> Contest:
    # Of the rows of a Krylov basis, aligned to 16 bytes; one read leaves w alone where nothing is to be removed.
    Q = torch.empty(m, dim, dtype=dtype, device="cuda").normal_().mul_(dim**-0.5)
    start = torch.empty(dim, device="cuda").normal_()
    if not force:
        start.zero_()[-1] = 1.0
        Q[:, -1] = 0.0
    w = start.clone()

    def products() -> torch.Tensor:
        v = w.to(dtype)
        c = Q @ v
        return (v - Q.T @ c if force else v).norm()

    def check(_: Mapping[str, Any]) -> str:
        part, v = Q[:, -100_003:].clone(), start[-100_003:].clone()
        expected_v = v.cpu()
        c, norm, reads = kernels.orthogonalize(part, v, force=force)
        expected, expected_norm, _ = reference.orthogonalize(part.cpu(), expected_v, force=force)
        assert reads == 1 + force
        assert abs(norm - expected_norm) < 1e-6 * expected_norm
        torch.testing.assert_close(c, expected, rtol=0, atol=2e-6 * expected_norm)
        torch.testing.assert_close(v.cpu(), expected_v, rtol=1e-5, atol=1e-6)
        return f"{reads} read(s)"

    bits = Q.view(torch.int64) if dim % (8 // Q.element_size()) == 0 else Q

    def read() -> list[torch.Tensor]:
        return [bits.amax() for _ in range(1 + force)]  # a reduction that keeps one number reads as fast as it can

    ours = lambda: kernels.orthogonalize_async(Q, w, force=force)  # noqa: E731
    return Contest(ours, check, {"torch products": products}, ("reading the basis", read), clock=DeviceClock())


def factors(kind: str, dtype: torch.dtype, precision: str, N: int, steps: int, widths: tuple[int, int]) -> Contest:
    torch.set_float32_matmul_precision(precision)  # for all of the contest, which is timed before the next is built
    d_in, d_out = widths
    A = torch.empty(N, steps, d_in, dtype=dtype, device="cuda").normal_()
    B = torch.empty(N, steps, d_out, dtype=dtype, device="cuda").normal_()
    V = torch.empty(1, d_out, d_in, dtype=dtype, device="cuda").normal_()
    S = torch.empty(N, 1, device="cuda").normal_()
    shapes = {"gram": (N, N), "project": (N, 1), "accumulate": (1, d_out, d_in)}
    out = torch.zeros(shapes[kind], device="cuda")
    a, b = A.flatten(0, 1), B.flatten(0, 1)
    # Half of the symmetric Gram matrix is all that need be made: its bare products are those of half of the rows.
    half = N // 2 if kind == "gram" else N
    bare: dict[str, Callable[[], Any]] = {
        "gram": lambda: (a[:half] @ a.T, b[:half] @ b.T),
        "project": lambda: a @ V[0].T,
        "accumulate": lambda: b.T @ a,
    }
    runs: dict[str, Callable[[torch.Tensor], Any]] = {
        "gram": lambda to: kernels.gram(A, B, A, B, to),
        "project": lambda to: kernels.project(A, B, V, to),
        "accumulate": lambda to: kernels.accumulate(A, B, S, to),
    }

    def plain() -> Any:
        if kind == "gram":
            return (a @ a.T) * (b @ b.T)
        if kind == "project":
            return ((a @ V[0].T) * b).view(N, -1).sum(1)
        return (b * S.repeat_interleave(steps, 0).to(dtype)).T @ a

    def check(_: Mapping[str, Any]) -> str:
        actual = torch.zeros_like(out)
        runs[kind](actual)
        exact = torch.zeros(out.shape, dtype=torch.float64, device="cuda")
        wide = [x.double() for x in (A, B, V, S)]
        if kind == "gram":
            part = slice(0, 256)
            exact = (wide[0][part, 0] @ wide[0][:, 0].T) * (wide[1][part, 0] @ wide[1][:, 0].T)
            actual = actual[part]
        elif kind == "project":
            reference.project(wide[0], wide[1], wide[2], exact)
        else:
            reference.accumulate(wide[0], wide[1], wide[3], exact)
        error = float((actual - exact).norm() / exact.norm())
        assert error < (1e-5 if (dtype, precision) == (torch.float32, "highest") else 2e-2)
        return f"relative error {error:.0e}"

    others = {"plain torch": plain} if steps == 1 or kind != "gram" else {}
    return Contest(lambda: runs[kind](out), check, others, ("bare products", bare[kind]), clock=DeviceClock())


def register(name: str, work: str, within: float, build: Callable[[], Contest]) -> None:
    build.__name__, build.__module__ = name, __name__
    globals()[name] = contest(work, within=within)(build)


def register_all() -> None:
    """Bars: 90 % of a copy, 85 % of the reads, 80 % of the library's products."""
    for label, dtype in DTYPES.items():
        for units in (10, 64, 500, 4096):
            work = f"dropout mask on a device, 2^28 {label}, rows of {units}"
            register(f"masks_{units}_{label}", work, 1 / 0.9, lambda u=units, d=dtype: masks(u, d))
        for m, dim in ((25, 1_000_000), (25, 100_000_000), (64, 10_000_000)):
            for force in (False, True):
                work = f"orthogonalize on a device, {m} vectors of {dim:.0e}, {label}, {1 + force} read(s)"
                build = lambda m=m, n=dim, d=dtype, f=force: orthogonalization(m, n, d, f)  # noqa: E731
                register(f"orthogonalize_{m}_{dim:.0e}_{label}_{1 + force}".replace("+", ""), work, 1 / 0.85, build)
    for label, dtype, precision in PRECISIONS:
        for kind, N, steps in (
            ("gram", 16384, 1),
            ("project", 65536, 1),
            ("accumulate", 65536, 1),
            ("project", 64, 256),
        ):
            work = f"{kind} on a device, {N} samples, T = {steps}, 784 by 512, {label}"
            build = lambda k=kind, d=dtype, p=precision, n=N, t=steps: factors(k, d, p, n, t, (784, 512))  # noqa: E731
            register(f"{kind}_{N}_{steps}_{label}", work, 1 / 0.8, build)


if torch.cuda.is_available() and _core.cuda_built():
    register_all()
