"""Damaged JSON documents of every kind, the same ones for a seed: each is read, or refused in one line."""

import collections
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from dynjax.config import UserError

VALUES = ("", None, -1, 0, 0.5, 10**9, 10**30, True, [], {}, "x", "a\0b", "\ud800", [[[]]], {"a": [{}]}, [10**9, 10**9])
"""What takes the place of a value."""
RAW = ("1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "[" * 100_000, '"\\ud800"', "tru", "'x'")
"""The same, as text that json.dumps does not write."""


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of the document and of everything in it."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield from places(each, (*path, key))


def mutants(text: str, seed: int = 0, count: int | None = None) -> list[tuple[str, bytes]]:
    """What was done to a JSON document, and the bytes that it became: `count` of all that there are (None: all)."""
    found = [*_changed(json.loads(text)), *_spoiled(text.encode())]
    if count is not None and count < len(found):
        found = random.Random(seed).sample(found, count)
    return found


def _changed(document: Any) -> Iterator[tuple[str, bytes]]:
    mark = "\x01mark\x01"
    for path in places(document):
        name = ".".join(map(str, path)) or "all"
        for value in VALUES:
            yield f"{name} = {value!r}", json.dumps(_put(document, path, value)).encode()
        marked = json.dumps(_put(document, path, mark))
        for raw in RAW:
            yield f"{name} = {raw[:20]}", marked.replace(json.dumps(mark), raw).encode()
        if path and isinstance(path[-1], str):
            yield f"{name} is gone", json.dumps(_without(document, path)).encode()
            key, twice = json.dumps(path[-1]), json.dumps(_put(document, path, mark))
            yield f"{name} is there twice", twice.replace(json.dumps(mark), f"0, {key}: 1").encode()
        if isinstance(_at(document, path), dict):
            yield f"{name} has more", json.dumps(_put(document, (*path, "more"), 1)).encode()


def _spoiled(content: bytes) -> Iterator[tuple[str, bytes]]:
    for share in (0, 0.1, 0.5, 0.9):
        yield f"cut at {share}", content[: int(share * len(content))]
    yield "a mark of the byte order", b"\xef\xbb\xbf" + content
    yield "UTF-16", content.decode().encode("utf-16")
    yield "UTF-32", content.decode().encode("utf-32")
    yield "zeros", bytes(len(content))
    yield "twice", content * 2
    for byte in (0x00, 0x80, 0xFF):
        for share in (0.2, 0.5, 0.8):
            place = int(share * len(content))
            yield f"byte {byte:02x} at {share}", content[:place] + bytes([byte]) + content[place + 1 :]


def _at(document: Any, path: tuple) -> Any:
    for key in path:
        document = document[key]
    return document


def _put(document: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = _put(copy[path[0]], path[1:], value) if len(path) > 1 else value
    return copy


def _without(document: Any, path: tuple) -> Any:
    parent = _at(document, path[:-1])
    return _put(document, path[:-1], {key: value for key, value in parent.items() if key != path[-1]})


def read_all(found: list[tuple[str, bytes]], read: Callable[[bytes], Any]) -> collections.Counter:
    """How many were `read` and how many `refused` by a UserError of one short line; AssertionError on anything else."""
    counts: collections.Counter = collections.Counter()
    for what, content in found:
        try:
            read(content)
            counts["read"] += 1
        except UserError as error:
            said = str(error)
            assert said and "\n" not in said and len(said) < 1000, f"{what}: {said[:2000]!r}"
            counts["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
    return counts
