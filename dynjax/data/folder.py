"""`folder`: your own pictures, PATH/{train,val,test}/{images,masks}/NAME.*; masks hold class ids, 255 is ignored."""

from collections.abc import Sequence

from dynjax.config import DataConfig, UserError
from dynjax.data.files import IGNORE_255, class_names, count_classes, find_root, match_stems, with_masks
from dynjax.data.pairs import PairSource, check_pairs
from dynjax.data.pictures import MASK_SUFFIXES, read_mask
from dynjax.data.source import SPLITS

LAYOUT = (
    "a folder set is laid out as PATH/{train,val,test}/{images,masks}/NAME.*; "
    "pictures in a folder per class are data.name=class_folder"
)


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """Pictures of a folder; where neither `classes` nor `config.classes` say how many there are, the largest label of
    all splits does. Raises UserError."""
    root = find_root(config, LAYOUT, (split, f"{split}/images", f"{split}/masks"))
    images = root / split / "images"
    files, problems = match_stems(images, root / split / "masks")
    if not files and not problems:
        raise UserError(f"data.path={config.path}: the split {split} is empty ({images})")
    count = len(classes) if classes else config.classes
    if not count:
        every = [file for each in SPLITS for file in (root / each / "masks").glob("*")]
        masks = [file for file in every if file.suffix.lower() in MASK_SUFFIXES]
        count = count_classes(read_mask, masks, f"data.path={root}")
    return check_pairs(with_masks(files, problems, class_names(count), IGNORE_255), config, split)
