"""`digits8`: scikit-learn's 1,797 handwritten digits of 8x8 pixels, for classification; no file, no download.

Alpaydin and Kaynak 1998. The splits are fixed: 60, 20 and 20% of each class, in the order of the set.
"""

from collections.abc import Sequence

import numpy as np

from dynjax.config import DataConfig
from dynjax.data.digit_scenes import cut, handwritten
from dynjax.data.labelled import with_labels
from dynjax.data.pairs import PairSource, check_pairs
from dynjax.data.source import SPLITS


def make(config: DataConfig, split: str, *, seed: int = 0, classes: Sequence[str] | None = None) -> PairSource:
    """1,078 train, 360 val or 359 test digits, 8x8 unless `config.size` says otherwise. Raises UserError."""
    images, labels = handwritten()
    rng = np.random.default_rng(8)
    parts = [cut(np.flatnonzero(labels == label), rng)[SPLITS.index(split)] for label in range(10)]
    indices = np.sort(np.concatenate(parts))
    pictures = np.round(images[indices] * 255).astype(np.uint8)
    return check_pairs(with_labels(pictures, labels[indices], tuple("0123456789"), handed=True), config, split)
