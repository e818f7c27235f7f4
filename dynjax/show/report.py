"""Tables and pictures of an evaluated model. Axis letters: H W picture, N pictures, C classes."""

import csv
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

# Okabe and Ito's colours, which stay apart for colour-blind readers: one per curve, with a marker of its own.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Class colours: light and dark alternate within neighbouring hues, so that they differ in brightness too.
CLASSES = (
    "#88CCEE #882255 #DDCC77 #332288 #CC6677 #117733 #F0E442 #AA4499 #0072B2 #D55E00 #44AA99 #999933 "
    "#FFAABB #661100 #BBCC33 #6699CC #004D40 #EE8866 #AAAA00 #EECC66"
).split()
IGNORED = (128, 128, 128)
LEGEND = 60
"""Classes that a legend names; of more, those that are seen."""
HEAT = "viridis"
MARKED = "#FF2D00"
SHOWN = 2_000_000
"""Pixels of a picture that is there to be looked at."""


def palette(classes: int) -> UInt8[np.ndarray, "C 3"]:
    """One RGB colour per class; after the 20th they are spread over hue and brightness."""
    colours = [tuple(bytes.fromhex(colour[1:])) for colour in CLASSES[:classes]]
    for index in range(len(colours), classes):
        hue, bright = index * 0.618 % 1.0, 0.45 + 0.5 * (index * 0.382 % 1.0)
        wheel = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        colours.append(tuple(np.round(255 * bright * (0.35 + 0.65 * wheel)).astype(int)))
    return np.array(colours, np.uint8).reshape(classes, 3)


def paint(mask: Integer[np.ndarray, "H W"], classes: int) -> UInt8[np.ndarray, "H W 3"]:
    """The mask in class colours; labels outside the classes (ignored pixels are -1) in grey."""
    inside = (mask >= 0) & (mask < classes)
    return np.where(inside[..., None], palette(classes)[np.where(inside, mask, 0)], np.uint8(IGNORED[0]))


def overlay(
    image: UInt8[np.ndarray, "H W 3"], mask: Integer[np.ndarray, "H W"], classes: int, strength: float = 0.55
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture with the mask's colours over it."""
    mixed = (1 - strength) * image.astype(np.float32) + strength * paint(mask, classes)
    return np.round(mixed).astype(np.uint8)


def mark(image: UInt8[np.ndarray, "H W 3"], where: Bool[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in pale grey, and in a bright colour the pixels to look at."""
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    colour = np.array(list(bytes.fromhex(MARKED[1:])), np.float32)
    marked = np.where(where[..., None], 0.3 * grey + 0.7 * colour, 90 + 0.65 * grey)
    return np.round(marked).astype(np.uint8)


def preview(picture: Image.Image) -> Image.Image:
    """The picture, made smaller where it has more than SHOWN pixels."""
    factor = math.sqrt(SHOWN / (picture.width * picture.height))
    if factor >= 1:
        return picture
    width, height = (max(1, int(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def save_mask(path: str | os.PathLike, mask: Integer[np.ndarray, "H W"], classes: int) -> None:
    """A PNG whose pixel values are the class ids: of up to 256 classes of 8 bits, with a palette that shows them in
    colour, and other ids (255 of ignored pixels) in grey; of more, grey of 16 bits."""
    if classes > 256:
        Image.fromarray(mask.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(mask.astype(np.uint8, copy=False))
    picture.putpalette(palette(classes).tobytes() + bytes(IGNORED) * (256 - classes))
    picture.save(path, bits=8)


def save_pictures(folder: str | os.PathLike, images: dict[str, UInt8[np.ndarray, "H W 3"]]) -> None:
    """NAME.png of each picture."""
    os.makedirs(folder, exist_ok=True)
    for name, image in images.items():
        Image.fromarray(image).save(os.path.join(folder, f"{name}.png"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in lines
    )


def write_points(path: str | os.PathLike, points: Sequence[Any]) -> None:
    """Dataclasses of one kind as a CSV file: a header and one line per point; a cell is empty for nan."""
    with open(path, "w", newline="") as file:
        names = [field.name for field in dataclasses.fields(points[0])]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for point in points:
            writer.writerow({name: _cell(value) for name, value in dataclasses.asdict(point).items()})


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def style(axes: Axes) -> None:
    """A light grid, and no frame above and on the right."""
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure with one plot, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    style(axes)
    axes.set_title(title, fontsize=10)
    return figure, axes


def line(index: int) -> dict[str, str]:
    """Colour and marker of a curve, for Matplotlib."""
    return {"color": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)]}


def engineering(values: float) -> tuple[float, str]:
    """A divisor and its prefix for numbers up to `values`: 2.5e6 -> (1e6, "M")."""
    power = min(max(int(math.log10(values) // 3), 0), 3) if values >= 1 else 0
    return 1000.0**power, ["", "k", "M", "G"][power]


def plot_histogram(
    path: str | os.PathLike, macs: dict[float, Float[np.ndarray, " N"]], static_macs: float, *, title: str = ""
) -> None:
    """How the MACs spread over the pictures, one panel per budget; the static twin spends the same on all of them."""
    figure = Figure(figsize=(7, 1.2 + 1.4 * len(macs)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    scale, prefix = engineering(static_macs)
    largest = max(static_macs, max(float(values.max()) for values in macs.values()))
    edges = np.linspace(0, 1.02 * largest / scale, 61)
    panels = figure.subplots(len(macs), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (budget, values) in zip(panels, macs.items(), strict=True):
        style(axes)
        axes.hist(values / scale, bins=edges, color=LINES[0])
        axes.axvline(values.mean() / scale, color=LINES[1], linewidth=2, label="mean")
        axes.axvline(static_macs / scale, color="black", linestyle=":", linewidth=2, label="static twin")
        axes.set_ylabel("pictures")
        axes.set_title(f"budget {budget:g}", loc="left", fontsize=9)
        axes.set_xlim(0, edges[-1])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    panels[-1].set_xlabel(f"{prefix}MAC per image")
    figure.savefig(path, dpi=150)


def _show_compute(axes: Axes, image: np.ndarray, heat: np.ndarray, top: float) -> ScalarMappable:
    """The heat map's colours, shaded by the brightness of the picture; what a colour bar needs."""
    colours = ScalarMappable(Normalize(0, top), HEAT)
    shade = 0.45 + 0.55 * image.astype(np.float32).mean(-1, keepdims=True) / 255
    axes.imshow(colours.to_rgba(heat)[..., :3] * shade, interpolation="nearest")
    return colours


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture of the split, as `plot_heatmaps` wants it."""

    name: str
    """easiest, median or hardest: the fewest, the median and the most MACs."""
    macs: float
    image: np.ndarray
    mask: np.ndarray
    prediction: np.ndarray
    heat: np.ndarray


def plot_heatmaps(
    path: str | os.PathLike, examples: Sequence[Example], *, class_names: Sequence[str], title: str = ""
) -> None:
    """A row per picture: the picture, the truth, the prediction, and where the MACs were spent (MACs per pixel)."""
    count, (height, width) = len(examples), examples[0].mask.shape
    cell = 2.9
    colours = palette(len(class_names))
    named = np.arange(len(class_names))
    if len(named) > LEGEND:  # those that are seen
        named = np.unique([labels for example in examples for labels in (example.mask, example.prediction)])
        named = named[named >= 0][:LEGEND]
    legend = 0.35 + 0.22 * math.ceil(len(named) / 6)
    figure = Figure(
        figsize=(4 * cell + 1.4, count * (cell * height / width + 0.1) + legend + 0.6), layout="constrained"
    )
    figure.suptitle(title or " ", fontsize=11)
    grid = figure.subplots(count, 4, squeeze=False)
    top = max(1.0, *(float(example.heat.max()) for example in examples))
    scale, prefix = engineering(top)
    for example, axes in zip(examples, grid, strict=True):
        axes[0].imshow(example.image)
        axes[1].imshow(paint(example.mask, len(class_names)), interpolation="nearest")
        axes[2].imshow(paint(example.prediction, len(class_names)), interpolation="nearest")
        shown = _show_compute(axes[3], example.image, example.heat / scale, top / scale)
        axes[0].set_ylabel(f"{example.name}: {example.macs / 1e6:.1f} MMAC", fontsize=9)
        for panel in axes:
            panel.set(xticks=[], yticks=[])
    for axes, name in zip(grid[0], ("picture", "truth", "prediction", "compute"), strict=True):
        axes.set_title(name, fontsize=10)
    figure.colorbar(shown, ax=list(grid[:, 3]), label=f"{prefix}MAC per pixel", shrink=0.9)
    patches = [Patch(facecolor=f"#{bytes(colours[label]).hex()}", label=class_names[int(label)]) for label in named]
    if any((example.mask < 0).any() for example in examples):
        patches.append(Patch(facecolor=f"#{bytes(IGNORED).hex()}", label="ignored"))
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def plot_compute(
    path: str | os.PathLike, image: UInt8[np.ndarray, "H W 3"], heat: Num[np.ndarray, "h w"], *, title: str = ""
) -> None:
    """One picture's heat map over it, with a colour bar in MACs per pixel; the heat map is stretched to the picture."""
    height, width = image.shape[:2]
    wide = 7.0
    figure = Figure(figsize=(wide, min(max((wide - 1.2) * height / width + 0.4, 2.0), 14.0)), layout="constrained")
    axes = figure.subplots()
    top = max(float(heat.max()), 1.0)
    scale, prefix = engineering(top)
    stretched = np.asarray(Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST))
    shown = _show_compute(axes, image, stretched / scale, top / scale)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    figure.colorbar(shown, ax=axes, label=f"{prefix}MAC per pixel", shrink=0.9)
    figure.savefig(path, dpi=130)


def hardware() -> str:
    """What the latencies were measured on, e.g. "2 cores Intel(R) Xeon(R) CPU @ 2.60GHz" or "1 NVIDIA H100"."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} {devices[0].device_kind}"
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores {name}"
