"""`aerial_roads`: 100 aerial pictures of 400x400 pixels and the roads on them, of a course of EPFL and ETH.

PATH/images/satImage_NNN.* hold the pictures, PATH/groundtruth/satImage_NNN.png grey masks with soft edges: road is what
is brighter than half. There are no splits: 70, 15 and 15 of a hundred, by a fixed seed, are train, val and test.
"""

from collections.abc import Sequence

import numpy as np

from dynjax.config import DataConfig, UserError
from dynjax.data.files import IGNORE_255, find_root, match_stems, part_of, with_masks
from dynjax.data.pairs import PairSource, check_pairs
from dynjax.data.pictures import read_binary_mask

CLASSES = ("background", "road")
LAYOUT = "aerial_roads is laid out as PATH/images/NAME.* and PATH/groundtruth/NAME.png"
SHARES = (0.7, 0.15)


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """70 train, 15 val or 15 test pictures. Raises UserError."""
    root = find_root(config, LAYOUT, ("images", "groundtruth"))
    files, problems = match_stems(root / "images", root / "groundtruth")
    order = np.random.default_rng(0).permutation(len(files)).tolist()
    files = part_of([files[index] for index in order], split, SHARES)
    if not files and not problems:
        raise UserError(f"data.path={config.path}: the split {split} is empty ({root / 'images'})")
    return check_pairs(with_masks(files, problems, CLASSES, IGNORE_255, read_mask=read_binary_mask), config, split)
