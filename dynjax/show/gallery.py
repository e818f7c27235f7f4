"""Pictures of how a classifier spends its compute: by class, on easy and hard examples, over its exits.

Letters: H W picture, N pictures.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dynjax.show.report import LINES, engineering, line, plot


def plot_classes(
    path: str | os.PathLike,
    macs: Float[np.ndarray, " N"],
    labels: Integer[np.ndarray, " N"],
    class_names: Sequence[str],
    *,
    title: str = "",
) -> None:
    """How the MACs spread over the pictures of each class: median, quartiles, 5th and 95th percentile, and mean."""
    figure, axes = plot(7.0, 1.6 + 0.34 * len(class_names), title)
    scale, prefix = engineering(float(macs.max()))
    seen = [k for k in range(len(class_names)) if (labels == k).any()]
    order = sorted(seen, key=lambda k: macs[labels == k].mean())
    axes.boxplot(
        [macs[labels == k] / scale for k in order],
        orientation="horizontal",
        tick_labels=[class_names[k] for k in order],
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        meanprops={"marker": "D", "markerfacecolor": LINES[1], "markeredgecolor": LINES[1], "markersize": 5},
        medianprops={"color": LINES[0], "linewidth": 2},
    )
    axes.axvline(macs.mean() / scale, color="black", linestyle=":", label="mean of all")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{prefix}MAC per image (diamond: mean of the class)")
    axes.legend(frameon=False, fontsize=9, loc="center left")
    figure.savefig(path, dpi=130)


def plot_extremes(
    path: str | os.PathLike,
    rows: Mapping[str, Sequence[tuple[UInt8[np.ndarray, "H W 3"], str]]],
    *,
    title: str = "",
) -> None:
    """Rows of pictures and their captions, under a name each (the easiest, the hardest)."""
    columns = max(len(each) for each in rows.values())
    figure = Figure(figsize=(1.25 * columns + 0.6, 1.6 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, row), axes in zip(rows.items(), grid, strict=True):
        axes[0].set_ylabel(name, fontsize=10)
        for panel in axes:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        for panel, (image, caption) in zip(axes, row, strict=False):
            panel.imshow(image, interpolation="nearest")
            panel.set_xlabel(caption, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_grid(
    path: str | os.PathLike,
    images: UInt8[np.ndarray, "N H W 3"],
    macs: Float[np.ndarray, " N"],
    *,
    columns: int = 16,
    title: str = "",
) -> None:
    """All pictures side by side, those that took the fewest MACs first, each in a frame of its compute's colour."""
    order = np.argsort(macs, kind="stable")
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(0.55 * columns + 1.0, 0.6 * rows + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    scale, prefix = engineering(float(macs.max()))
    colours = ScalarMappable(Normalize(macs.min() / scale, macs.max() / scale), "viridis")
    for panel in grid[len(order) :]:
        panel.axis("off")
    for panel, index in zip(grid, order, strict=False):
        panel.imshow(images[index], interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set(color=colours.to_rgba(macs[index] / scale), linewidth=3)
    figure.colorbar(colours, ax=list(grid), label=f"{prefix}MAC", shrink=0.9, aspect=30, pad=0.01)
    figure.savefig(path, dpi=130)


def plot_exits(
    path: str | os.PathLike,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    static: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Accuracy over mean MACs: a line for each curve of (MACs, accuracy), and the static twin as a star."""
    figure, axes = plot(6.4, 4.6, title)
    scale, prefix = engineering(max(macs for points in curves.values() for macs, _ in points))
    for index, (label, points) in enumerate(curves.items()):
        look: dict[str, Any] = {**line(index), "linewidth": 1.2, "linestyle": "--"}
        if len(points) > 12:
            look |= {"marker": None, "linewidth": 2, "linestyle": "-"}
        axes.plot([macs / scale for macs, _ in points], [100 * score for _, score in points], label=label, **look)
    if static is not None:
        axes.plot([static[0] / scale], [100 * static[1]], "*", color="black", markersize=14, label="static twin")
    axes.set_xlim(left=0)
    axes.set(xlabel=f"{prefix}MAC per image, mean", ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=150)
