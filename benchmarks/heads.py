"""Heads of segmentation on one backbone: MACs, parameters, time, and where they are trained mIoU.

    python -m benchmarks.heads [--runs runs] [--size 180 240] [--repeats 30] [--out benchmarks/results/heads.csv]

Every head of `experiments.camvid_lite0.HEADS` behind EfficientNet-Lite0, 11 classes, timed at batch 1, all alternating
in one process: the median of so many calls. `ratio` is the time beside that of the U-Net's decoder. The mIoU is that of
`python -m experiments.evaluate --workdir RUNS/camvid_lite0_HEAD` where that was run; otherwise the cell is empty.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import tables
from dynjax import cost, models
from dynjax.core import views
from dynjax.models.frozen import Frozen
from dynjax.run import files
from dynjax.run.evaluate import alternate
from experiments.camvid_lite0 import HEADS, head

CLASSES, BASE = 11, "unet"


def miou(folder: Path) -> float | str:
    """Of an evaluated workdir; an empty cell where there is none."""
    path = folder / "evaluation.json"
    return round(100 * files.read_json(path)["scores"]["1"]["miou"], 2) if path.exists() else ""


def parameters(module: nnx.Module) -> int:
    """Weights, also those that do not learn."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Any(nnx.Param, Frozen))))


def main(raw: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--size", type=int, nargs=2, default=(180, 240))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/heads.csv"))
    arguments = parser.parse_args(raw)
    print(f"{tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    image = np.random.default_rng(0).integers(0, 256, (1, *arguments.size, 3), dtype=np.uint8)
    runs: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name in HEADS:
        model = views.still(models.build(head(name).model, CLASSES, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        compiled = jax.jit(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x))
        runs[name] = lambda x, compiled=compiled, state=state: compiled(state, x)
        whole, own = (cost.macs(part, image) for part in (model, model.backbone))
        rows.append(
            dict(
                head=name,
                macs=round(whole),
                head_macs=round(whole - own),
                parameters=parameters(model),
                head_parameters=parameters(model.head),
            )
        )
    times = {name: float(np.median(each)) for name, each in alternate(runs, [image], repeats=arguments.repeats).items()}
    for row in rows:
        name = str(row["head"])
        row |= dict(ms=round(times[name], 2), ratio=round(times[name] / times[BASE], 2))
        row["miou"] = miou(arguments.runs / f"camvid_lite0_{name}")
        macs, own, size = (row[each] / 1e6 for each in ("macs", "head_macs", "parameters"))
        told = f"{name:10} {macs:6.1f} MMAC ({own:5.1f} of the head), {size:5.2f} M parameters, {row['ms']:6.2f} ms"
        print(f"{told}, {row['ratio']:4.2f}x, mIoU {row['miou']}")
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
