"""Pictures a second of a model that draws at once, at several budgets and sizes, beside its static twin.

    python -m benchmarks.generation [--workdir runs/mnist_gan_steps] [--budgets 1 0.5 0.25] [--batches 1 64]

Needs a trained row: python -m experiments.train mnist_gan_steps --workdir runs/mnist_gan_steps --data.path data/mnist
Budgets are shares of the static twin's MACs, thresholds are solved on pictures that the model draws itself; `size` is
the height of pictures of a row that draws several. All are timed alternating in one process, the median of so many
batches. `of_ideal` is the speed-up as a share of what the MACs promise: 1 is a picture in as much less time as it takes
fewer MACs. Writes the table as CSV.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import tables
from dynjax.config import UserError
from dynjax.core import views
from dynjax.ops.sampling import AtOnce
from dynjax.run.evaluate import alternate, solve, static_macs, steers
from dynjax.run.workdir import read_config
from experiments import cli
from experiments.evaluate import fresh_twin
from experiments.generate import CALIBRATION, CALIBRATION_FIRST, inputs, labels, picture


def ways(config: Any, model: Any, classes: int, budgets: list[float]) -> dict[tuple[str, str], tuple[Any, Any, float]]:
    """By name and budget or size: the model, what is run of it, and its MACs of a picture."""
    twin = fresh_twin(config, classes)
    shape = jax.eval_shape(lambda: inputs(model, labels(model, 1), 0, 0, 1))
    whole = functools.partial(picture, size=0)
    found = {("static", "1"): (views.still(twin), whole, static_macs(twin, shape, whole))}
    if steers(model):
        given = [inputs(model, labels(model, 64), 0, CALIBRATION_FIRST + k, 64) for k in range(0, CALIBRATION, 64)]
        twin_macs = found["static", "1"][2]
        for budget, each in solve(model, twin_macs, budgets, given, whole).items():
            found["budget", f"{budget:g}"] = (each.model, whole, each.report.mean)
    for size, height in enumerate(model.heights):
        run = functools.partial(picture, size=size)
        if len(model.heights) > 1:
            found["size", str(height)] = (views.still(model), run, static_macs(model, shape, run))
    return found


def main(raw: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/mnist_gan_steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generation.csv"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args(raw)
    config, model, step = tables.trained(arguments.workdir, "mnist_gan_steps", "data/mnist")
    _, classes = read_config(arguments.workdir)
    if not isinstance(model, AtOnce):
        raise UserError(f"--workdir {arguments.workdir}: row {config.row} does not draw a picture at once")
    print(f"{config.row}, step {step}; {tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    made, rows = ways(config, model, len(classes), arguments.budgets), []
    for batch in arguments.batches:
        functions = {}
        for name, (each, run, _) in made.items():
            graphdef, state = nnx.split(each)
            program = jax.jit(lambda state, given, graphdef=graphdef, run=run: run(nnx.merge(graphdef, state), given))
            functions[name] = functools.partial(program, state)
        given = [inputs(model, labels(model, batch), 0, k * batch, batch) for k in range(arguments.repeats)]
        taken = {name: float(np.median(each)) / batch for name, each in alternate(functions, given).items()}
        twin, (_, _, twin_macs) = taken["static", "1"], made["static", "1"]
        for (kind, value), (_, _, macs) in made.items():
            milliseconds = taken[kind, value]
            rows.append(
                {
                    "row": config.row,
                    "kind": kind,
                    "value": value,
                    "batch": batch,
                    "mmacs": round(macs / 1e6, 3),
                    "macs_fraction": round(macs / twin_macs, 4),
                    "ms": round(milliseconds, 4),
                    "images_per_second": round(1e3 / milliseconds, 1),
                    "speedup": round(twin / milliseconds, 3),
                    "of_ideal": round(twin / milliseconds * macs / twin_macs, 3),
                }
            )
            print("  ".join(f"{name} {cell}" for name, cell in rows[-1].items()), flush=True)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    cli.run(main)
