"""Which kind of work each tile of a picture took. Axis letters: H W picture, h w tiles."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dynjax.show import report

COLOURS = ("#E8E8E8", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#E69F00")
"""The cheapest pale, so that what is rich stands out."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A picture, its mask, and the kinds that its tiles took."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    mask: Integer[np.ndarray, "H W"]
    kinds: Integer[np.ndarray, "h w"]
    """Number of the kind, 0 the cheapest."""
    tile: tuple[float, float]
    """Height and width of a tile, as shares of the picture's."""


def plot_kinds(path: str | os.PathLike, examples: Sequence[Chosen], kinds: int, classes: int, *, title: str) -> None:
    """A PNG with a row for each picture: itself, its mask, and its tiles in the colour of what they took."""
    colours = [COLOURS[kind % len(COLOURS)] for kind in range(kinds)]
    figure = Figure(figsize=(11, 2.9 * len(examples) + 0.9), layout="constrained")
    axes = figure.subplots(len(examples), 3, squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        height, width = example.image.shape[:2]
        down, across = (side * size for side, size in zip(example.tile, (height, width), strict=True))
        row[0].imshow(example.image)
        row[1].imshow(report.paint(example.mask, classes))
        row[2].imshow(example.image, alpha=0.35)
        rows, columns = example.kinds.shape
        where = (-0.5, columns * across - 0.5, rows * down - 0.5, -0.5)
        row[2].imshow(example.kinds, ListedColormap(colours), vmin=-0.5, vmax=kinds - 0.5, extent=where, alpha=0.6)
        for axis, told in zip(row, (example.name, "mask", "kind of each tile"), strict=True):
            axis.set(title=told, xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    names = ["the cheapest", *(f"kind {kind + 1}" for kind in range(1, kinds - 1)), "the dearest"]
    patches = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=kinds)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
