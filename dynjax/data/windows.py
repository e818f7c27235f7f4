"""Windows of pictures that need not be of one size: drawn in training, and elsewhere such that they cover all of them.

Where a window reaches over the edge of its picture it is black, and its mask ignored. H, W are height and width of a
picture in pixels.
"""

import dataclasses
import itertools
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from dynjax.config import UserError
from dynjax.data.source import IGNORED, Derived, Field, Size, Source, draw, name_of, size_of


class Window(NamedTuple):
    """Where a window lies in its picture, and which part of the picture no other window has."""

    top: int
    left: int
    rows: slice
    columns: slice
    """Of the picture."""

    @property
    def inside(self) -> tuple[slice, slice]:
        """That part as the window sees it."""
        (y, x), (rows, columns) = self[:2], self[2:]
        return slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)


@runtime_checkable
class Sized(Protocol):
    """A source of pictures of several sizes, such as `PairSource`."""

    @property
    def sizes(self) -> tuple[Size, ...]: ...


def grid(size: Size, crop: Size) -> list[Window]:
    """The fewest windows that cover a picture of `size`, spread evenly; every pixel belongs to the one in whose middle
    it lies more."""
    sides = [_along(side, window) for side, window in zip(size, crop, strict=True)]
    return [Window(top, left, rows, columns) for (top, rows), (left, columns) in itertools.product(*sides)]


def _along(side: int, window: int) -> list[tuple[int, slice]]:
    """Of one side: where windows start, and what is theirs."""
    count = -(-side // window)
    starts = [round(k * max(side - window, 0) / max(count - 1, 1)) for k in range(count)]
    ends = [(one + other + window + 1) // 2 for one, other in itertools.pairwise(starts)]
    return [(start, slice(*own)) for start, own in zip(starts, itertools.pairwise([0, *ends, side]), strict=True)]


def take(array: Shaped[np.ndarray, "H W ..."], top: int, left: int, crop: Size, fill: int) -> np.ndarray:
    """The window of size `crop` from there on, which may be before the start, with `fill` outside the array."""
    found = np.full((*crop, *array.shape[2:]), fill, array.dtype)
    inside = array[max(top, 0) : max(top + crop[0], 0), max(left, 0) : max(left + crop[1], 0)]
    y, x = max(-top, 0), max(-left, 0)
    found[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return found


@dataclasses.dataclass(frozen=True)
class Windows(Derived):
    """Windows of the pictures of `whole`, with their masks: one of each that is drawn or, with `parts`, those."""

    whole: Source
    crop: Size
    sizes: tuple[Size, ...] = dataclasses.field(repr=False)
    """Of the pictures of `whole`."""
    parts: tuple[tuple[int, Window], ...] | None = dataclasses.field(repr=False)
    """Pictures by their index and windows of them."""

    @property
    def spec(self) -> dict[str, Field]:
        """Of windows; what lies outside a picture is -1 in its mask."""

        def shape(field: Field) -> tuple[int, ...]:
            return (*self.crop, 3) if field.role == "picture" else self.crop

        return {key: dataclasses.replace(field, shape=shape(field)) for key, field in self.whole.spec.items()}

    def __len__(self) -> int:
        return len(self.whole) if self.parts is None else len(self.parts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A window of the parts or, of those that are drawn, always the same."""
        if self.parts is None:
            return self.draw(index, np.random.default_rng(index))
        number, window = self.parts[index]
        example = self._taken(self.whole[number], window.top, window.left)
        for key, field in self.whole.spec.items():
            if field.role == "mask":
                mask, own = example[key], window.inside
                example[key] = np.full_like(mask, IGNORED)
                example[key][own] = mask[own]
        return example

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A window that lies anywhere in its picture; a picture that is smaller lies anywhere in the window."""
        if self.parts is not None:
            return self[index]
        example = draw(self.whole, index, rng)
        spare = [side - window for side, window in zip(self.sizes[index], self.crop, strict=True)]
        top, left = (int(rng.integers(min(each, 0), max(each, 0) + 1)) for each in spare)
        return self._taken(example, top, left)

    def name_of(self, index: int) -> str:
        return name_of(self.whole, index if self.parts is None else self.parts[index][0])

    def describe(self) -> str:
        many = "a window" if self.parts is None else f"{len(self)} windows"
        return f"{self.whole.describe()}; {many} of {self.crop[0]}x{self.crop[1]}"

    def _taken(self, example: dict[str, np.ndarray], top: int, left: int) -> dict[str, np.ndarray]:
        fills = {key: 0 if field.role == "picture" else IGNORED for key, field in self.whole.spec.items()}
        return {key: take(example[key], top, left, self.crop, fill) for key, fill in fills.items()}


def cut(source: Source, crop: Size) -> Windows:
    """Windows of height and width `crop`: of training pictures one that is drawn, of others those of the `grid`.

    Raises UserError where examples are not pictures with masks.
    """
    roles = sorted(field.role for field in source.spec.values())
    if roles != ["mask", "picture"]:
        raise UserError(
            f"data.crop={crop}: windows are cut of pictures with masks; data.name={source.name} has for each a "
            f"{' and a '.join(roles)}: leave it out"
        )
    sizes = source.sizes if isinstance(source, Sized) else (size_of(source),) * len(source)
    if source.split == "train":
        return Windows(source, crop, sizes, None)
    parts = tuple((index, window) for index, size in enumerate(sizes) for window in grid(size, crop))
    return Windows(source, crop, sizes, parts)
