"""`classes.txt`: names and colours of the classes of one's own masks.

A class a line, in the order of their ids from 0 on: NAME, NAME #rrggbb or NAME RED GREEN BLUE. Names may have spaces; a
line that ends in three whole numbers ends in a colour. Blank lines are skipped, and so are comments: lines that are #
alone or begin with # and a space. A line `ignore` with a colour is no class: pixels of that colour are ignored.
"""

import dataclasses
import re
from pathlib import Path

from dynjax.config import UserError
from dynjax.data.files import IGNORE_255
from dynjax.data.pictures import Colour

FILE = "classes.txt"
IGNORE = "ignore"
"""Name of the colour of ignored pixels."""


@dataclasses.dataclass(frozen=True)
class Legend:
    """What a classes.txt says."""

    file: Path
    names: tuple[str, ...]
    ids: dict[Colour, int]
    """Of the colours, 255 for ignored pixels."""
    plain: tuple[str, ...]
    """Classes without a colour."""


def read_legend(root: Path) -> Legend | None:
    """Of the folder `root`; None where it has no classes.txt. Raises UserError that names the line."""
    file = root / FILE
    if not file.exists():
        return None
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from None
    names, ids, plain = list[str](), dict[Colour, int](), list[str]()
    taken: dict[str | Colour, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text == "#" or text.startswith("# "):
            continue
        name, colour, wrong = _parsed(text)
        for each in (name, colour):
            if each is not None and each in taken and not wrong:
                told = each if isinstance(each, str) else "#{:02x}{:02x}{:02x}".format(*each)
                wrong = f"{told} is on line {taken[each]} already"
        if wrong:
            raise UserError(f"{file}, line {number}: {text[:60]!r}: {wrong}")
        taken[name] = number
        if colour is not None:
            taken[colour] = number
            ids[colour] = IGNORE_255 if name == IGNORE else len(names)
        if name != IGNORE:
            names.append(name)
            plain += [name] if colour is None else []
    if not 2 <= len(names) <= IGNORE_255:
        raise UserError(f"{file} names {len(names)} classes: there can be 2 to {IGNORE_255}, one a line")
    return Legend(file, tuple(names), ids, tuple(plain))


def _parsed(text: str) -> tuple[str, Colour | None, str]:
    """Name and colour of a line, and what is wrong with it."""
    words, colour = text.split(), None
    if words[-1].startswith("#"):
        if not re.fullmatch("#[0-9a-fA-F]{6}", words[-1]):
            return text, None, "a colour is written #rrggbb; a comment has a space after its #"
        red, green, blue = bytes.fromhex(words.pop()[1:])
        colour = red, green, blue
    elif len(words) >= 3 and all(re.fullmatch("[0-9]{1,9}", word) for word in words[-3:]):
        red, green, blue = (int(word) for word in words[-3:])
        if max(red, green, blue) > 255:
            return text, None, "red, green and blue are 0 to 255"
        colour, words = (red, green, blue), words[:-3]
    name = " ".join(words)
    if not name:
        return name, colour, "a colour without a name"
    if name.startswith("#"):
        return name, colour, "a name does not begin with #; a comment has a space after it"
    return name, colour, "the colour of ignored pixels is missing" if name == IGNORE and colour is None else ""
