"""What sets of files share: folders that must be there, masks that belong to pictures, classes that are counted."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped

from dynjax.config import DataConfig, UserError
from dynjax.data.pairs import Pair, Pairs, workers
from dynjax.data.pictures import IMAGE_SUFFIXES, BadFile, read_image, read_mask

IGNORE_255 = 255  # what marks ignored pixels in folders and TFDS sets

Files = list[tuple[Path, Path]]
"""Pictures and their masks."""

Key = TypeVar("Key")

ReadMask = Callable[[Path], Shaped[np.ndarray, "H W"]]
"""Class ids of a mask; raises BadFile."""


def find_root(config: DataConfig, layout: str, inside: Iterable[str] = ()) -> Path:
    """The folder of `data.path`. Raises UserError where it or a folder `inside` is missing, which ends in `layout`."""
    if not config.path:
        raise UserError(f"data.name={config.name} needs a folder: give --data.path PATH")
    root = Path(config.path).expanduser()
    for folder in (root, *(root / each for each in inside)):
        if not folder.is_dir():
            raise UserError(f"data.path={config.path}: no folder {folder}; {layout}")
    return root


def match_stems(images: Path, masks: Path) -> tuple[Files, list[str]]:
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


def with_masks(
    files: Files,
    problems: Sequence[str],
    classes: tuple[str, ...],
    ignored: int,
    *,
    read_mask: ReadMask = read_mask,
    named: str = "",
) -> Pairs:
    """Pictures with masks from files; `named` is the file that names the classes."""

    def read(index: int) -> Pair:
        image, mask = files[index]
        return read_image(image), read_mask(mask)

    return Pairs(
        read,
        len(files),
        classes,
        target="mask",
        ignored=ignored,
        broken=problems,
        called=lambda index: str(files[index][0]),
        named=named,
    )


def by_number(files: Files) -> Files:
    """In the order of the numbers that are their names: 2 before 10."""
    return sorted(files, key=lambda pair: (len(pair[0].stem), pair[0].stem))


def part_of(files: Files, split: str, shares: tuple[float, float]) -> Files:
    """Of files that come without splits: the first share is train, the second val, what is left test."""
    first, second = (round(share * len(files)) for share in (shares[0], sum(shares)))
    return {"train": files[:first], "val": files[first:second], "test": files[second:]}[split]


def class_names(count: int) -> tuple[str, ...]:
    """Names of classes of which nothing but the number is known. Raises UserError."""
    if not 2 <= count <= IGNORE_255:
        raise UserError(
            f"data.classes={count}: there can be 2 to {IGNORE_255} classes; {IGNORE_255} marks ignored pixels"
        )
    return tuple(f"class {index}" for index in range(count))


def count_classes(
    read: Callable[[Key], Shaped[np.ndarray, "H W"]], masks: Iterable[Key], where: str, hint: str = ""
) -> int:
    """One more than the largest label in any of the masks; broken ones are left to the checks, unless all are. Raises
    UserError below 2, which ends in `hint`."""
    broken: list[str] = []

    def largest(mask: Key) -> int:
        try:
            ids = read(mask)
        except BadFile as error:
            broken.append(str(error))
            return -1
        ids = ids[ids != IGNORE_255]
        return int(ids.max()) if ids.size else -1

    with ThreadPoolExecutor(workers()) as pool:
        count = 1 + max(pool.map(largest, masks), default=-1)
    if count == 0 and broken:
        raise UserError(f"{where}: there is no class in any mask to count: {min(broken)}")
    if count == 0:
        raise UserError(f"{where}: there is no class in any mask to count; give --data.classes N")
    if count == 1:
        raise UserError(
            f"{where}: no mask has a class other than 0, {IGNORE_255} marks ignored pixels, and there must be at "
            f"least 2: store two as 0 and 1, not as 0 and {IGNORE_255}{hint}"
        )
    return count
