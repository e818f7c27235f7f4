"""What an evaluation leaves: points of curve.csv and latency.csv, tables for a terminal, and the curve."""

import csv
import dataclasses
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynjax.config import UserError
from dynjax.core.deploy import Report
from dynjax.show.report import LINES, line, style, table


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of curve.csv: a checkpoint at one budget. MACs are per image, latency is in ms per image at batch 1.

    What was not measured is nan, and an empty cell: latency of a task that is not timed, pixel accuracy but of
    segmentation.
    """

    budget: float
    """Share of the static twin's MACs that was asked for."""
    score: float
    """The task's: mIoU or accuracy, in [0, 1]; bits/dim; PSNR."""
    pixel_accuracy: float
    macs: float
    """Mean over the split; so are macs_p95 and macs_max its 95th percentile and its maximum."""
    macs_fraction: float
    """`macs` as a share of the static twin's."""
    latency_ms_p50: float
    latency_ms_p95: float
    static_latency_ms_p50: float
    """The static twin's, timed in the same run, alternating with this one picture by picture."""
    speedup: float
    """static_latency_ms_p50 / latency_ms_p50."""
    met: bool
    """Whether the mean MACs on the calibration pictures met the budget."""
    macs_p95: float
    macs_max: float
    static_macs: float
    images: int


@dataclasses.dataclass(frozen=True)
class Latency:
    """One row of latency.csv: a checkpoint at one budget, in ms per image, whole batches of one size timed."""

    budget: float
    batch: int
    latency_ms_p50: float
    static_latency_ms_p50: float
    """The static twin's, timed in the same run, alternating batch by batch."""
    speedup: float


def read_curve(path: str | os.PathLike) -> list[Point]:
    """The points of a curve.csv. Raises UserError when it is missing or is not one."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        truth = {"True": True, "False": False}.__getitem__
        read: dict[type, Callable[[str], Any]] = {float: lambda text: float(text or "nan"), int: int, bool: truth}
        kinds = typing.get_type_hints(Point)
        points = [Point(**{name: read[kind](row[name]) for name, kind in kinds.items()}) for row in rows]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; experiments.evaluate writes it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no curve.csv of experiments.evaluate: {error!r}") from None
    if not points:
        raise UserError(f"{path} holds no line: evaluate its workdir again")
    return points


def curve_table(points: Sequence[Point], score_name: str = "mIoU", percent: bool = True) -> str:
    """What `experiments.evaluate` ends in: one line per budget. What nobody measured is left out."""
    score = (f"{score_name} %", 100, 1) if percent else (score_name, 1, 4)
    columns: dict[str, Callable[[Point], str]] = {
        "budget": lambda p: f"{p.budget:g}",
        score[0]: lambda p: f"{score[1] * p.score:.{score[2]}f}",
        "pixel acc. %": lambda p: f"{100 * p.pixel_accuracy:.1f}",
        "MMAC/image": lambda p: f"{p.macs / 1e6:.{1 if p.static_macs >= 1e6 else 3}f}",
        "of static %": lambda p: f"{100 * p.macs_fraction:.1f}",
        "ms p50": lambda p: f"{p.latency_ms_p50:.2f}",
        "ms p95": lambda p: f"{p.latency_ms_p95:.2f}",
        "static ms": lambda p: f"{p.static_latency_ms_p50:.2f}",
        "speed-up": lambda p: f"{p.speedup:.2f}x",
        "met": lambda p: "yes" if p.met else "no",
    }
    cells = {name: [cell(point) for point in points] for name, cell in columns.items()}
    known = {name: each for name, each in cells.items() if not set(each) <= {"nan", "nanx"}}
    return table(list(known), list(zip(*known.values(), strict=True)))


def latency_table(latencies: Sequence[Latency]) -> str:
    """Milliseconds per image at every batch size that was timed, and how much faster than the static twin."""
    sizes = list(dict.fromkeys(each.batch for each in latencies))
    found = {(each.budget, each.batch): each for each in latencies}
    header = ["ms per image", *(f"batch {size}" for size in sizes), *(f"speed-up at {size}" for size in sizes)]
    rows = []
    for budget in dict.fromkeys(each.budget for each in latencies):
        own = [found[budget, size] for size in sizes]
        cells = [f"{each.latency_ms_p50:.2f}" for each in own] + [f"{each.speedup:.2f}x" for each in own]
        rows.append([f"budget {budget:g}", *cells])
    return table(header, rows)


def class_table(names: Sequence[str], scores: Mapping[str, Any]) -> str:
    """What segmentation scores on each class, in percent, and the means; "-" for a class that does not occur. Empty
    where the scores of a task have none of these."""
    columns = {"IoU %": ("iou", "miou"), "Dice %": ("class_dice", "dice")}
    columns["boundary F1 %"] = "class_boundary_f1", "boundary_f1"
    known = {name: (scores[each], scores[mean]) for name, (each, mean) in columns.items() if each in scores}
    if not known:
        return ""
    cells = [[*names, "mean"]]
    for each, mean in known.values():
        cells.append(["-" if math.isnan(value) else f"{100 * value:.1f}" for value in (*each, mean)])
    return table(["class", *known], list(zip(*cells, strict=True)))


def layer_table(shares: dict[float, dict[str, dict[str, float]]]) -> str:
    """What each dynamic layer kept at each budget."""
    paths = next(iter(shares.values()))
    rows = [[path, *(f"{100 * each[path]['kept']:.0f}" for each in shares.values())] for path in paths]
    return table(["% of units kept", *(f"at {budget:g}" for budget in shares)], rows)


def calibration_table(reports: Mapping[float, Report]) -> str:
    """What each budget came to on the calibration pictures, in MMAC per image."""
    rows = []
    for budget, each in reports.items():
        mmacs = [f"{value / 1e6:.1f}" for value in (each.mean, each.p95, each.max, each.full)]
        rows.append([f"{budget:g}", *mmacs, f"{each.threshold:.2f}", "yes" if each.met else "no"])
    return table(["on calibration", "mean MMAC", "p95", "max", "all kept", "threshold", "met"], rows)


def plot_curve(
    path: str | os.PathLike,
    curves: Mapping[str, Sequence[Point]],
    *,
    twin: float | None,
    score_name: str = "mIoU",
    percent: bool = True,
    title: str = "",
) -> None:
    """Score over MACs and over latency, one line per curve (the first is the model's own), the static twin as a star.

    `twin` is its score, which is unknown (None) when no trained twin was given; then only its MACs and latency are
    marked. Without latencies only the MACs are shown.
    """
    twin_ms, times = next(iter(curves.values()))[0].static_latency_ms_p50, 100 if percent else 1
    timed = not math.isnan(twin_ms)
    figure = Figure(figsize=(10 if timed else 5.5, 4.6), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    marks = ["macs", "ms"][: len(panels)]
    for axes, place, of_twin in zip(panels, marks, (100.0, twin_ms), strict=False):
        style(axes)
        for index, (label, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda point: point.macs_fraction)
            at = [100 * point.macs_fraction if place == "macs" else point.latency_ms_p50 for point in points]
            scores = [times * point.score for point in points]
            axes.plot(
                at,
                scores,
                markersize=7,
                linewidth=2 if index == 0 else 1.4,
                linestyle="-" if index == 0 else "--",
                label=label,
                zorder=3,
                **line(index),
            )
            if index == 0 and len(points) > 1:
                _name_budgets(axes, at, scores, points)
        if twin is None:
            axes.axvline(of_twin, color="#555555", linestyle=":", label="static twin (not trained)")
        else:
            axes.axhline(times * twin, color="#555555", linestyle=":", linewidth=1)
            axes.plot([of_twin], [times * twin], "*", color="black", markersize=14, label="static twin", zorder=4)
        axes.set_xlim(0, 1.05 * axes.dataLim.x1)  # room for the marker of the largest
        axes.margins(y=0.15)
        axes.set_xlabel(
            "MACs per image, % of the static twin" if place == "macs" else "latency per image at batch 1, ms (median)"
        )
    panels[0].set_ylabel(f"{score_name}, %" if percent else score_name)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=150)


def _name_budgets(axes: Axes, at: Sequence[float], scores: Sequence[float], points: Sequence[Point]) -> None:
    """Names points by their budgets; those that lie on each other have one name."""
    near = 0.04 * max(at), 0.08 * (max(scores) - min(scores))
    groups: list[list[int]] = []
    for number, (x, y) in enumerate(zip(at, scores, strict=True)):
        first = groups[-1][0] if groups else number
        if groups and abs(x - at[first]) <= near[0] and abs(y - scores[first]) <= near[1]:
            groups[-1].append(number)
        else:
            groups.append([number])
    for group in groups:
        budgets = sorted({points[number].budget for number in group})
        axes.annotate(
            f"{budgets[0]:g}" if len(budgets) == 1 else f"{budgets[0]:g} to {budgets[-1]:g}",
            (at[group[0]], scores[group[0]]),
            xytext=(6, -12),
            textcoords="offset points",
            fontsize=9,
            color=LINES[0],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
