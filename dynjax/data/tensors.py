"""Weights by name out of a file that others wrote: `.npz`, `.safetensors`, or what `torch.save` writes."""

import io
import json
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from dynjax.config import UserError
from dynjax.data.pictures import one_line
from dynjax.data.torch_file import MOST_BYTES, from_torch

Tensors = dict[str, Shaped[np.ndarray, "..."]]
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1"}
"""Of safetensors' types those that NumPy has."""
BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, RecursionError)


def read_tensors(file: Path) -> Tensors:
    """Nothing of the file is run. Raises UserError naming it."""
    read = {".npz": _from_npz, ".safetensors": _from_safetensors}.get(file.suffix, from_torch)
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size} bytes, and no more than {MOST_BYTES / 1e6:.0f} MB are read")
        return read(file.read_bytes())
    except (*BROKEN, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"no weights can be read from {file}: {one_line(error)}") from None


def _from_npz(content: bytes) -> Tensors:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
            raise ValueError(f"unpacked it has more than {MOST_BYTES / 1e6:.0f} MB")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return dict(stored)


def _from_safetensors(content: bytes) -> Tensors:
    """The length of a header in JSON, the header, and all bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    if not 8 < start <= len(content):
        raise ValueError("not the whole file")
    found = {}
    for name, about in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        kind, shape, (first, last) = np.dtype(TYPES[about["dtype"]]), tuple(about["shape"]), about["data_offsets"]
        if not all(type(each) is int and each >= 0 for each in (*shape, first, last)):
            raise ValueError(f"{ascii(name)[:60]} has a shape that is no lengths")
        if last > len(content) - start or last - first != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{ascii(name)[:60]} is not where the header says")
        found[name] = np.frombuffer(content[start + first : start + last], kind).reshape(shape).copy()
    return found
