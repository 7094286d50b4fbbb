"""Data of the reproductions: what is at hand by default, the papers' own files when the user has them."""

from __future__ import annotations

import gzip
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dropscope.reproduce.entry import Scale

# The files of each part, by the name of the data set; with MNIST the images are followed by their labels.
_FILES: dict[str, dict[str, list[str]]] = {
    "MNIST": {
        "train": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
        "test": ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
    },
    "CIFAR-10": {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    "CIFAR-100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_TOKEN = re.compile(r"[^\W\d]+|\d|[^\w\s]|\n")
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Images:
    """Labelled images in [0, 1].

    Attributes:
        x, y: training images (n, channels, height, width) in float32, labels (n,) in int64.
        test_x, test_y: test images and labels.
        name: what they are, for the record.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    name: str

    @property
    def features(self) -> int:
        """Numbers in an image."""
        return self.x[0].numel()

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(torch.cat([self.y, self.test_y]).max()) + 1


def images(scale: Scale, n: int, test: int | None = None) -> Images:
    """Return the first ``n`` training images and ``test`` test images (None: all).

    Without ``scale.data`` these are scikit-learn's 1797 digits of 8 by 8, in one fixed random order, the test images
    being those after the first ``n``. Otherwise ``scale.data`` is a folder with MNIST's four idx files or with the
    binary version of CIFAR-10 or CIFAR-100, each plain or with .gz.

    Raises:
        ValueError: if the folder holds neither, or too few images.
    """
    if scale.data is None:
        return _digits(n, test)
    if not scale.data.is_dir():
        raise ValueError(f"datasets.images: data must be a folder with MNIST or CIFAR files, got {str(scale.data)!r}")
    kind = next((kind for kind, files in _FILES.items() if _present(scale.data, files["train"])), None)
    if kind is None:
        raise ValueError(
            f"datasets.images: {scale.data} must hold MNIST's idx files or the binary version of CIFAR-10 or "
            f"CIFAR-100, got {sorted(p.name for p in scale.data.iterdir())[:8]}"
        )
    train, held = (_read(scale.data, kind, part) for part in ("train", "test"))
    if len(train[1]) < n or len(held[1]) < (test or 1):
        raise ValueError(
            f"datasets.images: n and test must fit {kind}'s {len(train[1])} and {len(held[1])} images, "
            f"got {n} and {test}"
        )
    return Images(train[0][:n], train[1][:n], held[0][:test], held[1][:test], f"first {n} of {kind}")


def _digits(n: int, test: int | None) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:  # pragma: no cover - an optional dependency
        raise ImportError("dropscope reproduce needs scikit-learn's digits: pip install 'dropscope[demo]'") from error

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(pixels).float().div(16).reshape(-1, 1, 8, 8)[order]
    y = torch.from_numpy(labels).long()[order]
    if not 0 < n < len(y) or (test or 1) > len(y) - n:
        raise ValueError(f"datasets.images: n and test must fit the {len(y)} digits, got {n} and {test}")
    last = len(y) if test is None else n + test
    return Images(x[:n], y[:n], x[n:last], y[n:last], f"first {n} of scikit-learn's digits")


def _read(folder: Path, kind: str, part: str) -> tuple[Tensor, Tensor]:
    names = _FILES[kind][part]
    paths = _present(folder, names)
    if not paths:
        raise ValueError(f"datasets.images: {folder} must hold {', '.join(names)}, one of them is missing")
    if kind == "MNIST":
        x, y = (torch.from_numpy(_idx(path)) for path in paths)
        return x.float().div(255).unsqueeze(1), y.long()
    labels = 2 if kind == "CIFAR-100" else 1  # of CIFAR-100's two label bytes the last is the fine one
    raw = np.concatenate([np.frombuffer(_bytes(path), np.uint8) for path in paths])
    if raw.size % (labels + 3072):
        raise ValueError(f"datasets.images: {folder} must hold records of {labels + 3072} bytes, got {raw.size} bytes")
    records = torch.from_numpy(raw.reshape(-1, labels + 3072))
    return records[:, labels:].float().div(255).reshape(-1, 3, 32, 32), records[:, labels - 1].long()


def _bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file: two zero bytes, the type 8 (unsigned byte), the number of sizes, the sizes, the bytes."""
    raw = _bytes(path)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"datasets.images: {path} must be an idx file of unsigned bytes, got the bytes {raw[:4]!r}")
    sizes = np.frombuffer(raw, ">u4", raw[3], 4)
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if data.size != sizes.prod():
        raise ValueError(f"datasets.images: {path} must hold {sizes.prod()} bytes after its head, got {data.size}")
    images: npt.NDArray[np.uint8] = data.reshape(sizes).copy()
    return images


def _present(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names, plain or with .gz; empty if one is missing."""
    found = [next((p for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None) for n in names]
    return [p for p in found if p is not None] if all(found) else []


@dataclass(frozen=True)
class Text:
    """A corpus as token ids.

    Attributes:
        train, valid, test: int64 ids, one dimension each.
        vocabulary: the token of each id; id 0 is ``<unk>``.
        name: what it is, for the record.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]
    name: str


def text(
    scale: Scale, train: int, held: int, vocabulary: int = 10_000, level: Literal["word", "character"] = "word"
) -> Text:
    """Return a corpus of ``train`` training tokens and ``held`` tokens each to validate and to test.

    Without ``scale.data`` these are the sources of Python's standard library, file after file in a fixed random order,
    so that training, validation and test come from different files. Otherwise ``scale.data`` is a text file, or a
    folder: with files named ``*train*``, ``*valid*`` and ``*test*`` (Penn Treebank, WikiText) those are the parts; else
    all its text files are joined. Words are runs of letters, single digits, signs and line ends; rarer ones than the
    ``vocabulary`` most frequent of the training part are ``<unk>``.

    Raises:
        ValueError: if there are too few tokens, or no readable text.
    """
    parts, name = _parts(scale.data)
    wanted = (train, held, held)
    if len(parts) == 1:
        stream = _tokens(parts[0], level)
        pieces = [_take(stream, count) for count in wanted]
    else:
        pieces = [_take(_tokens(part, level), count) for part, count in zip(parts, wanted, strict=True)]
    short = [f"{len(p)} of {count}" for p, count in zip(pieces, wanted, strict=True) if len(p) < count]
    if short:
        raise ValueError(f"datasets.text: train and held must fit the text, got {short[0]} tokens from {name}")
    common = [token for token, _ in Counter(pieces[0]).most_common(vocabulary - 1)]
    index = {token: i for i, token in enumerate([UNKNOWN, *common])}
    ids = [torch.tensor([index.get(token, 0) for token in piece]) for piece in pieces]
    return Text(ids[0], ids[1], ids[2], tuple(index), f"{train} {level}s of {name}")


def _parts(data: Path | None) -> tuple[list[Callable[[], Iterator[str]]], str]:
    """The texts of training, validation and test, or one text for all; each is read lazily, file by file."""
    if data is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in folder.glob("*.py") if p.stat().st_size > 2000)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        return [_reader([files[i] for i in order])], "the standard library's sources"
    if data.is_file():
        return [_reader([data])], data.name
    if not data.is_dir():
        raise ValueError(f"datasets.text: data must be a text file or a folder, got {str(data)!r}")
    files = sorted(p for p in data.rglob("*") if p.is_file() and p.suffix in (".txt", ".tokens", ".py", ".md", ".raw"))
    named = [[p for p in files if part in p.name] for part in ("train", "valid", "test")]
    if all(named):
        return [_reader(part) for part in named], data.name
    if not files:
        raise ValueError(f"datasets.text: {data} must hold .txt, .tokens, .raw, .md or .py files, found none")
    return [_reader(files)], data.name


def _reader(files: Sequence[Path]) -> Callable[[], Iterator[str]]:
    return lambda: (path.read_text(encoding="utf-8", errors="replace") for path in files)


def _tokens(part: Callable[[], Iterator[str]], level: Literal["word", "character"]) -> Iterator[str]:
    for content in part():
        yield from (match.group() for match in _TOKEN.finditer(content)) if level == "word" else content


def _take(stream: Iterator[str], count: int) -> list[str]:
    taken = []
    for token in stream:
        taken.append(token)
        if len(taken) == count:
            break
    return taken
