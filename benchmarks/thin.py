"""What tiles cost besides the blocks: a U-Net of few channels, where gates and copies weigh most.

    python -m benchmarks.thin [--out benchmarks/results/thin.csv] [--repeats 15] [--widths 16 32 64] [--size 256 384]

A plain U-Net, and the same with `Tiles` and a `TileGate` around every block, at batch 1: milliseconds with nothing,
half and all kept, timed alternately in one process. `floor` has no gates, and in the place of its blocks what the tiles
that are not kept pass through: the least that it can take. So `nothing - floor` and `all - plain` are what dynamics
cost. The blocks change the number of channels and have an `otherwise` (`wide`), or keep it (`even`).
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dynjax as dj
from benchmarks import tables
from benchmarks.executors import median_ms
from dynjax.core import views
from dynjax.core.gates import HIGHEST, LOWEST

BLOCKS = "blocks/[0-9]+"


class Double(nnx.Module):
    """Twice a 3x3 convolution, batch normalisation and ReLU."""

    def __init__(self, before: int, after: int, *, rngs: nnx.Rngs):
        pairs = ((before, after), (after, after))
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(after, rngs=rngs) for _ in pairs])
        self.channels = before, after

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return x


class Same(nnx.Module):
    """What it is given."""

    def __call__(self, x):
        return x


class UNet(nnx.Module):
    """Levels of the widths, each of half the size: one block down and one up. Where blocks are `even` a convolution
    before each changes the channels."""

    def __init__(self, widths: list[int], even: bool, *, rngs: nnx.Rngs):
        sides = [*zip([3, *widths], widths, [3] * len(widths), strict=False), *((2 * n, n, 1) for n in widths[:-1])]
        before = [nnx.Conv(a, b, (side, side), rngs=rngs) if even else Same() for a, b, side in sides]
        blocks = [Double(b if even else a, b, rngs=rngs) for a, b, _ in sides]
        self.before, self.blocks, self.levels = nnx.List(before), nnx.List(blocks), len(widths)
        pairs = itertools.pairwise(widths)
        self.larger = nnx.List([nnx.ConvTranspose(b, a, (2, 2), strides=(2, 2), rngs=rngs) for a, b in pairs])
        self.head = nnx.Conv(widths[0], 5, (1, 1), rngs=rngs)

    def __call__(self, x):
        maps = []
        for level in range(self.levels):
            x = nnx.max_pool(x, (2, 2), (2, 2)) if level else x
            x = self.blocks[level](self.before[level](x))
            maps.append(x)
        for level in reversed(range(self.levels - 1)):
            x, number = jnp.concatenate([maps[level], self.larger[level](x)], -1), self.levels + level
            x = self.blocks[number](self.before[number](x))
        return self.head(x)


def rest(block: Double, rngs: nnx.Rngs) -> nnx.Module | None:
    before, after = block.channels
    return None if before == after else nnx.Linear(before, after, rngs=rngs)


def tiled(block: Double, channels: int, rngs: nnx.Rngs, tile: int) -> dj.Tiles:
    return dj.Tiles(block, dj.TileGate(channels, size=tile, rngs=rngs), otherwise=rest(block, rngs))


def halved(model: nnx.Module, x: jax.Array) -> nnx.Module:
    """Every gate, from the first on, with a threshold of its own at which it keeps half of its tiles of `x`."""
    model = nnx.clone(model)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: dj.traced(nnx.merge(graphdef, state, copy=True))(x)[1])
    for path in run(state, x).decisions:
        gate = model
        for name in path.split("/"):
            gate = gate[int(name)] if name.isdigit() else getattr(gate, name)
        probability = run(nnx.state(model), x).decisions[path].probability
        gate.gate.logits.threshold[...] += jnp.median(jax.scipy.special.logit(probability))
    return model


def measure(kind: str, widths: list[int], size: list[int], tile: int, repeats: int) -> dict:
    x = jax.random.normal(jax.random.key(0), (1, *size, 3))
    plain = UNet(widths, kind == "even", rngs=nnx.Rngs(0))
    model = views.still(dj.dynamize(plain, {BLOCKS: functools.partial(tiled, tile=tile)}, rngs=nnx.Rngs(1)))
    floor = dj.dynamize(plain, {BLOCKS: lambda b, c, rngs: rest(b, rngs) or Same()}, rngs=nnx.Rngs(1))
    nothing, everything = nnx.clone(model), nnx.clone(model)
    dj.budget.set_threshold(nothing, HIGHEST)
    dj.budget.set_threshold(everything, LOWEST)
    half = halved(model, x)
    graphdef, _ = nnx.split(views.compact(model))
    skips = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))
    errors = []
    for each in (nothing, half, everything):
        masked = jax.jit(lambda x, each=each: each(x))(x)
        errors.append(float(jnp.abs(skips(nnx.state(each), x) - masked).max() / jnp.abs(masked).max()))
    assert max(errors) <= 1e-5, f"compact differs from masked by {max(errors)}"
    whole, least = (jax.jit(lambda x, each=each: each(x)) for each in map(views.still, (plain, floor)))
    ways = {"plain": lambda: whole(x), "floor": lambda: least(x)}
    for name, each in (("nothing", nothing), ("half", half), ("all", everything)):
        ways[name] = functools.partial(skips, nnx.state(each), x)
    found = dict(zip(ways, np.round(median_ms(list(ways.values()), repeats), 2), strict=True))
    shares = [float(d.kept()) for d in dj.traced(half)(x)[1].decisions.values()]
    return dict(
        kind=kind,
        widths="-".join(map(str, widths)),
        shape="x".join(map(str, x.shape)),
        tile=tile,
        **{f"{name}_ms": float(ms) for name, ms in found.items()},
        overhead_nothing_ms=round(float(found["nothing"] - found["floor"]), 2),
        overhead_all_ms=round(float(found["all"] - found["plain"]), 2),
        kept_at_half=round(float(np.mean(shares)), 3),
        max_error=max(errors),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/thin.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--size", type=int, nargs=2, default=[256, 384])
    parser.add_argument("--tile", type=int, default=16)
    arguments = parser.parse_args(argv)
    print(f"{tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    rows = []
    for kind in ("wide", "even"):
        rows.append(measure(kind, arguments.widths, arguments.size, arguments.tile, arguments.repeats))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
