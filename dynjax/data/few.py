"""Few labels: which training pictures keep theirs, and the others as pictures without one.

marked, bare = labelled(source, "1/8", seed=0)  # of a source whose config.labelled is empty
both = WithUnlabelled(marked, bare, seed=0)  # {"image", "mask", "unlabelled"}
"""

import dataclasses
import functools
import re

import numpy as np

from dynjax.config import UserError
from dynjax.data.source import Derived, Field, Source, draw, input_of, name_of, target_of

WANTED = "a share of the training pictures such as 1/8, or a number of them such as 46"


def is_wanted(wanted: str) -> bool:
    """Whether it is a share in (0, 1], such as 1/8, or a number from 1 on."""
    found = re.fullmatch(r"(\d+)(?:/(\d+))?", wanted)
    return found is not None and 0 < int(found[1]) <= int(found[2] or found[1])


def labelled(source: Source, wanted: str, seed: int) -> tuple["Subset", "Subset"]:
    """The examples of `source` that keep their labels, `wanted` of them, and the others, whose masks and labels say
    nothing.

    By the seed, and so that fewer are always among more: those of 1/16 are also of 1/8. Raises UserError.
    """
    count = len(source)
    if not is_wanted(wanted):
        raise UserError(f"data.labelled={wanted!r}: it must be {WANTED}")
    over, _, under = wanted.partition("/")
    number = max(1, round(count * int(over) / int(under))) if under else int(over)
    if number > count:
        raise UserError(f"data.labelled={wanted}: {source.describe()}: there are no more than {count}")
    if target_of(source.spec) == input_of(source.spec):
        raise UserError(f"data.labelled={wanted}: data.name={source.name} has no labels; leave it out")
    order = np.random.default_rng(seed).permutation(count).tolist()
    return Subset(source, tuple(sorted(order[:number])), True), Subset(source, tuple(sorted(order[number:])), False)


@dataclasses.dataclass(frozen=True)
class Subset(Derived):
    """The examples `chosen` of a source, with or without their labels."""

    whole: Source
    chosen: tuple[int, ...] = dataclasses.field(repr=False)
    known: bool
    """Whether they have their masks and labels."""

    @property
    def spec(self) -> dict[str, Field]:
        return dict(self.whole.spec)

    @property
    def seen(self) -> frozenset[int] | None:
        """Nobody has looked which classes are left."""
        return None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._told(self.whole[self.chosen[index]])

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self._told(draw(self.whole, self.chosen[index], rng))

    def name_of(self, index: int) -> str:
        return name_of(self.whole, self.chosen[index])

    def describe(self) -> str:
        what = "labelled" if self.known else "unlabelled"
        return f"{self.whole.describe()}; {len(self)} of {len(self.whole)} {what}"

    def _told(self, example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.known:
            return example
        blank = {
            key: np.full(field.shape, field.blank, field.dtype)
            for key, field in self.spec.items()
            if field.role in ("mask", "label")
        }
        return example | blank


def marked_of(source: Source) -> Source:
    """The labelled examples alone, where there are others beside them."""
    return source.whole if isinstance(source, WithUnlabelled) else source


def chosen(source: Source) -> tuple[str, ...]:
    """Number and name of each labelled example, where only some are."""
    source = marked_of(source)
    if not isinstance(source, Subset):
        return ()
    return tuple(f"{number} {source.name_of(index)}" for index, number in enumerate(source.chosen))


@dataclasses.dataclass(frozen=True)
class WithUnlabelled(Derived):
    """Labelled examples, each with the picture of another one under "unlabelled", for semi-supervised training.

    As long as the longer of the two: in a pass every labelled and every unlabelled picture occurs, those of the shorter
    more than once. What is drawn of the two is drawn apart, but the augmentation then changes them alike, as all
    pictures of an example. Raises UserError where nothing is unlabelled.
    """

    whole: Source
    """The labelled examples."""
    bare: Source
    seed: int = 0
    """Which unlabelled picture goes with which labelled one."""

    def __post_init__(self) -> None:
        if not len(self.bare):
            raise UserError(f"{self.whole.describe()}: no picture is unlabelled; give --data.labelled, such as 1/8")

    @property
    def spec(self) -> dict[str, Field]:
        spec = dict(self.whole.spec)
        return spec | {"unlabelled": spec[input_of(spec)]}

    def __len__(self) -> int:
        return max(len(self.whole), len(self.bare))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._pair(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return self._pair(index, rng)

    def name_of(self, index: int) -> str:
        return name_of(self.whole, index % len(self.whole))

    def describe(self) -> str:
        return f"{self.whole.describe()}, with {len(self.bare)} that are not"

    @functools.cached_property
    def _order(self) -> list[int]:
        return np.random.default_rng(self.seed).permutation(len(self.bare)).tolist()

    def _pair(self, index: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        other = self._order[index % len(self.bare)]
        example = draw(self.whole, index % len(self.whole), rng)
        return example | {"unlabelled": draw(self.bare, other, rng)[input_of(self.bare.spec)]}
