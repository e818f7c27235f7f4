"""Arrays that take long to make, kept in files under a checksum of what they are made of."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
_OWN = "checksum"
"""Of a file's arrays, by which half of one, or one that was changed, is known."""


def folder() -> Path:
    """`DYNJAX_CACHE`, or ~/.cache/dynjax where it is not set."""
    given = os.environ.get("DYNJAX_CACHE")
    return Path(given) if given else Path("~/.cache/dynjax")


def checksum(parts: Iterable[bytes | str | np.ndarray]) -> str:
    """Of texts, bytes, and arrays with their shapes and types."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = f"{part.dtype.str}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        content = part.encode() if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "little"))  # where one part ends and the next begins
        found.update(content)
    return found.hexdigest()


def of_arrays(arrays: Arrays) -> str:
    """The checksum of arrays and their names."""
    return checksum(part for name in sorted(arrays) for part in (name, arrays[name]))


def cached(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of the file `name` in the folder of features; made, and kept there, where it is not there whole.

    What cannot be read or written is made anew every time.
    """
    try:
        file = folder().expanduser() / "features" / f"{name}.npz"
    except RuntimeError:  # nobody knows a home
        return make()
    found = _load(file)
    if found is None:
        found = make()
        _store(file, found)
    return found


def _load(file: Path) -> Arrays | None:
    try:
        # Opened here, since np.load leaves a damaged file open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            found = dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    own = found.pop(_OWN, None)
    return found if own is not None and str(own) == of_arrays(found) else None


def _store(file: Path, arrays: Arrays) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")  # another process may write the same
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as stream:
                np.savez(stream, **{_OWN: np.asarray(of_arrays(arrays)), **arrays})  # type: ignore[arg-type]
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        pass  # a full disk, or a folder of somebody else: the cache is a convenience
