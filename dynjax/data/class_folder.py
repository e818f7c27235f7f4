"""`class_folder`: your own pictures in a folder per class, PATH/{train,val,test}/CLASS/NAME.png, .jpg, ..."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dynjax.config import UserError
from dynjax.data.pairs import Pair, PairSource, check_pairs
from dynjax.data.pictures import IMAGE_SUFFIXES, read_image


def make_class_folder(
    path: str,
    split: str,
    *,
    names: Sequence[str] | None = None,
    classes: int = 0,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> PairSource:
    """Pictures by class; the classes are `names` or, without them, the folders of train, sorted. Raises UserError.

    `classes` other than 0 must be the number of train's folders. A picture that cannot be read is named, or left out
    and counted; a folder of another name or without a picture is always an error.
    """
    if not path:
        raise UserError("data.name=class_folder needs a folder: give --data.path PATH")
    root = Path(path).expanduser()
    for folder in (root, root / split) if names else (root, root / "train", root / split):
        if not folder.is_dir():
            raise UserError(
                f"data.path={path}: no folder {folder}; a class_folder set is laid out as "
                "PATH/{train,val,test}/CLASS/NAME.*"
            )
    if names:
        names, whose = tuple(names), "the run"
    else:
        names, whose = _train_classes(path, root / "train", classes), str(root / "train")
    if others := sorted(set(_folders(root / split)) - set(names)):
        raise UserError(f"{root / split}: {', '.join(others[:5])} are no classes of {whose} ({', '.join(names[:5])})")
    files, problems = _pictures(root / split, names)

    def read(index: int) -> Pair:
        file, label = files[index]
        return read_image(file), np.int32(label)

    return check_pairs(
        read,
        len(files),
        name="class_folder",
        split=split,
        classes=names,
        size=size,
        on_error=on_error,
        target="label",
        limit=limit,
        broken=problems,
        called=lambda index: str(files[index][0]),
    )


def _train_classes(path: str, train: Path, classes: int) -> tuple[str, ...]:
    names = _folders(train)
    if not names:
        raise UserError(f"data.path={path}: no class, {train} has no folders")
    if set(names) <= {"images", "masks"}:
        raise UserError(
            f"data.path={path}: pictures with masks are data.name=folder; class_folder has a folder a class"
        )
    if classes not in (0, len(names)):
        raise UserError(f"data.classes={classes}: {train} has {len(names)} folders, one a class")
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
