"""Loaders of the reproductions: the digits and sources at hand, and the papers' own file formats."""

import gzip
import struct

import numpy as np
import pytest
import torch

from dropscope.reproduce import Scale, datasets


def idx(array):
    head = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        if part == "train":
            first = torch.from_numpy(pixels[0]).float() / 255, int(labels[0])
    return tmp_path, first


def test_digits_are_split_the_same_way_each_time():
    a, b = datasets.images(Scale(), 1000), datasets.images(Scale(seed=5), 1000, 100)
    assert a.x.shape == (1000, 1, 8, 8)
    assert a.test_x.shape == (797, 1, 8, 8)
    assert (a.features, a.classes) == (64, 10)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.test_x[:100], b.test_x)
    assert a.x.min() == 0
    assert a.x.max() == 1


def test_mnist_is_read_from_idx_files_plain_and_packed(mnist):
    folder, (pixels, label) = mnist
    got = datasets.images(Scale(data=folder), 5)
    assert got.x.shape == (5, 1, 28, 28)
    assert got.test_x.shape == (3, 1, 28, 28)
    assert torch.equal(got.x[0, 0], pixels)
    assert got.y[0] == label
    with pytest.raises(ValueError, match="7 and 3 images, got 8"):
        datasets.images(Scale(data=folder), 8)


@pytest.mark.parametrize(("labels", "names"), [(1, "data_batch_{}.bin test_batch.bin"), (2, "train.bin test.bin")])
def test_cifar_is_read_from_its_binary_version(tmp_path, labels, names):
    rng = np.random.default_rng(1)
    train, test = names.split()
    parts = [train.format(i) for i in range(1, 6)] if "{" in train else [train]
    records = rng.integers(0, 256, (4, labels + 3072)).astype(np.uint8)
    for name in [*parts, test]:
        (tmp_path / name).write_bytes(records.tobytes())
    got = datasets.images(Scale(data=tmp_path), 4)
    assert got.x.shape == (4, 3, 32, 32)
    assert got.y.tolist() == records[:, labels - 1].tolist()
    assert torch.equal(got.x[1].flatten(), torch.from_numpy(records[1, labels:]).float() / 255)


def test_broken_files_are_named(tmp_path, mnist):
    folder, _ = mnist
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x0d\x01" + bytes(8))
    with pytest.raises(ValueError, match="idx file of unsigned bytes"):
        datasets.images(Scale(data=folder), 5)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="must hold MNIST's idx files"):
        datasets.images(Scale(data=empty), 5)
    with pytest.raises(ValueError, match="must be a folder"):
        datasets.images(Scale(data=empty / "none"), 5)


def test_the_standard_library_is_a_corpus():
    got = datasets.text(Scale(), 5000, 500, vocabulary=400)
    assert [len(part) for part in (got.train, got.valid, got.test)] == [5000, 500, 500]
    assert len(got.vocabulary) == 400
    assert got.vocabulary[0] == datasets.UNKNOWN
    assert int(got.train.max()) == 399
    again = datasets.text(Scale(seed=3), 5000, 500, vocabulary=400)
    assert torch.equal(got.valid, again.valid)


def test_a_corpus_of_the_users(tmp_path):
    whole = tmp_path / "war.txt"
    whole.write_text("to be or not to be, 12 times\n" * 3)
    got = datasets.text(Scale(data=whole), 11, 11, level="word")
    words = [got.vocabulary[i] for i in got.train]
    assert words == ["to", "be", "or", "not", "to", "be", ",", "1", "2", "times", "\n"]
    assert torch.equal(got.train, got.valid)
    parts = tmp_path / "wiki"
    parts.mkdir()
    for part, content in (("train", "a b a"), ("valid", "b c"), ("test", "a a")):
        (parts / f"wiki.{part}.tokens").write_text(content)
    got = datasets.text(Scale(data=parts), 3, 2)
    assert [got.vocabulary[i] for i in got.valid] == ["b", datasets.UNKNOWN]
    letters = datasets.text(Scale(data=parts), 5, 3, level="character")
    assert [letters.vocabulary[i] for i in letters.train] == list("a b a")
    with pytest.raises(ValueError, match="got 3 of 4 tokens"):
        datasets.text(Scale(data=parts), 4, 2)
    with pytest.raises(ValueError, match="text file or a folder"):
        datasets.text(Scale(data=parts / "none"), 4, 2)
