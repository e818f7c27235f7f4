"""`mnist` and `fashion_mnist`: the four official IDX files, gzipped or not, in one folder; nothing is downloaded.

LeCun et al. 1998; Xiao et al. 2017. test is the official test set; val is the end of the training set.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dynjax.config import DataConfig, UserError
from dynjax.data.files import find_root
from dynjax.data.labelled import part_of, with_labels
from dynjax.data.pairs import PairSource, check_pairs

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
MOST_BYTES = 2**30  # of an unpacked file; MNIST has 47 MB
GZIP_MOST = 1032  # gzip packs no tighter
IMAGES, LABELS = 2051, 2049  # magic numbers: unsigned bytes in three dimensions and in one


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """55,000 train, 5,000 val or 10,000 test pictures of 28x28 and 10 classes, grey as RGB. Raises UserError."""
    layout = f"{config.name} is four files, train-images-idx3-ubyte.gz, ...; --data.path says where"
    root = find_root(config, layout)
    prefix = "t10k" if split == "test" else "train"
    image_file, label_file = _find(root, f"{prefix}-images-idx3-ubyte"), _find(root, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, IMAGES), read_idx(label_file, LABELS)
    if len(images) != len(labels):
        raise UserError(f"{image_file} has {len(images)} images and {label_file} has {len(labels)} labels")
    part = part_of(split, len(images))
    pairs = with_labels(
        images[part],
        labels[part],
        CLASSES[config.name],
        handed=config.name == "mnist",  # a mirrored 2 is no 2, a mirrored shoe is one
        called=lambda index: f"{label_file}, example {part.start + index}",
    )
    return check_pairs(pairs, config, split)


def _find(root: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")  # some copies are called so
    for file in (root / name, root / f"{name}.gz", root / dotted, root / f"{dotted}.gz"):
        if file.is_file():
            return file
    raise UserError(f"data.path={root}: there is neither {name} nor {name}.gz")


def read_idx(file: Path, magic: int) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of unsigned bytes. Raises UserError for a wrong magic number or length.

    No more is unpacked than its header says, which is no more than MOST_BYTES.
    """
    axes = magic % 256  # the last byte of the magic number
    packed = file.suffix == ".gz"
    try:
        size = file.stat().st_size
        with gzip.open(file) if packed else file.open("rb") as stream:
            head = stream.read(4 + 4 * axes)
            shape = _shape(file, head, magic, axes)
            expected = len(head) + math.prod(shape)
            # No more than can be in the file; and a byte more than it should have, to see whether there is one.
            content = stream.read(min(expected, GZIP_MOST * size if packed else size) + 1 - len(head))
    except (OSError, EOFError, zlib.error) as error:  # gzip's own error is an OSError; EOFError: the file is cut off
        raise UserError(f"{file} cannot be read: {error}") from None
    found = len(head) + len(content)
    if found != expected:
        number = found if found < expected else f"more than {expected}" if packed else size
        raise UserError(f"{file}: {number} bytes, by its header it should have {expected} bytes: not the whole file")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(file: Path, head: bytes, magic: int, axes: int) -> tuple[int, ...]:
    found = struct.unpack(">i", head[:4])[0] if len(head) >= 4 else "missing"
    if found != magic:
        raise UserError(f"{file}: the magic number is {found} and should be {magic}: not the IDX file of that name")
    if len(head) < 4 + 4 * axes:
        raise UserError(
            f"{file}: {len(head)} bytes, by its header it should have {4 + 4 * axes} bytes: not the whole file"
        )
    shape = struct.unpack(f">{axes}I", head[4:])
    if 0 in shape[1:] or math.prod(shape) > MOST_BYTES:
        raise UserError(
            f"{file}: by its header it has {'x'.join(map(str, shape))} bytes; there must be some in each picture, and "
            f"no more than {MOST_BYTES / 1e6:.0f} MB are read"
        )
    return shape
