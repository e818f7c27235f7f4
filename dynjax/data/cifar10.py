"""`cifar10`: 32x32 pictures of 10 classes from any of its forms: Python pickles, binary files, or JPEGs in an .npz.

Krizhevsky 2009. test is the official test set; val is the last 5,000 of the training set, as papers hold it out, or in
an .npz the last tenth of each class. Nothing is downloaded. Raw pictures lie as 1,024 red, 1,024 green and 1,024 blue
values, row by row.
"""

import codecs
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dynjax.config import UserError
from dynjax.data.labelled import make_labelled, part_of
from dynjax.data.pairs import Pair, PairSource, check_pairs
from dynjax.data.pictures import open_picture, read_image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
PIXELS = 3 * SIDE * SIDE
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
FORMS = "data_batch_1 to 5 and test_batch (Python pickles or .bin), or one .npz of JPEGs"


def make_cifar10(
    path: str,
    split: str,
    *,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> PairSource:
    """45,000 train, 5,000 val or 10,000 test pictures; a JPEG set says so in its name. Raises UserError."""
    options = {"split": split, "size": size, "limit": limit, "on_error": on_error}
    if not path:
        raise UserError("data.name=cifar10 needs a folder or an .npz file: give --data.path PATH")
    root = Path(path).expanduser()
    if root.is_file() and root.suffix == ".npz":
        return _from_npz(root, options)
    if not root.is_dir():
        raise UserError(
            f"data.path={path}: no folder and no .npz file {root}; cifar10 is {FORMS}; --data.path says where"
        )
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / TRAIN[0]).is_file() or (folder / TEST).is_file():
            return _from_batches(folder, "", read_pickle, options)
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / f"{TRAIN[0]}.bin").is_file() or (folder / f"{TEST}.bin").is_file():
            return _from_batches(folder, ".bin", read_binary, options)
    found = sorted(root.glob("*.npz"))
    if len(found) > 1:
        raise UserError(f"data.path={path}: {len(found)} .npz files ({found[0].name}, ...): name one of them")
    if not found:
        raise UserError(f"data.path={path}: not found in {root}: {FORMS}")
    return _from_npz(found[0], options)


# Raw pictures

Batch = tuple[UInt8[np.ndarray, "N 3072"], UInt8[np.ndarray, "N"]]


def _from_batches(folder: Path, suffix: str, read: Callable[[Path], Batch], options: dict[str, Any]) -> PairSource:
    names = (TEST,) if options["split"] == "test" else TRAIN
    batches = [read(folder / f"{name}{suffix}") for name in names]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    part = part_of(options["split"], len(images), len(images))
    cut = slice(part.start, part.stop)
    return make_labelled(
        np.ascontiguousarray(images[cut].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)),
        labels[cut],
        name="cifar10",
        classes=CLASSES,
        handed=False,
        called=lambda index: f"{folder}, {options['split']} example {index}",
        **options,
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
    content = _read(file)
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()  # written by Python 2: text comes as bytes
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a {type(found).__name__}, it should be a dict with data and labels")
    found = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
    images, labels = found.get("data"), found.get("labels")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (PIXELS,):
        raise UserError(f"{file}: data should be an array of bytes (N, {PIXELS})")
    try:
        labels = np.array(labels, np.uint8)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: labels should be a list of numbers from 0 to 9") from None
    if labels.shape != images.shape[:1]:
        raise UserError(f"{file}: {len(images)} images and {labels.size} labels")
    return images, labels


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old pickle is a call of codecs.encode; only this one is answered."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


# Under the old and new names of NumPy's modules; looked up here, so that a file imports nothing.
_MAKE_ARRAY = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(0).__reduce_ex__(5)[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _MAKE_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _MAKE_ARRAY,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    """Builds arrays, bytes, text, numbers, lists and dicts; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in CIFAR-10 and was not run")
        return _ALLOWED[module, name]


# JPEGs


def _from_npz(file: Path, options: dict[str, Any]) -> PairSource:
    """`header`, `{train,test}_{scans,offsets,labels}`, `class_names`: picture i is header + scans[offsets[i:i + 2]].

    Such files may be sorted by class, which the official ones are not: so val is the last tenth of each class, and the
    pictures of a split come in a random order, which is always the same.
    """
    split = options["split"]
    official = "test" if split == "test" else "train"
    header, scans, offsets, labels, names = _arrays(file, official)
    part = _shares(split, labels)
    start = header.tobytes()

    def called(index: int) -> str:
        return f"{file}, {official} example {part[index]}"

    def read(index: int) -> Pair:
        first, last = offsets[part[index] : part[index] + 2]
        return read_image(io.BytesIO(start + scans[first:last].tobytes()), called(index)), np.int32(labels[part[index]])

    quality = _quality(start)
    return check_pairs(
        read,
        len(part),
        name="cifar10",
        classes=tuple(str(name) for name in names),
        target="label",
        called=called,
        note=f"(JPEG quality {quality})" if quality else "(JPEG)",
        **options,
    )


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
            missing = [key for key in keys if key not in stored]
            found = tuple(stored[key] for key in keys if key in stored)
    except Exception as error:  # a damaged archive raises OSError, ValueError, BadZipFile, zlib.error and more
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    if missing:
        raise UserError(f"{file}: no array {', '.join(missing)}; it should hold {', '.join(keys)}")
    header, scans, offsets, labels, _ = found
    for key, array, kinds in zip(keys[:-1], found, ("u", "u", "ui", "ui"), strict=False):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise UserError(f"{file}: {key} is {array.dtype} {array.shape}, it should be a row of whole numbers")
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
