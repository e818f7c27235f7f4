"""`folder`: your own pictures, PATH/{train,val,test}/{images,masks}/NAME.*; masks hold class ids, 255 is ignored."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from dynjax.config import UserError
from dynjax.data.pairs import (
    IGNORE_255,
    PairSource,
    check_pairs,
    class_names,
    files_reader,
    largest_label,
    match_stems,
    workers,
)
from dynjax.data.pictures import MASK_SUFFIXES, BadFile, read_mask


def make_folder(
    path: str,
    split: str,
    *,
    classes: int = 0,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> PairSource:
    """Pictures of a folder; `classes` 0 takes the number from the largest label of all splits. Raises UserError."""
    if not path:
        raise UserError("data.name=folder needs a folder: give --data.path PATH")
    root = Path(path).expanduser()
    images, masks = root / split / "images", root / split / "masks"
    for folder in (root, root / split, images, masks):
        if not folder.is_dir():
            raise UserError(
                f"data.path={path}: no folder {folder}; a folder set is laid out as "
                "PATH/{train,val,test}/{images,masks}/NAME.*; pictures in a folder per class are data.name=class_folder"
            )
    pairs, problems = match_stems(images, masks)
    if not pairs and not problems:
        raise UserError(f"data.path={path}: the split {split} is empty ({images})")
    return check_pairs(
        files_reader(pairs),
        len(pairs),
        name="folder",
        split=split,
        classes=class_names(classes or _count_classes(root)),
        ignore_label=IGNORE_255,
        size=size,
        limit=limit,
        on_error=on_error,
        broken=problems,
        called=lambda index: str(pairs[index][0]),
    )


def _count_classes(root: Path) -> int:
    """One more than the largest label in any split: all must agree on it. Broken masks are left to the checks."""

    def largest(file: Path) -> int:
        try:
            return largest_label(read_mask(file))
        except BadFile:
            return -1

    files = [file for file in root.glob("*/masks/*") if file.suffix.lower() in MASK_SUFFIXES]
    with ThreadPoolExecutor(workers()) as pool:
        return 1 + max(pool.map(largest, files), default=-1)
