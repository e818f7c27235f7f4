"""Files that anybody may have changed: JSON documents, whose types are checked against type hints; and folders to
write in."""

import contextlib
import dataclasses
import difflib
import errno
import json
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynjax.config import UserError
from dynjax.models import registry

LARGEST = 64 << 20
"""Bytes of a document; what is larger was not written here."""
SHOWN = 60
"""Characters of a value that an error shows."""


def folder_trouble(path: str | Path) -> str | None:
    """Why nothing can be written in the folder, or why it cannot be made; None where it can. Makes nothing."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not there.is_dir():
        return os.strerror(errno.ENOTDIR)
    return None if os.access(there, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


@contextlib.contextmanager
def writing(what: object) -> Iterator[None]:
    """Raises UserError, "cannot write WHAT: why", for an OSError inside this."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}") from None


def read_json(path: str | Path) -> Any:
    """What the file holds; Infinity is a float. Raises ValueError where it is no JSON, and OSError where it cannot be
    read."""
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"it has {size} bytes, more than the {LARGEST} that such a file may have")
    return parse_json(path.read_bytes())


def parse_json(text: bytes | str) -> Any:
    """The JSON value of UTF-8. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # which of them counts would be a guess
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value")
    return float(name.replace("Infinity", "inf"))


def typed(value: Any, hint: Any, where: str = "", *, more: bool = False) -> Any:
    """`value` as the type that `hint` says: a dataclass, dict[str, ...], list, tuple, Literal, union, str, bool, int,
    float or Any; where it is a type variable, one of the configurations that are registered for its bound, by `family`.

    Fields of a dataclass that are missing take their default; unknown ones are refused, or with `more` left out.
    Raises ValueError naming the first that does not fit by its path, such as config.budget.target.
    """
    at = where or "the document"
    if hint is Any:
        return value
    if isinstance(hint, typing.TypeVar):  # a part that may be of any family that is registered for its interface
        assert isinstance(hint.__bound__, type)
        return _family(value, registry.OPEN[hint.__bound__], where, more)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(value, hint, where, more)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (each for each in arguments if each is not type(None))
        return typed(value, kind, where, more=more)
    if origin is typing.Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise ValueError(f"{at} is {_shown(value)}: it must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{at} is {_shown(value)}: it must be an object")
        return {name: typed(each, arguments[1], _inside(where, name), more=more) for name, each in value.items()}
    if origin in (tuple, list):
        return _sequence(value, origin, arguments, where, more)
    return _scalar(value, hint, at)


def _dataclass(value: Any, kind: type, where: str, more: bool) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the document'} is {_shown(value)}: it must be an object, of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not more and (unknown := sorted(set(value) - set(fields))):
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "written by another version of dynjax?"
        raise ValueError(f"unknown field {_shown(unknown[0])} of {kind.__name__}: {hint}")
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_inside(where, name)} is missing")
    given = {name: each for name, each in value.items() if name in fields}
    return kind(**{name: typed(each, hints[name], _inside(where, name), more=more) for name, each in given.items()})


def _family(value: Any, families: dict[str, registry.Family], where: str, more: bool) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}: it must be an object with a family")
    family = value.get("family")
    if not isinstance(family, str) or family not in families:
        raise ValueError(
            f"unknown {where}.family {_shown(family)}: written by another version of dynjax? "
            f"There are {', '.join(families)}"
        )
    return typed(value, families[family].config, where, more=more)


def _sequence(value: Any, kind: type, arguments: tuple, where: str, more: bool) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_shown(value)}: it must be a list")
    hints = arguments[:1] * len(value) if kind is list or arguments[-1] is Ellipsis else arguments
    if len(hints) != len(value):
        raise ValueError(f"{where} is {_shown(value)}: it must be a list of {len(hints)} values")
    return kind(
        typed(each, hint, f"{where}[{index}]", more=more)
        for index, (each, hint) in enumerate(zip(value, hints, strict=True))
    )


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _scalar(value: Any, hint: type, at: str) -> Any:
    # bool is a kind of int in Python, and a float may be written without a point.
    fits = type(value) in (int, float) if hint is float else type(value) is hint
    if not fits:
        raise ValueError(f"{at} is {_shown(value)}: it must be {NAMES[hint]}")
    if hint is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{at} is {_shown(value)}: it must be a whole number of at most 64 bits")
    if hint is str and "\0" in value:
        raise ValueError(f"{at} is {_shown(value)}: a text has no character 0")
    if hint is float:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{at} is {_shown(value)}: it must be a number") from None
        if value != value:
            raise ValueError(f"{at} is NaN: it must be a number")
    return value


def _inside(where: str, name: str) -> str:
    name = name if name.isidentifier() else _shown(name)
    return f"{where}.{name}" if where else name


def _shown(value: Any) -> str:
    """The value as JSON, cut, in ASCII."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested deeply
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
