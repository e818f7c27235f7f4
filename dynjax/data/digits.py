"""`digits8`: scikit-learn's 1,797 handwritten digits of 8x8 pixels, for classification; no file, no download.

Alpaydin and Kaynak 1998. The splits are fixed: 60, 20 and 20% of each class, in the order of the set.
"""

import numpy as np

from dynjax.data.digit_scenes import SPLITS, cut, handwritten
from dynjax.data.labelled import make_labelled
from dynjax.data.pairs import PairSource


def make_digits8(split: str, *, size: tuple[int, int] | None = None, limit: int | None = None) -> PairSource:
    """1,078 train, 360 val or 359 test digits, 8x8 unless `size` says otherwise. Raises UserError."""
    images, labels = handwritten()
    rng = np.random.default_rng(8)
    parts = [cut(np.flatnonzero(labels == label), rng)[SPLITS.index(split)] for label in range(10)]
    indices = np.sort(np.concatenate(parts))
    return make_labelled(
        np.round(images[indices] * 255).astype(np.uint8),
        labels[indices],
        name="digits8",
        split=split,
        classes=tuple("0123456789"),
        size=size,
        limit=limit,
        handed=True,
    )
