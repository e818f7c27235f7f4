"""`camvid`: street scenes in the folder layout of the SegNet tutorial.

PATH/{train,val,test}/ hold the pictures, PATH/{train,val,test}annot/ PNGs of class ids 0 to 10, 11 is void. Where
PATH/{split}.txt exists it says, a line each, which picture belongs to which mask.
Brostow et al. 2008; protocol of Badrinarayanan et al. 2017.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from dynjax.config import DataConfig, UserError
from dynjax.data.files import Files, find_root, match_stems, with_masks
from dynjax.data.pairs import PairSource, check_pairs

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
VOID = 11
LAYOUT = "camvid is laid out as PATH/train, PATH/trainannot, ..."


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """CamVid's 367 train, 101 val or 233 test pictures, or any set in that layout and classes. Raises UserError."""
    return check_pairs(with_masks(*find_pairs(config, split), CLASSES, VOID), config, split)


def find_pairs(config: DataConfig, split: str) -> tuple[Files, list[str]]:
    """Files of a split and what is wrong with their names. Raises UserError where a folder is missing or empty."""
    root = find_root(config, LAYOUT, (split, f"{split}annot"))
    listing = root / f"{split}.txt"
    if listing.is_file():
        pairs, problems = _listed(root, listing)
    else:
        pairs, problems = match_stems(root / split, root / f"{split}annot")
    if not pairs and not problems:
        where = listing if listing.is_file() else root / split
        raise UserError(f"data.path={config.path}: the split {split} is empty ({where})")
    return pairs, problems


def _listed(root: Path, listing: Path) -> tuple[Files, list[str]]:
    pairs, problems = [], []
    for number, line in enumerate(listing.read_text("utf-8-sig", "surrogateescape").splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        # Names may have spaces: of the ways to part a line in two, one whose files are there; or the only one.
        ways = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
        found = [(_place(root, image), _place(root, mask)) for image, mask in ways]
        there = [files for files in found if all(file.is_file() for file in files)]
        if len(there) == 1 or len(found) == 1:
            pairs.append((there or found)[0])
        else:
            problems.append(f"{listing}, line {number}: {line[:60]!r} is not 'image mask', of files that are there")
    return pairs, problems


def _place(root: Path, name: str) -> Path:
    """The tutorial's own lists start with /SegNet/CamVid/: then the last two parts say where the file is."""
    return root / name if (root / name).is_file() else root.joinpath(*Path(name).parts[-2:])
