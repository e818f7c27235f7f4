"""Data out of a pickle without running it: text, numbers, lists, dicts and arrays of bytes; all else is refused.

Python's own unpickler calls what a file names, and some of NumPy, called so, writes where it should not. Here opcodes
are only read, by `pickletools.genops`; what NumPy writes for an array is recognised, and made from its bytes.
"""

import dataclasses
import io
import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8

from dynjax.data.pictures import one_line

MOST_OPCODES = 500_000  # an official batch of 10,000 pictures has 50,000; each may keep a few hundred bytes


def read_data(content: bytes) -> Any:
    """The value of a pickle; an array of bytes in it is uint8, an array of anything else a `Made`.

    No length and no index in the file makes it take more memory than the file has. Raises ValueError, in one line, for
    what is damaged or refused.
    """
    return _array(read_pickle(io.BytesIO(content), Reader(len(content))))


def read_pickle(stream: io.BytesIO, reader: "Reader") -> Any:
    """The value of the pickle that begins here, of which the stream is at the end then. Raises ValueError."""
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= MOST_OPCODES:
                raise ValueError(f"more than {MOST_OPCODES} opcodes")
            if opcode.name == "STOP":
                return reader.pop()
            reader.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError) as error:  # of an empty stack, of a memo without that entry
        raise ValueError(f"not a whole pickle ({type(error).__name__})") from None
    except Exception as error:  # what damaged text raises while it is decoded
        raise ValueError(one_line(error)) from None
    raise ValueError("not a whole pickle")


@dataclasses.dataclass(frozen=True, eq=False)
class Named:
    """What a file calls by name."""

    name: str


@dataclasses.dataclass(eq=False)
class Made:
    """What a file asks to have made, which nobody has: the name called, and what it was given."""

    name: str
    given: tuple
    state: Any = None


_NAMES = {  # under the old and new names of NumPy's modules
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "_codecs encode": "encode",
}
_MARK = object()
_CONSTANTS = {"MARK": _MARK, "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1")
_TEXT = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_OLD_TEXT = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # Python 2's, bytes shown as Latin-1
_VALUES: dict[str, Callable[[Any], Any]] = {
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    **dict.fromkeys(_NUMBERS + _TEXT, lambda argument: argument),
    **dict.fromkeys(_BYTES, bytes),
    **dict.fromkeys(_OLD_TEXT, lambda argument: argument.encode("latin-1")),
}
"""What opcodes put on the stack, from their argument."""
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN = (None, None, None, -1, -1, 0)  # no shape, names or fields of its own, no size, no flags


class Reader:
    """A stack and a memo, both no larger than the file's opcodes fill them."""

    names: ClassVar[Mapping[str, str]] = _NAMES
    """What may be called by name, and what it is called here."""
    of: ClassVar[str] = "CIFAR-10"
    """What files it is for, in errors."""

    def __init__(self, size: int) -> None:
        self.room = size  # for text that is turned into bytes: no text of a file needs that twice
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("not a whole pickle (a mark where a value should be)")
        return value

    def since_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # IndexError, where there is none
            place -= 1
            if place < 0:
                raise ValueError("not a whole pickle (no mark)")
        values, self.stack[place:] = self.stack[place + 1 :], []
        return values

    def step(self, name: str, argument: Any) -> None:
        """One opcode. Raises ValueError, IndexError, KeyError or TypeError."""
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(_VALUES[name](argument))
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if argument is None else argument] = self.top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if argument is None:
                last, module = self.pop(), self.pop()
                argument = f"{module} {last}" if isinstance(module, str) and isinstance(last, str) else "?"
            if argument not in self.names:
                shown = ascii(".".join(argument.split()))[1:80].rstrip("'")
                raise ValueError(f"{shown} does not belong in {self.of} and was not run")
            self.stack.append(Named(self.names[argument]))
        elif name == "REDUCE":
            given = self.pop()
            self.stack.append(self.called(self.pop(), given))
        elif name == "BUILD":
            state, made = self.pop(), self.top()
            if not isinstance(made, Made) or made.state is not None:
                raise ValueError("a state for what has none, or has one already")
            made.state = state  # in its place: the memo has it too
        else:
            self.collect(name)

    def collect(self, name: str) -> None:
        """The opcodes that put values into tuples, lists and dicts."""
        if name in _TUPLES:
            self.stack.append(tuple(self.pop() for _ in range(_TUPLES[name]))[::-1])
        elif name in ("TUPLE", "LIST", "DICT"):
            values = self.since_mark()
            self.stack.append(tuple(values) if name == "TUPLE" else values if name == "LIST" else _paired(values))
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self.since_mark()
            self.top(list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.since_mark()
            self.top(dict).update(_paired(values))
        else:
            raise ValueError(f"the opcode {name} does not belong in {self.of} and was not run")

    def called(self, what: Any, given: Any) -> Any:
        if not isinstance(what, Named) or what.name == "ndarray" or not isinstance(given, tuple):
            raise ValueError("a call of something that is no function")
        if what.name != "encode":
            return Made(what.name, given)
        # What Python 3 writes for bytes in an old protocol.
        if len(given) != 2 or not isinstance(given[0], str) or given[1] not in ("latin1", b"latin1"):
            raise ValueError("bytes that are not stored as latin1")
        self.room -= len(given[0])
        if self.room < 0:
            raise ValueError("more bytes than the file has")
        return given[0].encode("latin-1")

    def top(self, kind: type = object) -> Any:
        value = self.stack[-1]
        if value is _MARK or not isinstance(value, kind):
            raise ValueError(f"not a whole pickle (a {type(value).__name__} where a {kind.__name__} should be)")
        return value


def _paired(values: list[Any]) -> dict[str | bytes, Any]:
    keys = values[::2]
    if len(values) % 2 or not all(isinstance(key, str | bytes) for key in keys):
        raise ValueError("a dict whose keys are no text")
    return {key: _array(value) for key, value in zip(keys, values[1::2], strict=True)}


def _array(value: Any) -> Any:
    """The array of bytes that a value stands for; other values as they are."""
    if not isinstance(value, Made):
        return value
    if value.name == "frombuffer" and len(value.given) == 4:
        content, kind, shape, order = value.given
        by_column = order == "F"
    elif value.name == "reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, kind, by_column, content = value.state
    else:
        return value
    if not (_is_uint8(kind) and isinstance(content, bytes) and isinstance(shape, tuple)):
        return value
    return _of_bytes(content, shape, "F" if by_column == 1 else "C")


def _of_bytes(content: bytes, shape: tuple[int, ...], order: Literal["C", "F"]) -> UInt8[np.ndarray, "..."]:
    if not all(type(length) is int and 0 <= length <= len(content) for length in shape):
        raise ValueError("an array whose shape is no lengths")
    if len(shape) > 8 or math.prod(shape) != len(content):
        raise ValueError(f"an array of {len(content)} bytes whose shape says otherwise")
    return np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _is_uint8(kind: Any) -> bool:
    """Whether it is what NumPy writes for its uint8."""
    if not isinstance(kind, Made) or kind.name != "dtype" or not kind.given or not isinstance(kind.state, tuple):
        return False
    return kind.given[0] in ("u1", b"u1") and kind.state[1:] in [(bar, *_PLAIN) for bar in ("|", b"|")]
