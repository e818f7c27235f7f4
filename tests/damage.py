"""Damaged files of each kind that sources read: the same ones for the same seed, tried one by one.

`names()` are the kinds; `short_of(name, folder, count, seed)` writes and reads `count` damaged files of one, and says
what it met that is no plain refusal: another error than UserError or BadFile, or a message of several lines.
"""

import dataclasses
import gzip
import io
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import cifar10, mnist
from dynjax.data.pictures import BadFile, read_image, read_mask

LARGE = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\x00" * 4, b"\x80\x00\x00\x00", b"\xff" * 8)


def damaged(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` spoilt copies: bits turned, bytes set, parts cut out, doubled, moved or cut off, lengths made huge."""
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        spoilt = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            if not spoilt:
                break
            # Half of it at the start, where headers are.
            end = len(spoilt) if rng.random() < 0.5 else min(len(spoilt), 120)
            at, length = int(rng.integers(end)), int(rng.integers(1, 40))
            kind = rng.integers(7)
            if kind == 0:
                spoilt[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                spoilt[at] = int(rng.integers(256))
            elif kind == 2:
                del spoilt[at : at + length]
            elif kind == 3:
                spoilt[at:at] = spoilt[at : at + length]
            elif kind == 4:
                part = spoilt[at : at + length]
                del spoilt[at : at + length]
                place = int(rng.integers(len(spoilt) + 1))
                spoilt[place:place] = part
            elif kind == 5:
                del spoilt[at:]
            else:
                large = LARGE[int(rng.integers(len(LARGE)))]
                spoilt[at : at + len(large)] = large
        yield bytes(spoilt)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A whole file's content, what its name ends in, and what reads it."""

    content: bytes
    suffix: str
    read: Callable[[Path], Any]


def _picture(form: str, mode: str = "RGB", **options: Any) -> bytes:
    values = np.random.default_rng(1).integers(0, 256, (9, 11, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def _turned() -> Any:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _idx(*shape: int) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(range(int(np.prod(shape))))


def _npz() -> bytes:
    jpeg, stream = _picture("JPEG"), io.BytesIO()
    start = jpeg.index(b"\xff\xda") + 14
    arrays = {"header": np.frombuffer(jpeg[:start], np.uint8), "class_names": np.array(["a", "b"])}
    for split in ("train", "test"):
        scan = np.frombuffer(jpeg[start:], np.uint8)
        arrays |= {f"{split}_scans": np.tile(scan, 2), f"{split}_offsets": np.arange(3, dtype=np.int32) * len(scan)}
        arrays[f"{split}_labels"] = np.arange(2, dtype=np.uint8)
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _pickle(protocol: int) -> bytes:
    data = np.random.default_rng(2).integers(0, 256, (2, cifar10.PIXELS), np.uint8)
    batch = {b"data": data, b"labels": [3, 9], b"batch_label": b"batch 1 of 5", b"filenames": [b"a.png", b"b.png"]}
    return pickle.dumps(batch, protocol)


def kinds() -> dict[str, Kind]:
    """A small whole file of each kind."""
    found = {}
    for form, suffix in (("PNG", ".png"), ("JPEG", ".jpg"), ("BMP", ".bmp"), ("TIFF", ".tif"), ("WEBP", ".webp")):
        found[f"{form} picture"] = Kind(_picture(form), suffix, read_image)
    found["turned JPEG picture"] = Kind(_picture("JPEG", exif=_turned()), ".jpg", read_image)
    found["packed TIFF picture"] = Kind(_picture("TIFF", compression="tiff_lzw"), ".tif", read_image)
    for form, suffix in (("PNG", ".png"), ("BMP", ".bmp"), ("TIFF", ".tif")):
        for mode in ("L", "P", "1"):
            found[f"{form} mask, {mode}"] = Kind(_picture(form, mode), suffix, read_mask)
    idx = _idx(3, 5, 4)
    found["IDX"] = Kind(idx, "", lambda file: mnist.read_idx(file, mnist.IMAGES))
    found["IDX, gzip"] = Kind(gzip.compress(idx, mtime=0), ".gz", lambda file: mnist.read_idx(file, mnist.IMAGES))
    for protocol in (0, 2, 5):
        found[f"CIFAR-10 pickle {protocol}"] = Kind(_pickle(protocol), "", cifar10.read_pickle)
    found["CIFAR-10 binary"] = Kind(bytes(2 * (1 + cifar10.PIXELS)), ".bin", cifar10.read_binary)
    found["CIFAR-10 npz"] = Kind(
        _npz(), ".npz", lambda file: cifar10.make(DataConfig(name="cifar10", path=str(file)), "test")
    )
    return found


def names() -> list[str]:
    return list(kinds())


def short_of(name: str, folder: Path, count: int, seed: int = 0) -> list[str]:
    """What went wrong with `count` damaged files of a kind, a line each; empty where all were read or refused."""
    kind, wrong = kinds()[name], []
    for number, content in enumerate(damaged(kind.content, count, seed)):
        file = folder / f"damaged{kind.suffix}"
        file.write_bytes(content)
        try:
            kind.read(file)
        except (UserError, BadFile) as error:
            if "\n" in str(error) or file.name not in str(error):
                wrong.append(f"{name}, {seed}, {number}: {str(error)!r}")
        except BaseException as error:
            wrong.append(f"{name}, {seed}, {number}: {type(error).__name__}: {error}")
    return wrong
