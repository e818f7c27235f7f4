"""`isbi_em`: 30 sections of a fly's nerve cord under an electron microscope, and the membranes between its cells.

PATH/image/N.png hold the grey pictures of 512x512, PATH/label/N.png 0 on membranes and 255 in cells, as the challenge
of ISBI 2012 published its training set (Arganda-Carreras et al. 2015). Its own test labels are not public: train are
the first two thirds of the sections, val and test a sixth each of what follows. Neighbouring sections are alike: blocks
of them, and not a random choice, keep the splits apart.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dynjax.config import DataConfig, UserError
from dynjax.data.files import IGNORE_255, by_number, find_root, match_stems, part_of, with_masks
from dynjax.data.pairs import PairSource, check_pairs
from dynjax.data.pictures import read_binary_mask

CLASSES = ("cell", "membrane")
LAYOUT = "isbi_em is laid out as PATH/image/N.png and PATH/label/N.png"
SHARES = (2 / 3, 1 / 6)


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """20 train, 5 val or 5 test sections. Raises UserError."""
    root = find_root(config, LAYOUT, ("image", "label"))
    files, problems = match_stems(root / "image", root / "label")
    files = part_of(by_number(files), split, SHARES)
    if not files and not problems:
        raise UserError(f"data.path={config.path}: the split {split} is empty ({root / 'image'})")
    return check_pairs(with_masks(files, problems, CLASSES, IGNORE_255, read_mask=_read), config, split)


def _read(label: Path) -> np.ndarray:
    return 1 - read_binary_mask(label)
