"""How much time every kind of dynamics saves at batch 32: dense and compact timed alternately in one process.

    python -m benchmarks.dynamics [--out benchmarks/results/dynamics.csv] [--repeats 15] [--cases skip exits ...]

Decisions are given, not learned, so that exactly 100, 50, 25 and 12.5% of the work is kept, by different examples as
far as the kind allows. Dense is the same work for everything without a decision. Also checks every result against the
masked execution, and draws the speed-ups beside the ideal 1 / kept into a picture of the same name.
"""

import argparse
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

import dynjax as dj
from benchmarks import tables
from benchmarks.executors import Stack, median_ms
from dynjax.core.decision import EACH, ONE, Decision, Place, Rule
from dynjax.core.decision import some as several
from dynjax.ops.halting import Halt
from dynjax.ops.policy import PolicySkip
from dynjax.show.report import LINES, MARKERS, style

KEPT = (1.0, 0.5, 0.25, 0.125)
BATCH, BLOCKS = 32, 8


class Tell(nnx.Module):
    """A gate that says the same whatever comes; a variable, so that nothing is known while the program is compiled."""

    def __init__(self, keep: Any, place: Place = "example", rule: Rule = EACH):
        self.keep, self.place, self.rule = nnx.Variable(jnp.asarray(keep, jnp.float32)), place, rule

    def __call__(self, x: Any) -> Decision:
        return Decision(self.keep[...], self.keep[...], self.place, self.rule)


def some(share: float, *shape: int) -> np.ndarray:
    """0s and 1s of this shape, of which exactly `share` are 1, in random places."""
    units = int(np.prod(shape))
    return (np.random.default_rng(0).permutation(units) < round(share * units)).astype(np.float32).reshape(shape)


def maps(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, *shape))


def stack(channels: int, number: int = 0) -> Stack:
    return Stack(channels, 2, rngs=nnx.Rngs(number))


def used_cores(call: Callable[[], jax.Array], repeats: int) -> float:
    """Cores that a function keeps busy: XLA runs some programs on one and others on all."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


# Every case gives the input, the dense function, and the dynamic module at a share.


def skip() -> tuple:
    block = stack(32)
    return maps(16, 16, 32), block, lambda share: dj.Skip(block, Tell(some(share, BATCH)))


def policy() -> tuple:
    blocks = [stack(32, number) for number in range(BLOCKS)]
    keep = {share: some(share, BATCH, BLOCKS) for share in KEPT}
    return (
        maps(16, 16, 32),
        nnx.Sequential(*blocks),
        lambda share: PolicySkip(blocks, Tell(keep[share])),
    )


def halt() -> tuple:
    """A tree of the state and the steps that are left: the halting unit reads these."""
    block = stack(32)
    rows = np.arange(BATCH) % 2  # half of the examples take one and a half of the mean, half of them a half

    def left(share):
        mean = share * BLOCKS
        return jnp.asarray(np.where(rows, np.ceil(1.5 * mean), np.floor(0.5 * mean)).clip(1, BLOCKS), jnp.float32)

    def step(state):
        return block(state[0]), state[1] - 1

    def gate(state):
        keep = (state[1] > 0.5).astype(jnp.float32)
        return Decision(keep, keep, "example")

    def module(share):
        inner = Halt(step, gate, BLOCKS, kind="hard")
        return _Given(inner, left(share) if share < 1 else jnp.full((BATCH,), float(BLOCKS)))

    def dense(x):
        for _ in range(BLOCKS):
            x = block(x)
        return x

    return maps(16, 16, 32), dense, module


class _Given(nnx.Module):
    """Puts what decides beside the input, and takes it off the output."""

    def __init__(self, module: nnx.Module, decides: jax.Array):
        self.module, self.decides = module, nnx.Variable(decides)

    def __call__(self, x):
        out = self.module((x, self.decides[...]))
        return out[0] if isinstance(out, tuple) else out


def exits() -> tuple:
    blocks = [stack(32, number) for number in range(BLOCKS)]
    head = nnx.Linear(32, 10, rngs=nnx.Rngs(9))
    stages = [lambda state, b=b: (b(state[0]), state[1] - 1) for b in blocks]

    def exit_head(state):
        # As sure as can be once no stage is left.
        return head(state[0].mean((1, 2))) * 1e-3 + jnp.where(state[1] < 0.5, 50.0, 0.0)[:, None] * jnp.eye(10)[:1]

    def module(share):
        rows, mean = np.arange(BATCH) % 2, share * BLOCKS
        left = np.where(rows, np.ceil(1.5 * mean), np.floor(0.5 * mean)).clip(1, BLOCKS)
        left = np.full(BATCH, BLOCKS) if share == 1 else left
        return _Given(dj.Exits(stages, [exit_head] * BLOCKS), jnp.asarray(left, jnp.float32))

    def dense(x):
        for block in blocks:
            x = block(x)
        return head(x.mean((1, 2)))

    return maps(16, 16, 32), dense, module


def channels() -> tuple:
    first, last = (nnx.Conv(64, 64, (3, 3), rngs=nnx.Rngs(number)) for number in range(2))
    return (
        maps(16, 16, 64),
        lambda x: last(nnx.relu(first(x))),
        lambda share: dj.Channels([first, nnx.relu], last, Tell(some(share, BATCH, 8))),
    )


def slices() -> tuple:
    first, last = (nnx.Conv(64, 64, (3, 3), rngs=nnx.Rngs(number)) for number in range(2))
    widths = (0.125, 0.25, 0.5, 1.0)

    def module(share):
        choice = np.eye(4)[[widths.index(share)] * BATCH]
        return dj.Slimmable([first, nnx.relu], last, Tell(choice, rule=ONE), widths=widths)

    return maps(16, 16, 64), lambda x: last(nnx.relu(first(x))), module


def experts() -> tuple:
    made = {}

    def module(share):
        top = round(8 * share)
        order = np.random.default_rng(0).permuted(np.tile(np.arange(8), (BATCH, 64, 1)), axis=-1)
        gate = Tell((order < top).astype(np.float32), "token", several(top))
        gate.top = top  # as a router has it
        if not made:
            made["experts"] = dj.Experts(64, 128, 8, gate=gate, rngs=nnx.Rngs(0))
        model = nnx.clone(made["experts"])
        model.gate = gate
        return model

    # All eight experts as one wide MLP: the same multiplications.
    up, down = nnx.Linear(64, 1024, rngs=nnx.Rngs(0)), nnx.Linear(1024, 64, rngs=nnx.Rngs(1))
    return maps(64, 64), lambda x: down(nnx.gelu(up(x))), module


def tokens() -> tuple:
    up, down = nnx.Linear(64, 256, rngs=nnx.Rngs(0)), nnx.Linear(256, 64, rngs=nnx.Rngs(1))

    def block(x, mask):
        return x + down(nnx.gelu(up(x)))

    def module(share):
        keep = np.stack([np.random.default_rng(i).permutation(64) < round(share * 64) for i in range(BATCH)])
        return dj.MixtureOfDepths(block, Tell(keep, "token"))

    return maps(64, 64), lambda x: block(x, None), module


def paths() -> tuple:
    """A cell at the middle of three scales: its operation and three paths; at 25% one example in four has any open."""
    operation = stack(32)
    up, down = nnx.Conv(32, 16, (1, 1), rngs=nnx.Rngs(1)), nnx.Conv(32, 64, (3, 3), 2, rngs=nnx.Rngs(2))

    def module(share):
        keep = np.repeat(some(share, BATCH)[:, None], 3, 1)
        return _Paths(dj.Cell(operation, Tell(keep), up=up, down=down))

    def dense(x):
        h = operation(x)
        return up(h), h, down(h)

    return maps(16, 16, 32), dense, module


class _Paths(nnx.Module):
    def __init__(self, cell: dj.Cell):
        self.cell = cell

    def __call__(self, x):
        return tuple(flow.features for flow in self.cell(x).values())


WHY = {
    "exits": "XLA fuses the dense convolutions and the pooling into one operation on all cores; stages run on one",
    "experts": "small products, and tokens are ordered, gathered and added up around them",
    "tokens": "each example gathers into the next larger of six capacities, and the whole block takes under a ms",
}
"""Why a case is far from the ideal on a CPU."""
FAR = 0.6

CASES = {case.__name__: case for case in (skip, policy, exits, halt, channels, slices, experts, tokens, paths)}


def compiled(model: nnx.Module) -> Callable:
    """`model` under jit, its variables passed as arguments."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return lambda x: call(state, x)


def run(name: str, repeats: int, strategy: str) -> list[dict]:
    x, everything, module = CASES[name]()
    dense = jax.jit(lambda x: everything(x))
    rows = []
    for share in KEPT:
        model = module(share)
        views = {
            way: nnx.view(model, execution=way, strategy=strategy, deterministic=True, raise_if_not_found=False)
            for way in ("masked", "compact")
        }
        masked, compact = (compiled(view) for view in views.values())
        with jax.default_matmul_precision("highest"):  # a GPU rounds to ten bits otherwise, which is what is timed
            both = masked(x), compact(x)
        for a, b in zip(*map(jax.tree.leaves, both), strict=True):
            error = float(jnp.abs(a - b).max() / jnp.abs(a).max().clip(1))
            assert error <= 1e-5, f"{name}: compact differs from masked by {error}"
        calls = [lambda: dense(x), lambda f=compact: f(x)]
        whole, fast = median_ms(calls, repeats)
        of_ideal = round(whole / fast * share, 2)
        cores = [round(used_cores(call, repeats), 1) for call in calls]
        why = WHY.get(name, "") if of_ideal < FAR else ""
        rows.append(
            dict(
                case=name,
                strategy=strategy,
                kept=share,
                dense_ms=round(whole, 3),
                compact_ms=round(fast, 3),
                speedup=round(whole / fast, 2),
                ideal=1 / share,
                of_ideal=of_ideal,
                dense_cores=cores[0],
                compact_cores=cores[1],
                why=why,
            )
        )
        print(
            f"{name:10} kept {share:6.1%}  dense {whole:8.2f} ms  compact {fast:8.2f} ms  {whole / fast:6.2f}x"
            f"  (ideal {1 / share:4.1f}x: {of_ideal:4.2f} of it; cores {cores[0]} and {cores[1]})  {why}",
            flush=True,
        )
    return rows


def plot(path: Path, rows: list[dict], title: str) -> None:
    """Speed-up over the share kept, one line a case, and the ideal."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    style(axes)
    axes.plot(KEPT, [1 / share for share in KEPT], color="#999999", linestyle=":", label="ideal, 1 / kept")
    for index, name in enumerate(dict.fromkeys(row["case"] for row in rows)):
        own = [row for row in rows if row["case"] == name]
        axes.plot(
            [row["kept"] for row in own],
            [row["speedup"] for row in own],
            color=LINES[index % len(LINES)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="-" if index < len(LINES) else "--",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(KEPT, [f"{share:.4g}" for share in KEPT])
    axes.set_yticks([0.5, 1, 2, 4, 8], ["0.5x", "1x", "2x", "4x", "8x"])
    axes.set_xlabel("share of the work that is kept")
    axes.set_ylabel("times faster than dense")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dynamics.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--strategy", choices=("auto", "loop", "buckets"), default="auto")
    arguments = parser.parse_args()
    where = tables.machine()
    print(f"{where}, jax {jax.__version__}, batch {BATCH}", file=sys.stderr)
    rows = [row for name in arguments.cases for row in run(name, arguments.repeats, arguments.strategy)]
    tables.write(arguments.out, rows)
    plot(arguments.out.with_suffix(".png"), rows, f"Batch {BATCH}, {where}")


if __name__ == "__main__":
    main()
