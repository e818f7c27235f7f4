"""Pictures larger than what a model looks at: overlapping windows of its size, whose results are blended.

A window counts by a pyramid that falls to its border, and at every pixel the weights of all windows sum to one: there
are no seams, and where a window is alone its result is taken as it is. Windows go in bands across the shorter side of
the picture; what no later band touches is finished, and its probabilities are dropped for the class of the largest. So
there are never those of more than a band, or two while it moves on. A picture that is smaller than a window is black
around, as in training (`dynjax.data.windows`). Pure NumPy; the model is whatever is called.

Letters: H W picture, h w window, K classes, L S pixels of an axis of the picture and of a window.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

from dynjax.data.windows import take

Window = UInt8[np.ndarray, "h w 3"]
Ids = UInt8[np.ndarray, "H W"] | UInt16[np.ndarray, "H W"]
Run = Callable[[Window], tuple[np.ndarray, np.ndarray, float]]
"""Probabilities (h, w, K), heat map (h, w) and MACs of one window."""

OVERLAP = 0.25
"""Share of a window's side that the next one covers too, at least."""
MOST_OVERLAP = 0.75
"""Each pixel is then computed 16 times."""


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """What the windows of a picture come to."""

    ids: Ids
    """The class of the largest blended probability."""
    sure: Float32[np.ndarray, "H W"]
    """That probability."""
    heat: Float32[np.ndarray, "H W"]
    """MACs per pixel, blended as the probabilities are. What lies in several windows is computed as often: it sums to
    less than `macs`."""
    macs: float
    """The sum over the windows."""
    windows: int


@dataclasses.dataclass(frozen=True)
class Band:
    """Finished rows of a picture, from `top` on."""

    top: int
    ids: np.ndarray
    sure: np.ndarray
    heat: np.ndarray
    macs: float
    """Of the windows that were run for it."""
    windows: int


def starts(length: int, side: int, overlap: float = OVERLAP) -> list[int]:
    """Where windows of `side` begin so that they cover `length` pixels: the first at 0, the last flush with the end,
    the others evenly between, each with at least `overlap` of a side on the next."""
    if length <= side:
        return [0]
    step = max(1, int(side * (1 - overlap)))
    number = -(-(length - side) // step) + 1
    return [index * (length - side) // (number - 1) for index in range(number)]


def weights(length: int, side: int, places: Sequence[int]) -> list[Float32[np.ndarray, " S"]]:
    """How much each window counts at its pixels along an axis: a pyramid, divided by the sum over all windows there."""
    pyramid = np.minimum(np.arange(side), np.arange(side)[::-1]) + 0.5
    total = np.zeros(max(length, side))
    for place in places:
        total[place : place + side] += pyramid
    return [(pyramid / total[place : place + side]).astype(np.float32) for place in places]


def bands(picture: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], run: Run, overlap: float) -> Iterator[Band]:
    """The picture from its first row to its last, some rows at a time; the probabilities of a window's height of rows
    are in memory."""
    (height, width), (tall, wide) = picture.shape[:2], size
    tops, lefts = starts(height, tall, overlap), starts(width, wide, overlap)
    down, across = weights(height, tall, tops), weights(width, wide, lefts)
    likely, heat = np.zeros((tall, max(width, wide), 0), np.float32), np.zeros((tall, max(width, wide)), np.float32)
    for top, end, share in zip(tops, [*tops[1:], height], down, strict=True):
        macs = 0.0
        for left, own in zip(lefts, across, strict=True):
            probabilities, spent, cost = run(take(picture, top, left, size, 0))
            if not likely.shape[-1]:
                likely = np.zeros((*likely.shape[:2], probabilities.shape[-1]), np.float32)
            weight = share[:, None] * own[None]
            likely[:, left : left + wide] += weight[..., None] * probabilities
            heat[:, left : left + wide] += weight * spent
            macs += float(cost)
        rows = end - top  # no later window reaches above the next one's top
        done = likely[:rows, :width]
        ids = done.argmax(-1).astype(np.uint8 if done.shape[-1] <= 256 else np.uint16)
        yield Band(top, ids, done.max(-1), heat[:rows, :width].copy(), macs, len(lefts))
        for each in (likely, heat):
            _move_up(each, rows)


def _move_up(band: np.ndarray, rows: int) -> None:
    """The band without its first rows, and new ones of zeros, in place."""
    band[: len(band) - rows] = band[rows:]
    band[len(band) - rows :] = 0


def stitch(picture: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], run: Run, *, overlap: float = OVERLAP) -> Mosaic:
    """All windows of a picture, of `size` (h, w), as one result of the picture's own size."""
    if not 0 <= overlap <= MOST_OVERLAP:
        raise ValueError(f"overlap {overlap} must be a share of the window's side in [0, {MOST_OVERLAP}]")
    turned = picture.shape[1] > picture.shape[0]

    def run_turned(window: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        probabilities, heat, macs = run(window.swapaxes(0, 1))
        return probabilities.swapaxes(0, 1), heat.swapaxes(0, 1), macs

    if turned:  # bands across the shorter side are smaller
        parts = bands(picture.swapaxes(0, 1), size[::-1], run_turned, overlap)
    else:
        parts = bands(picture, size, run, overlap)
    first = next(parts)
    shape = picture.shape[1::-1] if turned else picture.shape[:2]
    ids, sure, heat = (np.zeros(shape, each.dtype) for each in (first.ids, first.sure, first.heat))
    macs, windows = 0.0, 0
    for band in itertools.chain([first], parts):
        rows = slice(band.top, band.top + len(band.ids))
        ids[rows], sure[rows], heat[rows] = band.ids, band.sure, band.heat
        macs, windows = macs + band.macs, windows + band.windows
    if turned:
        ids, sure, heat = ids.T, sure.T, heat.T
    return Mosaic(ids, sure, heat, macs, windows)
