"""`folder`: your own pictures, PATH/{train,val,test}/{images,masks}/NAME.*, and their classes, PATH/classes.txt.

Masks hold class ids, 255 is ignored; with `masks` "binary" 0 and 255, or with "colours" those of classes.txt.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from dynjax.config import DataConfig, UserError
from dynjax.data.files import IGNORE_255, ReadMask, class_names, count_classes, find_root, match_stems, with_masks
from dynjax.data.legend import FILE, Legend, read_legend
from dynjax.data.pairs import PairSource, check_pairs
from dynjax.data.pictures import MASK_SUFFIXES, read_binary_mask, read_colour_mask, read_mask
from dynjax.data.source import SPLITS

LAYOUT = (
    "a folder set is laid out as PATH/{train,val,test}/{images,masks}/NAME.*; "
    "pictures in a folder per class are data.name=class_folder"
)
BINARY = ("background", "foreground")
"""Names where there is no classes.txt."""


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """Pictures of a folder; where neither classes.txt, `classes` nor `config.classes` say how many classes there are,
    the largest label of all splits does. Raises UserError."""
    root = find_root(config, LAYOUT, (split, f"{split}/images", f"{split}/masks"))
    images = root / split / "images"
    files, problems = match_stems(images, root / split / "masks")
    if not files and not problems:
        raise UserError(f"data.path={config.path}: the split {split} is empty ({images})")
    legend = read_legend(root)
    read = _reader(config, root, legend)
    names = _names(config, root, legend, classes, read)
    named = "" if legend is None else str(legend.file)
    return check_pairs(with_masks(files, problems, names, IGNORE_255, read_mask=read, named=named), config, split)


def _reader(config: DataConfig, root: Path, legend: Legend | None) -> ReadMask:
    """Reads masks of the kind that the configuration says. Raises UserError where that needs colours."""
    if config.masks == "ids":
        hint = f"; for masks in colours give --data.masks colours and {root / FILE}, for black and white ones "
        return functools.partial(read_mask, hint=f"{hint}--data.masks binary")
    if config.masks == "binary":
        return read_binary_mask
    wanted = "--data.masks colours needs the colour of every class, a line `NAME #rrggbb` each"
    if legend is None:
        raise UserError(f"{wanted}: there is no {root / FILE}")
    if legend.plain:
        raise UserError(f"{wanted}: {legend.file} has none for {', '.join(legend.plain[:5])}")
    return functools.partial(read_colour_mask, ids=legend.ids, where=str(legend.file))


def _names(
    config: DataConfig, root: Path, legend: Legend | None, classes: Sequence[str] | None, read: ReadMask
) -> tuple[str, ...]:
    """Of the classes. Raises UserError."""
    if legend is not None:
        two = 2 if config.masks == "binary" else 0
        for count, told in ((config.classes, f"data.classes={config.classes}"), (two, f"data.masks={config.masks}")):
            if count not in (0, len(legend.names)):
                raise UserError(f"{told}: {legend.file} names {len(legend.names)} classes, not {count}")
        return legend.names
    if config.masks == "binary":
        if config.classes not in (0, 2):
            raise UserError(f"data.classes={config.classes}: with --data.masks binary there are 2")
        return BINARY
    if count := len(classes) if classes else config.classes:
        return class_names(count)
    every = [file for each in SPLITS for file in (root / each / "masks").glob("*")]
    masks = [file for file in every if file.suffix.lower() in MASK_SUFFIXES]
    return class_names(count_classes(read, masks, f"data.path={root}", ", or give --data.masks binary"))
