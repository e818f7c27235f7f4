"""Tensors out of a file of `torch.save`, without torch and without running what the file names.

Both of its forms: an archive (since PyTorch 1.6) of a pickle and the bytes of each storage, and the older one, of five
pickles after each other and then the storages. Of what a pickle can name there are tensors and dicts of them; all else
is refused (see `dynjax.data.unpickle`).
"""

import io
import math
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from dynjax.data.unpickle import Named, Reader, read_pickle

MOST_BYTES = 2**30  # of a file, and of an archive's parts; Inception has 95 MB
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
NAMES = {
    "collections OrderedDict": "dict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
    **{f"torch {name}": name for name in TYPES},
}


class _Stored(NamedTuple):
    """A storage, which lies elsewhere in the file."""

    key: str
    kind: np.dtype
    length: int


class _Tensor(NamedTuple):
    """Where in a storage the numbers of a tensor lie."""

    storage: _Stored
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Storages = Callable[[_Stored], bytes]


def from_torch(content: bytes) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a state dict by name, also of one under "state_dict". Raises ValueError, or what `zipfile`
    does."""
    return _from_archive(content) if zipfile.is_zipfile(io.BytesIO(content)) else _from_stream(content)


def _from_archive(content: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if sum(info.file_size for info in parts.values()) > MOST_BYTES:
            raise ValueError(f"unpacked it has more than {MOST_BYTES / 1e6:.0f} MB")

        def part(name: str) -> bytes:
            if name not in parts:
                raise ValueError(f"{name} is not in the archive")
            return archive.read(parts[name])

        if "byteorder" in parts and part("byteorder") != b"little":
            raise ValueError("its bytes are in the other order")
        (value,) = _pickles(io.BytesIO(part("data.pkl")), 1)
        return _tensors(value, lambda stored: part(f"data/{stored.key}"))


def _from_stream(content: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(content)
    magic, protocol = _pickles(stream, 2)
    if magic != MAGIC or protocol != PROTOCOL:
        raise ValueError("it does not begin as files of torch.save do")
    system, value, keys = _pickles(stream, 3)
    if not isinstance(system, dict) or system.get("little_endian") is not True or not isinstance(keys, list):
        raise ValueError("its bytes are in the other order")
    wanted = {tensor.storage.key: tensor.storage for tensor in _state(value).values()}
    found: dict[str, bytes] = {}
    for key in keys:
        if key not in wanted:
            raise ValueError("a storage that no tensor lies in")
        count, size = int.from_bytes(stream.read(8), "little"), wanted[key].kind.itemsize
        if count != wanted[key].length:
            raise ValueError("a storage of another size than its tensor says")
        found[key] = stream.read(count * size)
    return _tensors(value, lambda stored: found.get(stored.key, b""))


def _pickles(stream: io.BytesIO, number: int) -> list[Any]:
    return [read_pickle(stream, _StateReader(stream.getbuffer().nbytes)) for _ in range(number)]


class _StateReader(Reader):
    """Tensors as what is said of them."""

    names = NAMES
    of = "a file of tensors"

    def step(self, name: str, argument: Any) -> None:
        if name == "BINPERSID":
            self.stack.append(_stored(self.pop()))
        elif name == "BUILD":  # a dict's attributes: the versions of the modules
            self.pop()
            self.top(dict)
        else:
            super().step(name, argument)

    def called(self, what: Any, given: Any) -> Any:
        kind = what.name if isinstance(what, Named) else ""
        if kind == "dict" and given == ():
            return {}
        if kind == "tensor" and isinstance(given, tuple) and len(given) >= 4:
            return _tensor(*given[:4])
        if kind == "parameter" and isinstance(given, tuple) and given and isinstance(given[0], _Tensor):
            return given[0]
        raise ValueError("a call of something that makes no tensor")


def _stored(given: Any) -> _Stored:
    """What the pickle says where it means a storage: a word, its type, its key, its device, its length, and maybe a
    part of it, which nobody has written for years."""
    if not isinstance(given, tuple) or len(given) not in (5, 6) or given[0] != "storage" or any(given[5:]):
        raise ValueError("something outside of the file that is no storage")
    _, kind, key, _, count = given[:5]
    if not isinstance(kind, Named) or kind.name not in TYPES or not isinstance(key, str) or type(count) is not int:
        raise ValueError("a storage whose description makes no sense")
    return _Stored(key, np.dtype(TYPES[kind.name]), count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """Raises ValueError where it reaches out of its storage, or has more numbers than that."""
    if not isinstance(storage, _Stored) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if not all(type(each) is int and each >= 0 for each in numbers) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("a tensor whose shape is no lengths")
    last = offset + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if 0 not in shape and (last >= storage.length or math.prod(shape) > storage.length):
        raise ValueError("a tensor that is larger than its storage")
    return _Tensor(storage, offset, shape, strides)


def _state(value: Any) -> dict[str, _Tensor]:
    inner = value.get("state_dict", value) if isinstance(value, dict) else value
    if not isinstance(inner, dict) or not inner:
        raise ValueError("it has no dict of tensors")
    for name, tensor in inner.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f"{ascii(name)[:60]} is no tensor")
    return inner


def _tensors(value: Any, content_of: Storages) -> dict[str, np.ndarray]:
    found = {}
    for name, (storage, offset, shape, strides) in _state(value).items():
        content, size = content_of(storage), storage.kind.itemsize
        if len(content) != storage.length * size:
            raise ValueError("not the whole file")
        flat = np.frombuffer(content, storage.kind)[offset:] if 0 not in shape else np.empty(0, storage.kind)
        steps = [step * size for step in strides]
        found[name] = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).copy()
    return found
