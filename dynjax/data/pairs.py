"""Pairs of a picture and its mask or label: all checked once at start-up, then kept in memory or read again.

H, W are a picture's height and width in pixels.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from dynjax.config import UserError
from dynjax.data.pictures import IMAGE_SUFFIXES, BadFile, read_image, read_mask
from dynjax.data.source import Field, picture_spec, size_of, target_of

IGNORE_255 = 255  # what marks ignored pixels in folders and TFDS sets
KEEP_BYTES = 2 << 30  # a split that needs no more than this, resized, stays in memory
SHOWN = 5  # broken files that an error names; of the rest it gives the number
PART = 64  # examples that are decoded before they are stored: those of a large set do not pile up
TURN = 8  # examples that a thread decodes at a time

Target = Literal["mask", "label"]
Pair = tuple[np.ndarray, np.ndarray | np.integer]


def workers() -> int:
    """Threads that decode: more than a few only wait for each other."""
    return min(8, os.cpu_count() or 1)


def class_names(count: int) -> tuple[str, ...]:
    """Names of classes of which nothing but the number is known. Raises UserError."""
    if not 2 <= count <= IGNORE_255:
        raise UserError(
            f"data.classes={count}: there can be 2 to {IGNORE_255} classes; {IGNORE_255} marks ignored pixels"
        )
    return tuple(f"class {index}" for index in range(count))


def count_classes(largest: Iterable[int], where: str) -> int:
    """The number of classes by the largest label of each mask, -1 where there is none. Raises UserError below 2."""
    count = 1 + max(largest, default=-1)
    if count == 0:
        raise UserError(f"{where}: there is no class in any mask to count; give --data.classes N")
    if count == 1:
        raise UserError(
            f"{where}: no mask has a class other than 0, {IGNORE_255} marks ignored pixels, and there must be at "
            f"least 2: store two as 0 and 1, not as 0 and {IGNORE_255}"
        )
    return count


def largest_label(mask: Shaped[np.ndarray, "H W"]) -> int:
    """The largest class id in a mask that marks ignored pixels with 255; -1 where all are."""
    ids = mask[mask != IGNORE_255]
    return int(ids.max()) if ids.size else -1


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear, averaging over the source's pixels when it shrinks."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_mask(mask: Shaped[np.ndarray, "H W"], size: tuple[int, int]) -> Shaped[np.ndarray, "h w"]:
    """Nearest pixel: no class is invented between two others."""
    return mask[np.ix_(*(((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in zip(size, mask.shape, strict=True)))]


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Checked pairs of one split, resized to one size: "image", and "mask" or "label"."""

    name: str
    split: str
    classes: tuple[str, ...]
    spec: dict[str, Field]
    """Of "image", and "mask" or "label"."""
    skipped: int
    read: Callable[[int], Pair] = dataclasses.field(repr=False, compare=False)
    """Pair of an index into the set as it was found, in its own size."""
    kept: tuple[int, ...] = dataclasses.field(repr=False)
    """The indices that passed the checks."""
    memory: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(repr=False, compare=False)
    """All pictures and all masks or labels, or None for a split too large for that."""
    handed: bool = False
    seen: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self.kept):
            raise IndexError(f"example {index} of {len(self.kept)}")
        if self.memory is not None:
            image, answer = self.memory[0][index], self.memory[1][index]
        else:
            image, answer = self.read(self.kept[index])
            size = size_of(self)
            image, answer = resize_image(image, size), _resize_answer(answer, size)
        return {"image": image, target_of(self.spec): answer.astype(np.int32)}

    def describe(self) -> str:
        height, width = size_of(self)
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.name} {self.split}: {len(self)} pictures {height}x{width}, {len(self.classes)} classes{skipped}"


def check_pairs(
    read: Callable[[int], Pair],
    count: int,
    *,
    name: str,
    split: str,
    classes: Sequence[str],
    size: tuple[int, int] | None,
    on_error: Literal["raise", "skip"],
    target: Target = "mask",
    ignore_label: int | None = None,
    limit: int | None = None,
    broken: Sequence[str] = (),
    called: Callable[[int], str] = "example {}".format,
    note: str = "",
    handed: bool = False,
) -> PairSource:
    """Reads every pair once and returns those that are right.

    `read(i)` gives pair i or raises BadFile; `called(i)` names it; `broken` are problems found before, such as a mask
    without a picture. No more than `limit` pairs are read, spread evenly. `note` follows the source's name wherever it
    is shown. Raises one UserError that names what is wrong; with on_error="skip" only where nothing is left or, without
    `size`, the pictures' sizes differ.
    """
    if size is not None and min(size) < 1:
        raise UserError(f"data.size={size}: height and width must be positive")
    if limit is not None and limit < 1:
        raise UserError(f"data.examples={limit}: there must be at least 1 training example")

    def check(index: int) -> tuple[Any, str]:
        try:
            image, answer = read(index)
            if isinstance(answer, np.ndarray):
                wrong = _wrong_mask(image, answer, ignore_label, len(classes))
            else:
                wrong = _wrong_label(answer, len(classes))
            if wrong:
                raise BadFile(f"{called(index)}: {wrong}")
            own = image.shape[:2]
            answer = _resize_answer(answer, size or own)
            return (own, resize_image(image, size or own), answer, _classes_in(answer, ignore_label)), ""
        except BadFile as error:
            return None, str(error)

    indices = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
    problems = list(broken)
    kept: list[int] = []
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    seen: set[int] = set()
    memory: tuple[np.ndarray, np.ndarray] | None = None
    for index, (pair, problem) in zip(indices, _in_threads(check, indices), strict=True):
        if pair is None:
            problems.append(problem)
            continue
        own, image, answer, present = pair
        seen |= present
        if not kept:
            memory = _memory(len(indices), image.shape[:2], target)
        if memory is not None and image.shape == memory[0].shape[1:]:
            memory[0][len(kept)], memory[1][len(kept)] = image, answer
        kept.append(index)
        sizes[own] += 1
    where = f"data.name={name}, {split}"
    if problems and on_error == "raise":
        raise UserError(f"{where}: {_few(problems)}; mend these, or leave them out with --data.on-error skip")
    if not kept:
        raise UserError(f"{where}: no example can be used" + (f": {_few(problems)}" if problems else ""))
    if not seen:
        raise UserError(f"{where}: every pixel of every mask is {ignore_label}, which marks ignored pixels")
    if size is None and len(sizes) > 1:
        found = ", ".join(f"{w}x{h} ({n})" for (h, w), n in sizes.most_common(3))
        raise UserError(
            f"{where}: pictures of {len(sizes)} sizes (width x height): {found}; give --data.size HEIGHT WIDTH"
        )
    if memory is not None:
        memory = memory[0][: len(kept)], memory[1][: len(kept)]
    return PairSource(
        name=f"{name} {note}" if note else name,
        split=split,
        classes=tuple(classes),
        spec=picture_spec(size or next(iter(sizes)), target, ignore_label),
        skipped=len(problems),
        read=read,
        kept=tuple(kept),
        memory=memory,
        handed=handed,
        seen=frozenset(seen),
    )


def _in_threads(function: Callable[[int], Any], indices: Sequence[int]) -> Iterator[Any]:
    """`function` of every index, in their order."""
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, len(indices), PART):
            part = indices[start : start + PART]
            turns = [part[i : i + TURN] for i in range(0, len(part), TURN)]
            for results in pool.map(lambda turn: [function(index) for index in turn], turns):
                yield from results


def _wrong_mask(image: np.ndarray, mask: np.ndarray, ignore_label: int | None, classes: int) -> str:
    """What is wrong with a mask; empty where nothing is."""
    if image.shape[:2] != mask.shape:
        shapes = [f"{w}x{h}" for h, w in (image.shape[:2], mask.shape)]
        return f"the image is {shapes[0]} and the mask {shapes[1]} (width x height)"
    wrong = mask[(mask < 0) | (mask >= classes)]
    wrong = wrong if ignore_label is None else wrong[wrong != ignore_label]
    if not wrong.size:
        return ""
    ignored = "" if ignore_label is None else f" and {ignore_label} for ignored pixels"
    return f"label {wrong.max()} in the mask, allowed are 0 to {classes - 1}{ignored}"


def _wrong_label(label: np.integer, classes: int) -> str:
    return "" if 0 <= label < classes else f"label {label}, allowed are 0 to {classes - 1}"


def _classes_in(answer: np.ndarray | np.integer, ignore_label: int | None) -> set[int]:
    """The classes of a checked mask or label."""
    if not np.ndim(answer):
        return {int(answer)}
    ids = np.ravel(answer)
    ids = ids if ignore_label is None else ids[ids != ignore_label]
    return set(np.flatnonzero(np.bincount(ids)).tolist())


def _resize_answer(answer: np.ndarray | np.integer, size: tuple[int, int]) -> np.ndarray | np.integer:
    return resize_mask(answer, size) if isinstance(answer, np.ndarray) else answer


def _memory(count: int, shape: tuple[int, int], target: Target) -> tuple[np.ndarray, np.ndarray] | None:
    """Room for all pictures and masks or labels, or None where that is too much."""
    pixels = count * shape[0] * shape[1]
    if (4 if target == "mask" else 3) * pixels > KEEP_BYTES:
        return None
    answers = np.empty((count, *shape), np.uint8) if target == "mask" else np.empty(count, np.int32)
    return np.empty((count, *shape, 3), np.uint8), answers


def _few(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    number = f"{len(problems)} bad files: " if len(problems) > 1 else ""
    return number + "; ".join(problems[:SHOWN]) + more


def match_stems(images: Path, masks: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pairs pictures and masks of two folders by name, sorted, and says what has no partner."""
    problems = []

    def by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            if file.name.startswith("."):
                continue
            if file.is_dir():
                problems.append(f"{file}: a folder inside {folder.name}, whose files are not read from there")
            elif file.suffix.lower() not in suffixes:
                problems.append(f"{file}: not one of {' '.join(suffixes)}")
            elif file.stem in found:
                problems.append(f"{file}: a second file named {file.stem} beside {found[file.stem].name}")
            else:
                found[file.stem] = file
        return found

    left, right = by_stem(images, IMAGE_SUFFIXES), by_stem(masks, IMAGE_SUFFIXES)
    problems += [f"{left[stem]}: no mask of that name in {masks}" for stem in left.keys() - right.keys()]
    problems += [f"{right[stem]}: no image of that name in {images}" for stem in right.keys() - left.keys()]
    pairs = [(left[stem], right[stem]) for stem in sorted(left.keys() & right.keys())]
    return pairs, sorted(problems)


def files_reader(pairs: Sequence[tuple[Path, Path]]) -> Callable[[int], Pair]:
    """`read` for `check_pairs` from files."""

    def read(index: int) -> Pair:
        image, mask = pairs[index]
        return read_image(image), read_mask(mask)

    return read
