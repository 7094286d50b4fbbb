"""The typed face of the compiled kernels.

Addresses, sizes and strides; a matrix is (address, dtype, rows, cols, stride).
"""

Matrix = tuple[int, int, int, int, int]

openmp: bool

def isa() -> str: ...
def isa_supported(name: str) -> bool: ...
def cuda_built() -> bool: ...
def apply_mask(
    device: int,
    x: Matrix,
    out: Matrix,
    streams: int,
    seed: int,
    site: int,
    threshold: int,
    group: int,
    skip: int,
    launch: int,
) -> None: ...
def keep_mask(
    device: int, out: int, rows: int, units: int, streams: int, seed: int, site: int, threshold: int, launch: int
) -> None: ...
def row_dots(device: int, P: Matrix, B: Matrix, out: Matrix, group: int, steps: int, launch: int) -> None: ...
def scale_rows(device: int, B: Matrix, S: Matrix, out: Matrix, group: int, steps: int, launch: int) -> None: ...
def hadamard(
    device: int,
    P: Matrix,
    Q: Matrix,
    out: Matrix,
    mirror: Matrix,
    row_group: int,
    col_group: int,
    row_steps: int,
    col_steps: int,
    shift: float,
    scales: tuple[()] | tuple[Matrix, Matrix, Matrix, Matrix],
    launch: int,
) -> None: ...
def center(device: int, X: Matrix, draws: int, scale: float, launch: int) -> None: ...
def orthogonalize_scratch(device: int, rows: int, cols: int) -> int: ...
def orthogonalize(device: int, Q: Matrix, w: Matrix, force: bool, result: int, scratch: int, launch: int) -> None: ...
def rotate(device: int, Q: Matrix, S: int, k: int, launch: int) -> None: ...
def probe(device: int, out: Matrix, stream: int, seed: int, site: int, normal: bool, launch: int) -> None: ...
