"""Pictures with one label that come as arrays: what MNIST, CIFAR-10 and scikit-learn's digits share.

N is the number of pictures; H, W are height and width in pixels.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt8

from dynjax.data.pairs import Pair, PairSource, check_pairs

HELD_OUT = 5000  # the last training pictures, which papers on these sets hold out


def part_of(split: str, train: int, test: int) -> range:
    """Indices of a split into the official training or test pictures, of which there are `train` and `test`.

    val is the last 5,000 of the training pictures, or the last tenth of a set that has fewer than 50,000.
    """
    held_out = min(HELD_OUT, train // 10)
    return {"train": range(train - held_out), "val": range(train - held_out, train), "test": range(test)}[split]


def make_labelled(
    images: UInt8[np.ndarray, "N H W"] | UInt8[np.ndarray, "N H W 3"],
    labels: Integer[np.ndarray, " N"],
    *,
    name: str,
    split: str,
    classes: tuple[str, ...],
    size: tuple[int, int] | None,
    limit: int | None,
    handed: bool,
    on_error: Literal["raise", "skip"] = "raise",
    called: Callable[[int], str] = "example {}".format,
) -> PairSource:
    """A source from arrays, grey pictures as three equal channels. Raises UserError for a label outside the classes."""

    def read(index: int) -> Pair:
        image = images[index]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2), np.int32(labels[index])

    return check_pairs(
        read,
        len(images),
        name=name,
        split=split,
        classes=classes,
        size=size,
        on_error=on_error,
        target="label",
        limit=limit,
        called=called,
        handed=handed,
    )
