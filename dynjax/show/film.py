"""Pictures of sampling: what was drawn, how it came to be, and where the calls went.

Letters: N pictures, T moments, H W pixels, h w pixels or codes.
"""

import io
import math
import os

import numpy as np
from jaxtyping import Float, Integer, Num, UInt8
from matplotlib.figure import Figure
from PIL import Image

from dynjax.show.report import plot

GAP, PAPER = 2, 128  # pixels between pictures, and their grey


def tile(images: UInt8[np.ndarray, "N H W 3"], columns: int) -> UInt8[np.ndarray, "... 3"]:
    """One picture of all, in rows of so many."""
    number, height, width, _ = images.shape
    rows = -(-number // columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), PAPER, np.uint8)
    for index, image in enumerate(images):
        top, left = (
            GAP + place * (side + GAP) for place, side in zip(divmod(index, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(path: str | os.PathLike, images: UInt8[np.ndarray, "N H W 3"], columns: int = 0, scale: int = 2) -> None:
    """All pictures side by side, as square as can be, every pixel `scale` wide: same pictures, same file."""
    sheet = tile(images, columns or math.ceil(math.sqrt(len(images))))
    Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1)).save(path)


def save_film(path: str | os.PathLike, moments: UInt8[np.ndarray, "N T H W 3"], scale: int = 2) -> None:
    """A row for each picture, from left to right how it comes to be."""
    number, times = moments.shape[:2]
    save_grid(path, moments.reshape(number * times, *moments.shape[2:]), columns=times, scale=scale)


def plot_calls(
    path: str | os.PathLike,
    images: UInt8[np.ndarray, "N H W 3"],
    visits: Integer[np.ndarray, "N h w"],
    calls: Integer[np.ndarray, " N"],
    what: str = "calls",
    *,
    counted: str = "evaluations",
    title: str = "",
) -> None:
    """Pictures, and under each how often every pixel of it, or code, was evaluated (or what else is `counted`), all on
    one scale."""
    number = len(images)
    figure = Figure(figsize=(1.1 * number + 1, 3.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(2, number, squeeze=False)
    top = max(2, int(visits.max()))
    for column in range(number):
        for axes in grid[:, column]:
            axes.set(xticks=[], yticks=[])
        grid[0, column].imshow(images[column], interpolation="nearest")
        shown = grid[1, column].imshow(visits[column], cmap="viridis", vmin=1, vmax=top, interpolation="nearest")
        grid[1, column].set_xlabel(f"{calls[column]} {what}", fontsize=9)
    figure.colorbar(shown, ax=list(grid[1]), label=counted, shrink=0.9)
    figure.savefig(path, dpi=130)


def plot_histogram(path: str | os.PathLike, calls: dict[str, Integer[np.ndarray, " N"]], *, title: str = "") -> None:
    """How many pictures took so many calls, for each sampler."""
    figure, axes = plot(6.4, 4.0, title)
    top = max(int(each.max()) for each in calls.values())
    bins = np.linspace(0, top + 1, min(40, top + 2))
    axes.hist(list(calls.values()), bins=bins.tolist(), label=list(calls))
    axes.set(xlabel="calls of a picture", ylabel="pictures")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The picture as a PNG file."""
    said = io.BytesIO()
    Image.fromarray(image).save(said, "png", optimize=True)
    return said.getvalue()


def png_bytes(image: UInt8[np.ndarray, "H W 3"]) -> int:
    """Size of the picture as a PNG file: how complex it is to one who knows nothing of the model."""
    return len(png(image))


def rank_correlation(a: Num[np.ndarray, " N"], b: Num[np.ndarray, " N"]) -> float:
    """Spearman's, equals sharing their mean rank; nan where one of the two is the same for all."""

    def ranks(values: Num[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    if len(set(a.tolist())) < 2 or len(set(b.tolist())) < 2:
        return float("nan")
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
