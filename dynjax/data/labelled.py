"""Pictures with one label that come as arrays: what MNIST, CIFAR-10 and scikit-learn's digits share.

N is the number of pictures; H, W are height and width in pixels.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Integer, UInt8

from dynjax.data.pairs import Pair, Pairs

HELD_OUT = 5000  # the last training pictures, which papers on these sets hold out


def part_of(split: str, count: int) -> slice:
    """The part of the official training pictures, or for test of the test pictures, of which there are `count`.

    val is the last 5,000 of the training pictures, or the last tenth of a set that has fewer than 50,000.
    """
    held_out = min(HELD_OUT, count // 10)
    return {"train": slice(0, count - held_out), "val": slice(count - held_out, count), "test": slice(0, count)}[split]


def with_labels(
    images: UInt8[np.ndarray, "N H W"] | UInt8[np.ndarray, "N H W 3"],
    labels: Integer[np.ndarray, " N"],
    classes: tuple[str, ...],
    *,
    handed: bool,
    called: Callable[[int], str] = "example {}".format,
) -> Pairs:
    """Pictures with labels from arrays, grey ones as three equal channels."""

    def read(index: int) -> Pair:
        image = images[index]
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2), np.int32(labels[index])

    return Pairs(read, len(images), classes, called=called, handed=handed)
