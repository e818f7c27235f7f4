"""What the fields of a configuration may be, in rules that several families share.

A rule after another may take it that all before it hold: they are asked in turn, and the first that does not is told.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, NamedTuple

from dynjax.config import UserError

WIDEST = 65536
"""Channels or features of a layer, at most."""
DEEPEST = 1000
"""Layers, blocks, steps or experts, at most."""
HALVINGS = 10
"""How often a resolution may be halved."""
LARGEST_SIDE = 16384
"""Pixels of a side of the pictures that a model works at."""


class Range(NamedTuple):
    """What a number, or each of several, may be: `Annotated[int, Range(1, WIDEST)]`."""

    least: int
    most: int

    def rule(self, field: str, value: object) -> "Rule":
        several = isinstance(value, tuple)
        good = all(self.least <= each <= self.most for each in (value if isinstance(value, tuple) else (value,)))
        return Rule(field, value, good, f"{'each ' * several}from {self.least} to {self.most}")


Width = Annotated[int, Range(1, WIDEST)]
"""Channels or features."""
Depth = Annotated[int, Range(1, DEEPEST)]
"""Layers, blocks, steps or experts."""
Count = Annotated[int, Range(0, DEEPEST)]
Halvings = Annotated[int, Range(0, HALVINGS)]
Scales = Annotated[int, Range(1, HALVINGS + 1)]
Side = Annotated[int, Range(1, LARGEST_SIDE)]
"""Pixels."""
Sides = Annotated[tuple[int, ...], Range(1, LARGEST_SIDE)]
Values = Annotated[int, Range(2, 256)]
"""Values of a channel of a picture."""
Widths = Annotated[tuple[int, ...], Range(1, WIDEST)]
Counts = Annotated[tuple[int, ...], Range(0, DEEPEST)]
"""Blocks of each level."""


class Rule(NamedTuple):
    """A field, its value, whether that is right (False too for nan), and what it must be."""

    field: str
    value: object
    good: bool
    wanted: str


def refuse(rules: Iterable[Rule], option: str) -> None:
    """Raises UserError for the first rule that does not hold, naming its field as an option; `option` goes before."""
    for name, value, good, wanted in rules:
        if not good:
            told = (" ".join(map(str, value)) or "empty") if isinstance(value, tuple) else value
            raise UserError(f"--{(option + name).replace('_', '-')} is {told}: it must be {wanted}")


def within(part: str, rules: Iterable[Rule]) -> Iterator[Rule]:
    """Rules of a configuration that is the field `part` of another one."""
    for name, value, good, wanted in rules:
        yield Rule(f"{part}.{name}", value, good, wanted.replace("--model.", f"--model.{part}."))


def levels(widths: tuple[int, ...], blocks: tuple[int, ...], level: str) -> Iterator[Rule]:
    """Of fields `widths` and `blocks`, with a number for each `level`."""
    many, most = len(widths), HALVINGS + 1
    yield Rule("widths", widths, many >= 1, f"one number of channels for each {level}")
    yield Rule("widths", widths, many <= most, f"of at most {most} {level}s: each halves the picture")
    wanted = f"one number for each {level}, of which --model.widths has {many}"
    yield Rule("blocks", blocks, len(blocks) == many, wanted)


def frozen(frozen: int, levels: int) -> Iterator[Rule]:
    """Of a backbone's fields of these names."""
    yield Rule("frozen", frozen, frozen <= levels, f"at most --model.levels, which is {levels}")


def one_of(name: str, value: int, *allowed: int) -> Iterator[Rule]:
    *others, last = map(str, allowed)
    yield Rule(name, value, value in allowed, f"{', '.join(others)} or {last}")


def has_blocks(blocks: tuple[int, ...], dynamics: str) -> Iterator[Rule]:
    yield Rule("blocks", blocks, any(blocks), f"1 or more in one of them: {dynamics} needs blocks")


def doubled(config: object, names: str, scales: int) -> Iterator[Rule]:
    """Of families whose every coarser scale has twice the channels."""
    for name in names.split():
        value, most = getattr(config, name), WIDEST >> (scales - 1)
        yield Rule(name, value, value <= most, f"at most {most}: it doubles with each of the {scales} scales")


def heads_share(name: str, features: int, heads: int) -> Iterator[Rule]:
    yield Rule(name, features, features % heads == 0, f"a multiple of --model.heads, which is {heads}")


def picture(shape: tuple[int, ...]) -> Iterator[Rule]:
    """Of a field `shape` of pictures."""
    yield Rule("shape", shape, len(shape) == 3, "height, width and channels")
    height, width, channels = shape
    sides = 1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE
    yield Rule("shape", shape, sides, f"height, width and channels, the sides from 1 to {LARGEST_SIDE}")
    yield Rule("shape", shape, channels in (1, 3), "height, width and channels, of which there are 1 or 3")


def routed(experts: int, top: int, least: int) -> Iterator[Rule]:
    """Of tokens that take up to `top` of so many experts, and at least `least`."""
    yield Rule("top", top, top <= experts, f"at most --model.experts, which is {experts}")
    yield Rule("least", least, least <= top, f"at most --model.top, which is {top}")


def drawn(shape: tuple[int, ...], likelihood: str, embed: bool = False) -> Iterator[Rule]:
    """Of families that draw pictures."""
    yield from picture(shape)
    channels = shape[2]
    one = likelihood != "categorical" or channels == 1
    yield Rule("likelihood", likelihood, one, f"logistic for {channels} channels: categorical has one")
    yield Rule("embed", embed, not embed or channels == 1, f"False for {channels} channels: a name has one")
