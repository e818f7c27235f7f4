"""`class_folder`: your own pictures in a folder per class, PATH/{train,val,test}/CLASS/NAME.png, .jpg, ..."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynjax.config import DataConfig, UserError
from dynjax.data.files import find_root
from dynjax.data.pairs import Pair, Pairs, PairSource, check_pairs
from dynjax.data.pictures import IMAGE_SUFFIXES, read_image

LAYOUT = "a class_folder set is laid out as PATH/{train,val,test}/CLASS/NAME.*"


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """Pictures by class; the classes are `classes` or, without them, the folders of train, sorted. Raises UserError.

    `config.classes` other than 0 must be the number of train's folders. A picture that cannot be read is named, or left
    out and counted; a folder of another name or without a picture is always an error.
    """
    root = find_root(config, LAYOUT, (split,) if classes else ("train", split))
    if classes:
        names, whose = tuple(classes), "the run"
    else:
        names, whose = _train_classes(config, root / "train"), str(root / "train")
    if others := sorted(set(_folders(root / split)) - set(names)):
        raise UserError(f"{root / split}: {', '.join(others[:5])} are no classes of {whose} ({', '.join(names[:5])})")
    files, problems = _pictures(root / split, names)

    def read(index: int) -> Pair:
        file, label = files[index]
        return read_image(file), np.int32(label)

    pairs = Pairs(read, len(files), names, broken=problems, called=lambda index: str(files[index][0]))
    return check_pairs(pairs, config, split)


def _train_classes(config: DataConfig, train: Path) -> tuple[str, ...]:
    names = _folders(train)
    if not names:
        raise UserError(f"data.path={config.path}: no class, {train} has no folders")
    if set(names) <= {"images", "masks"}:
        raise UserError(
            f"data.path={config.path}: pictures with masks are data.name=folder; class_folder has a folder a class"
        )
    if config.classes not in (0, len(names)):
        raise UserError(f"data.classes={config.classes}: {train} has {len(names)} folders, one a class")
    return names


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")))


def _pictures(folder: Path, names: tuple[str, ...]) -> tuple[list[tuple[Path, int]], list[str]]:
    """Files with their labels, class by class, and what else lies there."""
    files: list[tuple[Path, int]] = []
    problems = []
    for file in sorted(folder.iterdir()):
        if not file.is_dir() and not file.name.startswith("."):
            problems.append(f"{file}: lies beside the folders of the classes")
    for label, name in enumerate(names):
        if not (folder / name).is_dir():  # val and test need not have every class
            continue
        before = len(files)
        for file in sorted((folder / name).iterdir()):
            if file.name.startswith("."):
                continue
            if file.is_dir():
                problems.append(f"{file}: a folder inside the folder of a class")
            elif file.suffix.lower() not in IMAGE_SUFFIXES:
                problems.append(f"{file}: not one of {' '.join(IMAGE_SUFFIXES)}")
            else:
                files.append((file, label))
        if len(files) == before:
            raise UserError(f"{folder / name}: no picture of that class; remove the folder or fill it")
    return files, problems
