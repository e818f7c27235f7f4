"""What a source of data says of itself, so that loader, augmentation and calibration know what to do with it.

A source of your own is any class with what `Source` names; nothing is inherited. `spec` has one `Field` for each array
of an example, and its role says how that array is treated:

    class Reviews:
        name, split, classes, handed, seen = "reviews", "train", ("bad", "good"), False, None
        spec = {"tokens": Field((64,), np.int32, "text", 0), "label": Field((), np.int32, "label", -1)}

        def __len__(self): ...
        def __getitem__(self, index): return {"tokens": ..., "label": ...}
        def describe(self): return "reviews train: 25000 texts"

`dynjax.data.register` gives it a name for `--data.name`. T is a number of frames or tokens; H, W are pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from dynjax.config import UserError

SPLITS = ("train", "val", "test")
IGNORED = -1  # every ignored pixel of a batch, whatever the source calls it

Size = tuple[int, int]
"""Height and width in pixels."""

Role = Literal["picture", "mask", "label", "text", "film"]
"""picture: uint8 (H, W, 3); film: uint8 (T, H, W, 3); mask: a class of every pixel, (H, W) or (T, H, W); all of these
are augmented, together. text: (T,) tokens; label: of any shape, whatever belongs to the whole example."""

AXES = {"picture": (3,), "film": (4,), "mask": (2, 3), "text": (1,)}  # how many each role has


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of an example. Raises ValueError for a shape that its role cannot have."""

    shape: tuple[int, ...]
    """Of one example, without the batch."""
    dtype: DTypeLike
    role: Role
    blank: int | float
    """Value throughout an example that only fills up the last batch; -1 where nothing is to be predicted."""
    ignored: int | None = None
    """What ignored pixels of a mask carry in the source; batches have -1 there."""

    def __post_init__(self) -> None:
        dtype, axes = np.dtype(self.dtype), AXES.get(self.role, (len(self.shape),))
        fits = {"picture": dtype == np.uint8, "film": dtype == np.uint8, "mask": dtype.kind == "i"}.get(self.role, True)
        colours = self.shape[-1:] == (3,) or self.role not in ("picture", "film")
        if len(self.shape) not in axes or not fits or not colours:
            raise ValueError(f"a {self.role} cannot be {dtype} {self.shape}; see dynjax.data.source.Role")

    @property
    def pixels(self) -> Size | None:
        """Height and width of a picture, a film or a mask; None for what has none."""
        if self.role in ("text", "label"):
            return None
        height, width = self.shape[-2:] if self.role == "mask" else self.shape[-3:-1]
        return height, width


Spec = Mapping[str, Field]


@runtime_checkable
class Source(Protocol):
    """The examples of one split: `source[i]` is a dict of arrays as `spec` says. Threads may read at the same time."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what masks and labels tell apart; empty where there is nothing."""

    @property
    def spec(self) -> Spec: ...
    @property
    def handed(self) -> bool:
        """Whether a mirrored picture may be of another class: the loader never flips these."""

    @property
    def seen(self) -> frozenset[int] | None:
        """The classes that occur in the masks or labels, or None where nobody has looked."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]: ...
    def describe(self) -> str:
        """One line for people."""


@runtime_checkable
class Draws(Source, Protocol):
    """A source whose training examples are drawn, such as windows of pictures; `source[i]` is one of them, always the
    same."""

    def draw(self, index: int, rng: np.random.Generator, /) -> dict[str, np.ndarray]:
        """Example `index`, of which the generator decides."""


def draw(source: Source, index: int, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """Example `index` as the source gives it: drawn, where there is a generator and the source draws."""
    return source.draw(index, rng) if rng is not None and isinstance(source, Draws) else source[index]


class Derived:
    """A source that is made of another one, and says of itself what that one says: an abstract base."""

    whole: Source

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def split(self) -> str:
        return self.whole.split

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    @property
    def handed(self) -> bool:
        return self.whole.handed

    @property
    def seen(self) -> frozenset[int] | None:
        return self.whole.seen


@runtime_checkable
class Named(Protocol):
    """A source whose examples have names, such as those of files."""

    def name_of(self, index: int, /) -> str: ...


def name_of(source: Source, index: int) -> str:
    """What an example is called."""
    return source.name_of(index) if isinstance(source, Named) else f"example {index}"


def picture_spec(size: Size, target: Literal["mask", "label"], ignored: int | None = None) -> dict[str, Field]:
    """Pictures of height and width `size` under "image", each with a mask or a label under the name of its role."""
    shape = size if target == "mask" else ()
    return {
        "image": Field((*size, 3), np.uint8, "picture", 0),
        target: Field(shape, np.int32, target, IGNORED, ignored),
    }


def input_of(spec: Spec) -> str:
    """The key of what a model looks at: the first picture, text or film. Raises UserError where there is none."""
    for key, field in spec.items():
        if field.role in ("picture", "text", "film"):
            return key
    raise UserError(f"no picture, text or film among {', '.join(spec) or 'no fields'}: there is nothing to look at")


def target_of(spec: Spec) -> str:
    """The key of what is to be predicted: the first mask or label; without any, what is looked at itself."""
    return next((key for key, field in spec.items() if field.role in ("mask", "label")), input_of(spec))


def size_of(source: Source) -> Size:
    """Height and width of a source's first picture, film or mask. Raises UserError where there is none."""
    for field in source.spec.values():
        if field.pixels is not None:
            return field.pixels
    raise UserError(f"data.name={source.name} has no pictures, it has {', '.join(source.spec)}")


def shape_of(source: Source) -> tuple[int, ...]:
    """Sides of what a model looks at: (H, W) of pictures, (T, H, W) of films, (T,) of texts."""
    field = source.spec[input_of(source.spec)]
    return field.shape if field.role == "text" else field.shape[:-1]


def read(source: Source, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """Example `index` as batches have it: the fields of the spec, ignored pixels -1; blank past the source's end. With
    a generator it is drawn, of sources that do so.

    Raises ValueError for an array of another shape than the spec's.
    """
    found, example = {}, draw(source, index, rng) if index < len(source) else None
    for key, field in source.spec.items():
        if example is None:
            found[key] = np.full(field.shape, field.blank, field.dtype)
            continue
        array = np.asarray(example[key], field.dtype)
        if array.shape != field.shape:
            name = f"{source.name} {source.split}, example {index}"
            raise ValueError(f"{name}: {key} has shape {array.shape}, by the source's spec it is {field.shape}")
        found[key] = array if field.ignored is None else np.where(array == field.ignored, IGNORED, array)
    return found


def stack(examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A batch of examples."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def calibration_batches(source: Source, batch_size: int, count: int) -> list[dict[str, np.ndarray]]:
    """`count` batches of `batch_size` examples, spread evenly over the source; a short one is used again."""
    if len(source) == 0 or batch_size < 1 or count < 1:
        raise UserError(
            f"calibration needs examples: {len(source)} in the source, {count} batches of {batch_size} wanted"
        )
    wanted = batch_size * count
    # Every batch takes from all over the source: neighbours (frames of a film) are alike.
    indices = np.arange(wanted) * max(1.0, len(source) / wanted)
    indices = (indices.astype(int) % len(source)).reshape(batch_size, count).T
    return [stack([read(source, int(index)) for index in batch]) for batch in indices]
