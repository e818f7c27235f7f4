"""`camvid`: street scenes in the folder layout of the SegNet tutorial.

PATH/{train,val,test}/ hold the pictures, PATH/{train,val,test}annot/ PNGs of class ids 0 to 10, 11 is void. Where
PATH/{split}.txt exists it says, a line each, which picture belongs to which mask.
Brostow et al. 2008; protocol of Badrinarayanan et al. 2017.
"""

import re
from pathlib import Path
from typing import Literal

from dynjax.config import UserError
from dynjax.data.pairs import PairSource, check_pairs, files_reader, match_stems

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
VOID = 11


def make_camvid(
    path: str,
    split: str,
    *,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> PairSource:
    """CamVid's 367 train, 101 val or 233 test pictures, or any set in that layout and classes. Raises UserError."""
    pairs, problems = find_pairs(path, split)
    return check_pairs(
        files_reader(pairs),
        len(pairs),
        name="camvid",
        split=split,
        classes=CLASSES,
        ignore_label=VOID,
        size=size,
        limit=limit,
        on_error=on_error,
        broken=problems,
        called=lambda index: str(pairs[index][0]),
    )


def find_pairs(path: str, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Files of a split and what is wrong with their names. Raises UserError where a folder is missing or empty."""
    root = Path(path).expanduser()
    if not path:
        raise UserError("data.name=camvid needs a folder: give --data.path PATH")
    for folder in (root, root / split, root / f"{split}annot"):
        if not folder.is_dir():
            raise UserError(
                f"data.path={path}: no folder {folder}; camvid is laid out as PATH/train, PATH/trainannot, ..."
            )
    listing = root / f"{split}.txt"
    if listing.is_file():
        pairs, problems = _listed(root, listing)
    else:
        pairs, problems = match_stems(root / split, root / f"{split}annot")
    if not pairs and not problems:
        raise UserError(
            f"data.path={path}: the split {split} is empty ({listing if listing.is_file() else root / split})"
        )
    return pairs, problems


def _listed(root: Path, listing: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
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
