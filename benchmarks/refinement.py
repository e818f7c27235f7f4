"""The dial between quality and compute of pictures that are drawn, beside ways to spend as much blindly.

    python -m benchmarks.refinement [--workdir runs/mnist_nextscale] [--data.path data/mnist] [--repeats 20]

Needs a trained row: python -m experiments.train mnist_nextscale --workdir runs/mnist_nextscale --data.path data/mnist
*_nextscale, from coarse to fine. entropy: the rich network in the tiles where the plain one is uncertain; uniform: in
as many tiles, spread evenly over every map; random: in as many, anywhere. The same weights three times, since both
networks were trained on all tiles.
*_exits, pixel by pixel or code by code, cached. entropy: further blocks for those whose prediction is uncertain;
random: for as many, anywhere.
Budgets are shares of the static twin's MACs, and `all` is what everything kept takes: gates and heads come on top.
Thresholds are solved on val, bits per dimension are of test, exact at every budget; milliseconds are of drawing,
compact, all budgets and gates alternating in one process. Writes the table as CSV, and a PNG of the same name.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from benchmarks import tables
from dynjax.config import UserError
from dynjax.core import views
from dynjax.core.budget import LOWEST
from dynjax.core.deploy import Solver
from dynjax.core.gates import Threshold
from dynjax.core.trace import traced
from dynjax.data import make_source
from dynjax.ops import sampling
from dynjax.run.build import build
from dynjax.run.evaluate import static_macs
from dynjax.run.workdir import read_config
from dynjax.show.report import style
from dynjax.tasks.autoregressive import integers
from experiments import cli

GATES = {"entropy": "learned", "uniform": "grid", "random": "random"}
SAMPLERS = {"nextscale": sampling.coarse_to_fine, "pixeltransformer": sampling.cached}
EVERYTHING = "all"  # in the place of a budget: everything refined, one point for all gates


def drawn_by(model: Any) -> Any:
    """The configuration, or the model, that draws: of codes that of the codes."""
    return getattr(model, "prior", model)


def changed(config: Any, model: nnx.Module, classes: int, **fields: Any) -> nnx.Module:
    """The same weights where what draws is otherwise: behind another gate, or without."""
    new = dataclasses.replace(drawn_by(config.model), **fields)
    new = dataclasses.replace(config.model, prior=new) if config.model.family == "codes" else new
    fresh = views.still(build(dataclasses.replace(config, model=new), classes))
    wanted = {path for path, _ in nnx.to_flat_state(nnx.state(fresh, nnx.Not(Threshold)))}
    found = nnx.to_flat_state(nnx.state(model, nnx.Not(Threshold)))
    nnx.update(fresh, nnx.from_flat_state([(path, value) for path, value in found if path in wanted]))
    return fresh


def pictures(config: Any, model: nnx.Module, split: str, number: int, batch: int) -> list[np.ndarray]:
    """Batches of a split as the integers that the model has."""
    source = make_source(config.data, split)
    index = np.unique(np.linspace(0, len(source) - 1, min(number, len(source))).astype(int))
    index = index[: len(index) // batch * batch] if len(index) > batch else index
    images = np.stack([source[int(i)]["image"] for i in index])
    encode = jax.jit(lambda images: integers(model, images))
    x = np.concatenate([encode(jnp.asarray(images[k : k + batch])) for k in range(0, len(images), batch)])
    return [x[k : k + batch] for k in range(0, len(x), batch)]


def measurer(model: nnx.Module, batches: list[np.ndarray]) -> Callable[[nnx.Module], tuple[float, float]]:
    """Bits per dimension, and mean MACs of a picture, of `model` under any threshold: compiled once."""
    graphdef, _ = nnx.split(model)

    @jax.jit
    def one(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, trace = traced(nnx.merge(graphdef, state))(x)
        return -model.likelihood.log_prob(params, x).sum(), trace.macs().sum()

    def measure(model: nnx.Module) -> tuple[float, float]:
        state = nnx.state(model)
        found = np.array([one(state, x) for x in batches]).sum(0) / sum(map(len, batches))
        return float(found[0] / (math.log(2) * math.prod(model.shape))), float(found[1])

    return measure


def drawer(model: nnx.Module, family: str, batch: int) -> Any:
    """Compact drawing as a function of the seed and the state, compiled once for every budget."""
    graphdef, _ = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, key: jax.Array) -> sampling.Sampled:
        model = drawn_by(nnx.merge(graphdef, state))
        return SAMPLERS[family](model, sampling.make_noise(model, key, batch))

    return run


def line_of(gate: str, budget: float | str, bits: float, macs: float, twin: float, met: bool) -> dict[str, Any]:
    """A line of the table, but for its times; prints it. `twin`: the static twin's MACs."""
    at = f"{macs / twin:.1%} of the static twin's MACs{'' if met else ', the least that it can spend'}"
    print(f"{gate:8} budget {budget:4}: {bits:.4f} bits/dim, {at}", flush=True)
    return dict(
        gate=gate,
        budget=budget,
        bits_per_dim=round(bits, 5),
        mmacs=round(macs / 1e6, 3),
        macs_fraction=round(macs / twin, 4),
        met="yes" if met else "no",
    )


def main(raw: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/mnist_nextscale")
    parser.add_argument("--data.path", dest="path", default="")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refinement.csv"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.25, 0.4, 0.6, 0.8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=10_000, help="of test, at most")
    arguments = parser.parse_args(raw)
    config, model, step = tables.trained(arguments.workdir, "mnist_nextscale", "data/mnist", arguments.path)
    _, classes = read_config(arguments.workdir)
    draws = drawn_by(config.model)
    if draws.family not in SAMPLERS or draws.dynamics == "static" or model.classes:
        raise UserError(
            f"--workdir {arguments.workdir}: row {config.row} has no dial; those of *_nextscale, *_exits have"
        )
    val, test = (pictures(config, model, *each) for each in (("val", 512, 256), ("test", arguments.pictures, 250)))
    where = tables.machine()
    title = f"{config.row}, step {step}; {sum(map(len, test))} pictures of test; {where}"
    print(f"{title}, jax {jax.__version__}", file=sys.stderr)

    static = changed(config, model, len(classes), dynamics="static", gate="learned")
    whole = static_macs(static, jax.ShapeDtypeStruct((1, *static.shape), jnp.int32))
    gates = {name: gate for name, gate in GATES.items() if draws.family == "nextscale" or gate != "grid"}
    rows, deployed = [], {}
    for name, gate in gates.items():
        solver = Solver(changed(config, model, len(classes), gate=gate), val)
        measure = measurer(solver.model, test)
        solver.spent(LOWEST)
        shares = {budget: min(1.0, budget * whole / solver.full) for budget in sorted(arguments.budgets)}
        for budget, share in (shares | ({EVERYTHING: 1.0} if name == "entropy" else {})).items():
            found = solver.deploy(share)
            deployed[name, budget] = found.model
            rows.append(line_of(name, budget, *measure(found.model), whole, found.report.met))
    rows.append(line_of("static", EVERYTHING, *measurer(static, test)(static), whole, True))
    deployed["static", EVERYTHING] = static

    for batch in arguments.batches:
        runs = {}
        programs: dict[str, Any] = {}
        for (name, budget), each in deployed.items():
            program = programs.setdefault(name, drawer(each, draws.family, batch))
            runs[name, budget] = (program, nnx.state(each))
            jax.block_until_ready(program(runs[name, budget][1], jax.random.key(0)))
        seconds: dict[Any, list[float]] = {each: [] for each in runs}
        refined: dict[Any, list[float]] = {each: [] for each in runs}
        for seed in range(arguments.repeats):
            for each, (program, state) in runs.items():
                began = time.perf_counter()
                drawn = jax.block_until_ready(program(state, jax.random.key(seed)))
                seconds[each].append(time.perf_counter() - began)
                refined[each].append(float(drawn.calls.mean()))
        for line in rows:
            key = (line["gate"], line["budget"])
            line[f"ms_batch{batch}"] = round(1e3 * float(np.median(seconds[key])) / batch, 4)
            if draws.family == "nextscale":
                line["tiles_drawn"] = round(float(np.mean(refined[key])), 1)
            print(f"batch {batch:3} {key[0]:8} {key[1]:4}: {line[f'ms_batch{batch}']:8.3f} ms/picture", flush=True)

    tables.write(arguments.out, rows)
    plot(arguments.out.with_suffix(".png"), rows, arguments.batches[-1], title)


def plot(path: Path, rows: list[dict], batch: int, title: str) -> None:
    """Bits per dimension by MACs and by milliseconds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=9)
    whole = [line for line in rows if line["gate"] == "entropy" and line["budget"] == EVERYTHING]
    for axes, column, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("mmacs", f"ms_batch{batch}"),
        ("million MACs of a picture", f"milliseconds of a picture, drawn in batches of {batch}"),
        strict=True,
    ):
        style(axes)
        for name in dict.fromkeys(line["gate"] for line in rows if line["gate"] != "static"):
            line = [each for each in rows if each["gate"] == name and each["budget"] != EVERYTHING] + whole
            axes.plot([each[column] for each in line], [each["bits_per_dim"] for each in line], "o-", ms=4, label=name)
        (twin,) = (each for each in rows if each["gate"] == "static")
        axes.plot(twin[column], twin["bits_per_dim"], "*", ms=11, color="black", label="everything everywhere, static")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    figure.axes[0].set_ylabel("bits/dim")
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    cli.run(main)
