"""What the fields of a configuration may be, in rules that several families share.

A rule after another may take it that all before it hold: they are asked in turn, and the first that does not is told.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from dynjax.config import UserError

WIDEST = 65536
"""Channels or features of a layer, at most."""
DEEPEST = 1000
"""Layers, blocks, steps or experts, at most."""
HALVINGS = 10
"""How often a resolution may be halved."""
LARGEST_SIDE = 16384
"""Pixels of a side of the pictures that a model works at."""


@runtime_checkable
class InLevels(Protocol):
    """A configuration with a number of channels, and one of blocks, for each level or stage."""

    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> tuple[int, ...]: ...


@runtime_checkable
class OfExperts(Protocol):
    """A configuration of tokens that take up to `top` of so many experts, and at least `least`."""

    @property
    def experts(self) -> int: ...
    @property
    def top(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def gate(self) -> str: ...


@runtime_checkable
class OfPictures(Protocol):
    """The configuration of a family that draws pictures."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def likelihood(self) -> str: ...


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


def between(config: object, at_least: int = 1, **most: int) -> Iterator[Rule]:
    """Of fields that are a number, or several, each from `at_least` to the field's `most`."""
    for name, largest in most.items():
        value = getattr(config, name)
        each = value if isinstance(value, tuple) else (value,)
        wanted = f"{'each ' if isinstance(value, tuple) else ''}from {at_least} to {largest}"
        yield Rule(name, value, all(at_least <= one <= largest for one in each), wanted)


def levels(config: InLevels, level: str) -> Iterator[Rule]:
    """Of fields `widths` and `blocks`, with a number for each `level`."""
    many, most = len(config.widths), HALVINGS + 1
    yield Rule("widths", config.widths, many >= 1, f"one number of channels for each {level}")
    yield from between(config, widths=WIDEST)
    yield Rule("widths", config.widths, many <= most, f"of at most {most} {level}s: each halves the picture")
    wanted = f"one number for each {level}, of which --model.widths has {many}"
    yield Rule("blocks", config.blocks, len(config.blocks) == many, wanted)
    yield from between(config, 0, blocks=DEEPEST)


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


def routed(config: OfExperts) -> Iterator[Rule]:
    """Of fields `experts`, `top` and `least`."""
    yield Rule("top", config.top, config.top <= config.experts, f"at most --model.experts, which is {config.experts}")
    yield Rule("least", config.least, config.least <= config.top, f"at most --model.top, which is {config.top}")


def drawn(config: OfPictures, embed: bool = False) -> Iterator[Rule]:
    """Of families that draw pictures."""
    yield from picture(config.shape)
    yield from between(config, 2, values=256)
    yield from between(config, components=DEEPEST)
    channels = config.shape[2]
    one = config.likelihood != "categorical" or channels == 1
    yield Rule("likelihood", config.likelihood, one, f"logistic for {channels} channels: categorical has one")
    yield Rule("embed", embed, not embed or channels == 1, f"False for {channels} channels: a name has one")
