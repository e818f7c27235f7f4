"""How much faster exact samplers draw the same pictures than pixel by pixel, alternating in one process.

    python -m benchmarks.sampling [--workdir runs/mnist_pixelcnn] [--batches 16 64] [--repeats 3]

Needs a trained row: python -m experiments.train mnist_pixelcnn --workdir runs/mnist_pixelcnn --data.path data/mnist
pixel: the whole model for every pixel, really run; plain: every pixel of every picture until none changes; fixed-point:
pictures leave the batch, rows before the frontier are not computed, and only a window after it is; cached: one pixel of
every layer. Pixels, and pictures, that differ from those of `pixel` are counted. Writes the table as CSV, and a
histogram of the calls that pictures take as a PNG of the same name.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import tables
from dynjax import models
from dynjax.config import UserError
from dynjax.ops import sampling
from dynjax.show import film
from experiments import cli

BASE = "pixel"


def compiled(model: nnx.Module, name: str, examples: int, **options: Any) -> Any:
    """A sampler as a function of the seed, compiled without running it: once is a minute."""
    graphdef, state = nnx.split(model)

    def run(state: nnx.State, key: jax.Array) -> sampling.Sampled:
        model = nnx.merge(graphdef, state)
        noise = sampling.make_noise(model, key, examples)
        label = None if not model.classes else jax.numpy.arange(examples) % model.classes
        return sampling.SAMPLERS[name](model, noise, label=label, **options)

    program = jax.jit(run).lower(state, jax.random.key(0)).compile()
    return lambda seed: jax.block_until_ready(program(state, jax.random.key(seed)))


def run(model: nnx.Module, examples: int, arguments: argparse.Namespace) -> tuple[list[dict], np.ndarray]:
    """The table's lines of a batch, and how many calls each picture took by fixed point."""
    ways = {BASE: {}, "cached": {}, "plain": {}, "fixed-point": {"window": arguments.window}}
    ways |= {f"fixed-point, window {window}": {"window": window} for window in arguments.windows}
    calls = {name: compiled(model, name.split(",")[0], examples, **each) for name, each in ways.items()}
    for name in calls:
        if name != BASE:
            calls[name](0)
    seconds = {name: [] for name in calls}
    # Where rounding flips a pixel, all that follows it is another picture: both are counted.
    flipped, others, found = dict.fromkeys(calls, 0), dict.fromkeys(calls, 0), {name: [] for name in calls}
    for seed in range(arguments.repeats):
        wanted = None
        for name, call in calls.items():
            began = time.perf_counter()
            drawn = call(seed)
            seconds[name].append(time.perf_counter() - began)
            image = np.asarray(drawn.image)
            wanted = image if wanted is None else wanted
            differs = (image != wanted).any(-1)
            flipped[name] += int(differs.sum())
            others[name] += int(differs.any((1, 2)).sum())
            found[name].append(drawn)
    middle = {name: float(np.median(each)) for name, each in seconds.items()}
    rows = []
    for name, drawn in found.items():
        each = np.concatenate([np.asarray(d.calls) for d in drawn])
        rows.append(
            dict(
                sampler=name,
                batch=examples,
                ms_per_picture=round(1e3 * middle[name] / examples, 3),
                speedup=round(middle[BASE] / middle[name], 1),
                calls_min=int(each.min()),
                calls_mean=round(float(each.mean()), 1),
                calls_max=int(each.max()),
                evaluations_per_pixel=round(float(np.mean([np.asarray(d.visits).mean() for d in drawn])), 2),
                pictures_that_differ=others[name],
                pictures=examples * arguments.repeats,
                pixels_that_differ=flipped[name],
                pixels=int(np.prod(model.shape[:2])) * examples * arguments.repeats,
            )
        )
        print(
            f"batch {examples:3}  {name:24} {1e3 * middle[name] / examples:9.2f} ms/picture {rows[-1]['speedup']:7.1f}x"
            f"  calls {each.min()} to {each.max()}, mean {each.mean():.1f};"
            f" {rows[-1]['evaluations_per_pixel']:.1f} evaluations/pixel; {flipped[name]} pixels differ",
            flush=True,
        )
    return rows, np.concatenate([np.asarray(d.calls) for d in found["fixed-point"]])


def main(raw: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/mnist_pixelcnn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling.csv"))
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--window", type=int, help="of fixed-point; the family's own when it is not given")
    parser.add_argument("--windows", type=int, nargs="*", default=[2, 3], help="further windows to time")
    arguments = parser.parse_args(raw)
    config, model, step = tables.trained(arguments.workdir, "mnist_pixelcnn", "data/mnist")
    if models.task_of(config.model) != "autoregressive":
        raise UserError(f"--workdir {arguments.workdir}: row {config.row} draws no pictures")
    where = tables.machine()
    print(f"{where}, jax {jax.__version__}; {config.row}, step {step}", file=sys.stderr)
    rows, calls = [], {}
    for examples in arguments.batches:
        more, found = run(model, examples, arguments)
        rows += more
        calls[f"fixed-point, batch {examples}"] = found
    tables.write(arguments.out, rows)
    film.plot_histogram(arguments.out.with_suffix(".png"), calls, title=f"{config.row}, step {step}; {where}")


if __name__ == "__main__":
    cli.run(main)
