"""Pairs of a picture and its mask or label: all checked once at start-up, then kept in memory or read again.

H, W are a picture's height and width in pixels.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data.pictures import BadFile
from dynjax.data.source import Field, Size, picture_spec, size_of, target_of
from dynjax.data.weak import weaken

KEEP_BYTES = 2 << 30  # a split that needs no more than this, resized, stays in memory
SHOWN = 5  # broken files that an error names; of the rest it gives the number
PART = 64  # examples that are decoded before they are stored: those of a large set do not pile up
TURN = 8  # examples that a thread decodes at a time

Answer = np.ndarray | np.integer
"""A mask or a label."""

Pair = tuple[np.ndarray, Answer]

Memory = tuple[Any, Any]
"""Pictures, and masks or labels: arrays where they are of one size, lists where not."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What a set of files gives before anybody has looked at its pictures."""

    read: Callable[[int], Pair]
    """Pair of an index below `count`, each in its own size; or BadFile."""
    count: int
    classes: tuple[str, ...]
    target: Literal["mask", "label"] = "label"
    ignored: int | None = None
    """What marks ignored pixels of masks."""
    broken: Sequence[str] = ()
    """Problems found before, such as a mask without a picture."""
    called: Callable[[int], str] = "example {}".format
    """What errors call a pair."""
    note: str = ""
    """Follows the source's name wherever it is shown."""
    handed: bool = False
    named: str = ""
    """The file that names the classes, where there is one."""


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Checked pairs of one split, resized to one size: "image", and "mask" or "label".

    With `crop` each keeps its own size, and the spec's is that of the first: `make_source` cuts them into windows.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    spec: dict[str, Field]
    skipped: int
    read: Callable[[int], Pair] = dataclasses.field(repr=False, compare=False)
    """Pair of an index, made ready."""
    kept: tuple[int, ...] = dataclasses.field(repr=False)
    """The indices that passed the checks."""
    memory: Memory | None = dataclasses.field(repr=False, compare=False)
    """All pictures and all masks or labels, or None for a split too large for that."""
    sizes: tuple[Size, ...] = dataclasses.field(repr=False)
    """Of every picture."""
    called: Callable[[int], str] = dataclasses.field(repr=False, compare=False)
    handed: bool
    seen: frozenset[int]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self.kept):
            raise IndexError(f"example {index} of {len(self.kept)}")
        if self.memory is not None:
            image, answer = self.memory[0][index], self.memory[1][index]
        else:
            image, answer = self.read(self.kept[index])
        return {"image": image, target_of(self.spec): answer.astype(np.int32)}

    def name_of(self, index: int) -> str:
        """What a picture is called: the name of its file, where it has one."""
        return os.path.basename(self.called(self.kept[index]))

    def describe(self) -> str:
        (height, width), different = size_of(self), len(set(self.sizes))
        size = f"{height}x{width}" if different == 1 else f"of {different} sizes"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.name} {self.split}: {len(self)} pictures {size}, {len(self.classes)} classes{skipped}"


def check_pairs(pairs: Pairs, config: DataConfig, split: str) -> PairSource:
    """Reads every pair once and returns those that are right; of a training split no more than `config.examples`,
    spread evenly.

    Raises one UserError that names what is wrong; with `on_error` "skip" only where nothing is left or, without `size`
    and `crop`, the pictures' sizes differ.
    """
    size, limit, count = config.size, config.examples if split == "train" else None, pairs.count
    if size is not None and min(size) < 1:
        raise UserError(f"data.size={size}: height and width must be positive")
    if limit is not None and limit < 1:
        raise UserError(f"data.examples={limit}: there must be at least 1 training example")
    indices = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    problems, kept, seen = list(pairs.broken), list[int](), set[int]()
    own: collections.Counter[Size] = collections.Counter()
    sizes, room = list[Size](), _Room(len(indices), pairs.target, config.crop is None)
    ready = functools.partial(_ready, pairs, size, config.weak if split == "train" else "full")
    for index, checked in zip(indices, _in_threads(functools.partial(_check, pairs, ready), indices), strict=True):
        if isinstance(checked, str):
            problems.append(checked)
            continue
        room.add(checked.image, checked.answer)
        kept.append(index)
        seen |= checked.seen
        own[checked.own] += 1
        sizes.append(checked.image.shape[:2])
    if wrong := _wrong(problems, own, seen, pairs, config):
        raise UserError(f"data.name={config.name}, {split}: {wrong}")
    return PairSource(
        name=f"{config.name} {pairs.note}" if pairs.note else config.name,
        split=split,
        classes=pairs.classes,
        spec=picture_spec(sizes[0], pairs.target, pairs.ignored),
        skipped=len(problems),
        read=lambda index: ready(index, *pairs.read(index)),
        kept=tuple(kept),
        memory=room.filled(),
        sizes=tuple(sizes),
        called=pairs.called,
        handed=pairs.handed,
        seen=frozenset(seen),
    )


class _Checked(NamedTuple):
    """A pair that is right, made ready; the picture's own size; the classes that are left of a mask or label."""

    image: np.ndarray
    answer: Answer
    own: Size
    seen: set[int]


def _check(pairs: Pairs, ready: Callable[..., Pair], index: int) -> _Checked | str:
    """A pair, or what is wrong with it."""
    try:
        image, answer = pairs.read(index)
    except BadFile as error:
        return str(error)
    own, classes = image.shape[:2], len(pairs.classes)
    if isinstance(answer, np.ndarray):
        wrong = _wrong_mask(own, answer, pairs)
    else:
        wrong = "" if 0 <= answer < classes else f"label {answer}, allowed are 0 to {classes - 1}"
    if wrong:
        return f"{pairs.called(index)}: {wrong}"
    image, answer = ready(index, image, answer)
    ids = np.ravel(answer)
    ids = ids if pairs.ignored is None else ids[ids != pairs.ignored]
    return _Checked(image, answer, own, set(np.flatnonzero(np.bincount(ids)).tolist()))


def _wrong_mask(size: Size, mask: Shaped[np.ndarray, "H W"], pairs: Pairs) -> str:
    """What is wrong with the mask of a picture of that size; empty where nothing is."""
    ignored, classes = pairs.ignored, len(pairs.classes)
    if size != mask.shape:
        shapes = [f"{w}x{h}" for h, w in (size, mask.shape)]
        return f"the image is {shapes[0]} and the mask {shapes[1]} (width x height)"
    wrong = mask[(mask < 0) | (mask >= classes)]
    wrong = wrong if ignored is None else wrong[wrong != ignored]
    if not wrong.size:
        return ""
    beside = "" if ignored is None else f" and {ignored} for ignored pixels"
    whose = f" ({pairs.named} names {classes} classes)" if pairs.named else ""
    return f"label {wrong.max()} in the mask, allowed are 0 to {classes - 1}{beside}{whose}"


def _wrong(
    problems: list[str], sizes: collections.Counter[Size], seen: set[int], pairs: Pairs, config: DataConfig
) -> str:
    """Why the pairs that were found cannot be used; empty where they can."""
    few = f"{len(problems)} bad files: " if len(problems) > 1 else ""
    few += "; ".join(problems[:SHOWN]) + (f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
    if problems and config.on_error == "raise":
        return f"{few}; mend these, or leave them out with --data.on-error skip"
    if not sizes:
        return "no example can be used" + (f": {few}" if problems else "")
    if not seen:
        return f"every pixel of every mask is {pairs.ignored}, which marks ignored pixels"
    if config.size is None and config.crop is None and len(sizes) > 1:
        found = ", ".join(f"{w}x{h} ({n})" for (h, w), n in sizes.most_common(3))
        windows = ", or --data.crop HEIGHT WIDTH for windows of that size" if pairs.target == "mask" else ""
        return f"pictures of {len(sizes)} sizes (width x height): {found}; give --data.size HEIGHT WIDTH{windows}"
    return ""


def workers() -> int:
    """Threads that decode: more than a few only wait for each other."""
    return min(8, os.cpu_count() or 1)


def _in_threads(check: Callable[[int], _Checked | str], indices: Sequence[int]) -> Iterator[_Checked | str]:
    """`check` of every index, in their order."""
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(indices), PART):
            part = indices[start : start + PART]
            turns = [part[i : i + TURN] for i in range(0, len(part), TURN)]
            for results in pool.map(lambda turn: [check(index) for index in turn], turns):
                yield from results


class _Room:
    """Keeps pictures and their masks or labels as long as there is room for all of them."""

    def __init__(self, count: int, target: Literal["mask", "label"], alike: bool):
        self.count, self.target, self.alike = count, target, alike
        self.memory: Memory | None = None if alike else ([], [])
        self.used = self.bytes = 0

    def add(self, image: np.ndarray, answer: Answer) -> None:
        if self.alike and not self.used:
            self.memory = self._arrays(image.shape[:2])
        if self.memory is not None and self.alike:
            if image.shape == self.memory[0][0].shape:
                self.memory[0][self.used], self.memory[1][self.used] = image, answer
        elif self.memory is not None:
            self.bytes += 4 * image.shape[0] * image.shape[1]
            if self.bytes > KEEP_BYTES:
                self.memory = None
            else:
                self.memory[0].append(image)
                self.memory[1].append(answer.astype(np.uint8) if self.target == "mask" else answer)
        self.used += 1

    def filled(self) -> Memory | None:
        return None if self.memory is None else (self.memory[0][: self.used], self.memory[1][: self.used])

    def _arrays(self, size: Size) -> Memory | None:
        """For pictures of one size; None where that is too much."""
        if (4 if self.target == "mask" else 3) * self.count * size[0] * size[1] > KEEP_BYTES:
            return None
        answers = np.empty((self.count, *size), np.uint8) if self.target == "mask" else np.empty(self.count, np.int32)
        return np.empty((self.count, *size, 3), np.uint8), answers


def _ready(pairs: Pairs, size: Size | None, weak: str, index: int, image: np.ndarray, answer: Answer) -> Pair:
    """The pair as it is trained on: of height and width `size`, where one is given, and with what is left of its
    mask."""
    if size is not None:
        image = resize_image(image, size)
    if isinstance(answer, np.ndarray):
        answer = answer if size is None else resize_mask(answer, size)
        if weak != "full":
            assert pairs.ignored is not None  # of masks there is always one
            answer = weaken(answer, weak, pairs.ignored, np.random.default_rng(index))
    return image, answer


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: Size) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear, averaging over the source's pixels when it shrinks."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: Shaped[np.ndarray, "H W"], size: Size) -> Shaped[np.ndarray, "h w"]:
    """Nearest pixel: no class is invented between two others."""
    return mask[np.ix_(*(((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in zip(size, mask.shape, strict=True)))]
