"""The package as a whole: what it exports, what it loads, and which room may know which."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dropscope

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = REPOSITORY / "python" / "dropscope"

# Each room with what it stands on; a room may import its own level and those below.
LEVELS = [
    {"_core", "reference", "estimate", "_files"},
    {"kernels"},
    {"intercept", "entry_points", "mask_op", "memory", "modes"},
    {"masks", "replay", "replay_layers", "randomness"},
    {"problem", "parameters", "data", "losses", "probes", "derivatives"},
    {"factors"},
    {"operators", "spectral"},
    {"analyses", "training", "plots", "plots_losses", "plot_style"},
    {"report", "doctor", "measurements"},
    {"demo", "demo_page", "reproduce"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SPECTRAL_KNOWS = {"spectral", "operators.base", "kernels", "estimate", "memory", "_files", "plots"}
PUBLIC = [
    "GradientNoise",
    "Hessian",
    "MaskKey",
    "Problem",
    "SymmetricOperator",
    "condensation",
    "diagonal",
    "dropout",
    "eigsh",
    "hessian_variance",
    "interval_flatness",
    "keep_mask",
    "keep_probability",
    "loss_line",
    "loss_plane",
    "losses",
    "replay_dropout",
    "spectral_density",
    "trace",
    "training",
    "variance_flatness",
]

needs_sources = pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not beside the tests")


def python(code):
    """Runs code in a fresh interpreter in which warnings are errors; its output."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports():
    """(module, imported module, name, whether it is imported when the module is) within the package."""
    for file in sorted(SOURCES.rglob("*.py")):
        module = ".".join(file.relative_to(SOURCES).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        tree = ast.parse(file.read_text())
        at_import = {id(node) for node in tree.body} | {
            id(inner) for node in tree.body if isinstance(node, ast.Try) for inner in node.body
        }
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dropscope":
                for alias in node.names:
                    target = (node.module or "").partition(".")[2]
                    yield module, target, alias.name, id(node) in at_import
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("dropscope."):
                        yield module, alias.name.partition(".")[2], "", id(node) in at_import


def room(module):
    return module.split(".")[0]


@needs_sources
def test_every_room_has_its_place():
    found = {room(".".join(f.relative_to(SOURCES).with_suffix("").parts)) for f in SOURCES.rglob("*.py")}
    assert found - {"__init__"} <= LEVEL.keys()


@needs_sources
def test_rooms_import_only_what_they_stand_on():
    wrong = []
    for module, target, name, at_import in imports():
        goal = room(target) or name
        # The top level only lists names; figures and whole programs are called lazily from where their data are.
        if not module or goal not in LEVEL or (goal in ("plots", "plots_losses", "report") and not at_import):
            continue
        if LEVEL[goal] > LEVEL.get(room(module), -1):
            wrong.append(f"{module} imports {goal}")
    assert not wrong


@needs_sources
def test_rooms_keep_their_underscores():
    wrong = [
        f"{module} imports {target}.{name}"
        for module, target, name, _ in imports()
        if target
        and room(target) != room(module)
        and any(part.startswith("_") and part != "_files" for part in (*target.split("."), name))
    ]
    assert not wrong


@needs_sources
def test_kernels_alone_call_the_extension_which_the_doctor_describes():
    callers = {room(module) for module, target, name, _ in imports() if "_core" in (name, room(target))}
    assert callers == {"kernels", "doctor"}


@needs_sources
def test_spectral_knows_operators_and_nothing_of_networks():
    known = {f"{target or name}" for module, target, name, _ in imports() if room(module) == "spectral"}
    wrong = [t for t in known if not any(t == k or t.startswith(k + ".") for k in SPECTRAL_KNOWS)]
    assert not wrong


@needs_sources
def test_the_version_is_written_once():
    pattern = re.compile(r"^__version__ = ", re.MULTILINE)
    places = [f.name for f in sorted(SOURCES.rglob("*.py")) if pattern.search(f.read_text())]
    assert places == ["__init__.py"]
    assert importlib.metadata.version("dropscope") == dropscope.__version__


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_stand_at_the_top_and_say_what_they_are(name):
    assert getattr(dropscope, name).__doc__


def test_signatures_are_those_to_call_with():
    for thing in (getattr(dropscope, name) for name in dropscope.__all__):
        parameters = inspect.signature(thing).parameters.values() if callable(thing) else ()
        assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)], thing
    assert list(inspect.signature(dropscope.GradientNoise).parameters)[:3] == ["problem", "draws", "seed"]


def test_the_import_is_quiet_and_light():
    heavy = ["matplotlib", "sklearn", "jinja2"]
    assert python(f"import sys, dropscope; print(*[m for m in {heavy} if m in sys.modules])").strip() == ""


def test_the_extension_links_neither_torch_nor_a_cuda_runtime():
    from dropscope import _core

    binary = Path(_core.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libcudart.so"):
        assert library not in binary, f"{library.decode()} is named in {_core.__file__}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_is_loaded_and_it_is_torchs():
    code = """
import pathlib, dropscope
lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(*sorted({line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line or "libiomp" in line}))
"""
    runtimes = python(code).split()
    assert len(runtimes) == 1, runtimes
    assert Path(runtimes[0]).parent.parent.name == "torch", runtimes


def test_the_typed_face_travels_with_the_package():
    installed = Path(dropscope.__file__).parent
    assert (installed / "py.typed").exists()
    assert (installed / "_core.pyi").exists()
