"""`cifar10`: 32x32 pictures of 10 classes from any of its forms: Python pickles, binary files, or JPEGs in an .npz.

Krizhevsky 2009. test is the official test set; val is the last 5,000 of the training set, as papers hold it out, or in
an .npz the last tenth of each class. Nothing is downloaded. Raw pictures lie as 1,024 red, 1,024 green and 1,024 blue
values, row by row.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data.labelled import part_of, with_labels
from dynjax.data.pairs import Pair, Pairs, PairSource, check_pairs
from dynjax.data.pictures import open_picture, read_image
from dynjax.data.unpickle import read_data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PIXELS = 3 * SIDE * SIDE
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
MOST_BYTES = 2**28  # of a file of raw pictures: nine official batches
MOST_UNPACKED = 2**30  # bytes of an .npz without its compression
FORMS = "data_batch_1 to 5 and test_batch (Python pickles or .bin), or one .npz of JPEGs"


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """45,000 train, 5,000 val or 10,000 test pictures; a JPEG set says so in its name. Raises UserError."""
    path = config.path
    if not path:
        raise UserError("data.name=cifar10 needs a folder or an .npz file: give --data.path PATH")
    root = Path(path).expanduser()
    if not root.is_dir() and not (root.is_file() and root.suffix == ".npz"):
        raise UserError(
            f"data.path={path}: no folder and no .npz file {root}; cifar10 is {FORMS}; --data.path says where"
        )
    return check_pairs(_find(root, split), config, split)


def _find(root: Path, split: str) -> Pairs:
    """A split in whichever form lies there."""
    if root.is_file():
        return _from_npz(root, split)
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / TRAIN[0]).is_file() or (folder / TEST).is_file():
            return _from_batches(folder, "", read_pickle, split)
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / f"{TRAIN[0]}.bin").is_file() or (folder / f"{TEST}.bin").is_file():
            return _from_batches(folder, ".bin", read_binary, split)
    found = sorted(root.glob("*.npz"))
    if len(found) > 1:
        raise UserError(f"data.path={root}: {len(found)} .npz files ({found[0].name}, ...): name one of them")
    if not found:
        raise UserError(f"data.path={root}: not found in {root}: {FORMS}")
    return _from_npz(found[0], split)


# Raw pictures

Batch = tuple[UInt8[np.ndarray, "N 3072"], UInt8[np.ndarray, " N"]]


def _from_batches(folder: Path, suffix: str, read: Callable[[Path], Batch], split: str) -> Pairs:
    names = (TEST,) if split == "test" else TRAIN
    batches = [read(folder / f"{name}{suffix}") for name in names]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    part = part_of(split, len(images))
    pictures = np.ascontiguousarray(images[part].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return with_labels(
        pictures, labels[part], CLASSES, handed=False, called=lambda index: f"{folder}, {split} example {index}"
    )


def read_binary(file: Path) -> Batch:
    """Pictures and labels of one .bin file: records of a label and 3,072 values. Raises UserError."""
    record = 1 + PIXELS
    content = _read(file)
    if not content or len(content) % record:
        raise UserError(f"{file}: {len(content)} bytes are no whole number of pictures of {record} bytes each")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, 1:], records[:, 0]


def read_pickle(file: Path) -> Batch:
    """Pictures and labels of one pickle, a dict with `data` and `labels`; runs no code in it. Raises UserError."""
    try:
        found = read_data(_read(file))
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a {type(found).__name__}, it should be a dict with data and labels")
    found = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in found.items()}
    images, labels = found.get("data"), found.get("labels")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (PIXELS,):
        raise UserError(f"{file}: data should be an array of bytes (N, {PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise UserError(f"{file}: labels should be a list of numbers from 0 to 9")
    labels = np.array(labels, np.uint8)
    if labels.shape != images.shape[:1]:
        raise UserError(f"{file}: {len(images)} images and {labels.size} labels")
    return images, labels


def _read(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise UserError(
                f"{file}: {size / 1e6:.0f} MB; a batch of CIFAR-10 has 31, no more than {MOST_BYTES / 1e6:.0f} are read"
            )
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


# JPEGs


def _from_npz(file: Path, split: str) -> Pairs:
    """`header`, `{train,test}_{scans,offsets,labels}`, `class_names`: picture i is header + scans[offsets[i:i + 2]].

    Such files may be sorted by class, which the official ones are not: so val is the last tenth of each class, and the
    pictures of a split come in a random order, which is always the same.
    """
    official = "test" if split == "test" else "train"
    header, scans, offsets, labels, names = _arrays(file, official)
    part = _shares(split, labels)
    start = header.tobytes()

    def called(index: int) -> str:
        return f"{file}, {official} example {part[index]}"

    def read(index: int) -> Pair:
        first, last = offsets[part[index] : part[index] + 2]
        return read_image(io.BytesIO(start + scans[first:last].tobytes()), called(index)), np.int64(labels[part[index]])

    quality = _quality(start)
    note = f"(JPEG quality {quality})" if quality else "(JPEG)"
    return Pairs(read, len(part), tuple(map(str, names)), called=called, note=note)


def _shares(split: str, labels: np.ndarray) -> np.ndarray:
    """Indices of a split into the training or test pictures."""
    indices = np.arange(len(labels))
    if split != "test":
        held_out = np.zeros(len(labels), bool)
        for label in np.unique(labels):
            of_class = np.flatnonzero(labels == label)
            held_out[of_class[len(of_class) * 9 // 10 :]] = True
        indices = indices[held_out == (split == "val")]
    return np.random.default_rng(10).permutation(indices)


def _arrays(file: Path, official: str) -> tuple[np.ndarray, ...]:
    keys = ("header", *(f"{official}_{part}" for part in ("scans", "offsets", "labels")), "class_names")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            unpacked = sum(member.file_size for member in stored.zip.infolist())
            if unpacked > MOST_UNPACKED:
                raise ValueError(
                    f"unpacked it has {unpacked / 1e6:.0f} MB, no more than {MOST_UNPACKED / 1e6:.0f} are read"
                )
            missing = [key for key in keys if key not in stored]
            found = tuple(np.asarray(stored[key]) for key in keys if key in stored)
    except Exception as error:  # a damaged archive raises OSError, ValueError, BadZipFile, zlib.error and more
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    if missing:
        raise UserError(f"{file}: no array {', '.join(missing)}; it should hold {', '.join(keys)}")
    header, scans, offsets, labels, _ = found
    for key, array, kinds in zip(keys, found, ("u", "u", "ui", "ui", "US"), strict=True):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            what = "text" if key == "class_names" else "whole numbers"
            raise UserError(f"{file}: {key} is {array.dtype} {array.shape}, it should be a row of {what}")
    if header.dtype != np.uint8 or scans.dtype != np.uint8:
        raise UserError(f"{file}: header and scans should be bytes, they are {header.dtype} and {scans.dtype}")
    if len(offsets) != len(labels) + 1:
        raise UserError(f"{file}: {len(offsets) - 1} {official} images and {len(labels)} labels")
    if offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) <= 0).any() or offsets[-1] != len(scans):
        raise UserError(f"{file}: {keys[2]} do not cut the {len(scans)} bytes of {keys[1]} into pictures")
    return found


def _quality(header: bytes) -> int | None:
    """The quality at which a JPEG with this header was saved, by its quantisation tables; None where none fits."""

    def tables(content: bytes) -> dict[int, list[int]]:
        with open_picture(io.BytesIO(content), ("JPEG",)) as picture:
            return {key: list(table) for key, table in getattr(picture, "quantization", {}).items()}

    def saved(quality: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
        return stream.getvalue()

    try:
        wanted = tables(header)
    except Exception:  # no picture: said when the first one is read
        return None
    return next((quality for quality in range(100, 0, -1) if tables(saved(quality)) == wanted), None)
