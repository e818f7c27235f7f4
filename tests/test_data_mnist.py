"""IDX files, made here and the real ones."""

import gzip
import pathlib
import struct
import tracemalloc

import numpy as np
import pytest

from dynjax.config import DataConfig, UserError
from dynjax.data import make_source
from dynjax.data.source import size_of, target_of

REAL = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(root, prefix, count, compress=False):
    """Picture i is grey i, its label i modulo 10."""
    files = {
        "images-idx3": np.broadcast_to(np.arange(count)[:, None, None], (count, 6, 5)),
        "labels-idx1": np.arange(count) % 10,
    }
    for name, array in files.items():
        content = idx(array)
        file = root / f"{prefix}-{name}-ubyte{'.gz' * compress}"
        file.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train", 40)
    write(tmp_path, "t10k", 7, compress=True)
    return tmp_path


def read(root, split="train", name="mnist", **options):
    return make_source(DataConfig(name=name, path=str(root), **options), split)


def test_splits_pictures_and_labels(folder):
    train, val, test = (read(folder, split) for split in ("train", "val", "test"))
    for source, first, count in ((train, 0, 36), (val, 36, 4), (test, 0, 7)):
        assert len(source) == count and size_of(source) == (6, 5) and target_of(source.spec) == "label"
        for index in range(count):
            example = source[index]
            assert (example["image"] == first + index).all() and example["image"].shape == (6, 5, 3)
            assert example["label"] == (first + index) % 10
    assert test.describe() == "mnist test: 7 pictures 6x5, 10 classes"
    assert read(folder, size=(12, 12), examples=9).describe() == "mnist train: 9 pictures 12x12, 10 classes"


def test_a_mirrored_shoe_is_one_and_a_mirrored_digit_is_none(folder):
    assert read(folder).handed and not read(folder, name="fashion_mnist").handed
    assert read(folder, name="fashion_mnist").classes[9] == "Ankle boot"


def spoil(file, change):
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    "file, change, text",
    [
        ("train-images-idx3-ubyte", lambda c: c[:-1], r"images-idx3-ubyte: 1215 bytes, .* have 1216 bytes"),
        ("train-images-idx3-ubyte", lambda c: c + b"0", r"images-idx3-ubyte: 1217 bytes, .* have 1216 bytes"),
        ("train-images-idx3-ubyte", lambda c: c[:9], r"images-idx3-ubyte: 9 bytes, .* have 16 bytes"),
        ("train-images-idx3-ubyte", lambda c: c[:3], r"magic number is missing and should be 2051"),
        ("train-images-idx3-ubyte", lambda c: idx(range(40)), "magic number is 2049 and should be 2051"),
        ("train-labels-idx1-ubyte", lambda c: c[3:], "magic number is .* and should be 2049"),
        ("train-labels-idx1-ubyte", lambda c: idx(range(5)), "has 40 images and .*labels-idx1-ubyte has 5 labels"),
        ("train-labels-idx1-ubyte", lambda c: c[:11] + b"\x0a" + c[12:], "ubyte, example 3: label 10, allowed are 0"),
        ("train-labels-idx1-ubyte", lambda c: idx([]), r"has 40 images and .* has 0 labels"),
    ],
)
def test_broken_files_are_one_line(folder, file, change, text):
    spoil(folder / file, change)
    with pytest.raises(UserError, match=text) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda c: c[:-20], lambda c: b"no gzip", lambda c: c[:20] + b"\xff" * 9 + c[29:]])
def test_broken_gzip(folder, change):
    spoil(folder / "t10k-images-idx3-ubyte.gz", change)
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        read(folder, "test")


def test_missing_files(folder, tmp_path):
    with pytest.raises(UserError, match=r"data\.name=fashion_mnist needs a folder: give --data\.path"):
        read("", name="fashion_mnist")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        read(tmp_path / "nowhere")
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"neither train-labels-idx1-ubyte nor train-labels-idx1-ubyte\.gz"):
        read(folder)
    assert len(read(folder, "test")) == 7


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_sets(name):
    root = REAL / name
    if not root.is_dir():
        pytest.skip(f"the real {name} is not in {root}")
    val, test = read(root, "val", name), read(root, "test", name)
    assert (len(val), len(test)) == (5000, 10000) and size_of(test) == (28, 28)
    assert (np.bincount(test.memory[1]) == 1000).all() == (name == "fashion_mnist")
    ink = [val.memory[0][val.memory[1] == label].mean() for label in range(10)]
    least = {"mnist": "1", "fashion_mnist": "Sandal"}[name]
    assert val.classes[int(np.argmin(ink))] == least


@pytest.mark.parametrize("compress", [False, True])
def test_dotted_names(folder, compress):
    write(folder, "t10k", 7, compress)
    for file in folder.glob("t10k*"):
        if (file.suffix == ".gz") == compress:
            file.rename(file.with_name(file.name.replace("-idx", ".idx")))
        else:
            file.unlink()
    assert len(read(folder, "test")) == 7


def test_no_more_is_unpacked_than_the_header_says(folder):
    file = folder / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(idx(np.zeros((7, 6, 5))) + bytes(60_000_000), 1))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"gz: more than 226 bytes, by its header it should have 226 bytes"):
        read(folder, "test")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "shape, text",
    [
        ((60000, 2**16, 2**16), r"60000x65536x65536 bytes; .* no more than 1074 MB are read"),
        ((2**32 - 1,) * 3, "no more than 1074 MB are read"),
        ((40, 0, 0), "40x0x0 bytes; there must be some in each picture"),
        ((1000, 1000, 1000), "1216 bytes, by its header it should have 1000000016"),
    ],
)
def test_headers_that_promise_too_much(folder, shape, text):
    spoil(folder / "train-images-idx3-ubyte", lambda c: c[:4] + struct.pack(">3I", *shape) + c[16:])
    with pytest.raises(UserError, match=text):
        read(folder)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress((folder / "train-images-idx3-ubyte").read_bytes()))
    with pytest.raises(UserError, match=text):
        read(folder, "test")
