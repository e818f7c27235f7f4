"""How much faster compact execution is than running everything: dense and compact timed alternately in one process.

    python -m benchmarks.executors [--out benchmarks/results/executors.csv] [--repeats 15] [--cases tiles_bottleneck
    ...]

For every case and share of kept units: the median milliseconds of the dense block and of the compact executor (with its
fall-back to dense), the speed-up, the ideal 1 / kept, and the executor with the fall-back turned off, whose crossing
with dense is the break-even that `dynjax/execute.py` states. Also checks each result against the masked execution.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import tables
from dynjax import execute
from dynjax.core.receptive import receptive_radius

KEPT = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0)


class Bottleneck(nnx.Module):
    """1x1 to half the channels, 3x3, 1x1 back, around a shortcut."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.down = nnx.Conv(channels, channels // 2, (1, 1), rngs=rngs)
        self.mix = nnx.Conv(channels // 2, channels // 2, (3, 3), rngs=rngs)
        self.up = nnx.Conv(channels // 2, channels, (1, 1), rngs=rngs)

    def __call__(self, x):
        return x + self.up(nnx.relu(self.mix(nnx.relu(self.down(x)))))


class Stack(nnx.Module):
    """3x3 convolutions with ReLU, around a shortcut."""

    def __init__(self, channels: int, depth: int, *, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(channels, channels, (3, 3), rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        y = x
        for conv in self.convs:
            y = nnx.relu(conv(y))
        return x + y


@dataclasses.dataclass(frozen=True)
class Case:
    block: Callable[..., nnx.Module]
    shape: tuple[int, int, int, int]
    tile: int | None = None
    """Side of a tile in pixels; None keeps examples."""


CASES = {
    "tiles_bottleneck": Case(Bottleneck, (1, 96, 128, 128), 16),
    "tiles_two_convolutions": Case(functools.partial(Stack, depth=2), (1, 96, 128, 64), 32),
    "tiles_unet_level0": Case(functools.partial(Stack, depth=2), (1, 90, 120, 32), 15),
    "tiles_unet_level1": Case(functools.partial(Stack, depth=2), (1, 45, 60, 48), 12),
    "samples_three_convolutions": Case(functools.partial(Stack, depth=3), (64, 32, 32, 64)),
}
LARGE = {
    "samples_large": Case(functools.partial(Stack, depth=3), (256, 64, 64, 128)),
    "tiles_large": Case(Bottleneck, (8, 384, 512, 256), 32),
}
"""For an accelerator, which runs the others in less time than their launches take; only when asked for by name."""


def median_ms(functions: list[Callable[[], jax.Array]], repeats: int) -> list[float]:
    """Median milliseconds of each function, called in turn."""
    for function in functions:
        for _ in range(2):
            jax.block_until_ready(function())
    times = np.zeros((repeats, len(functions)))
    for row in times:
        for i, function in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(function())
            row[i] = time.perf_counter() - start
    return [float(t) for t in np.median(times, 0) * 1e3]


def without_fall_back() -> mock._patch:
    """Break-evens that are never reached, so that the executor alone is timed."""
    return mock.patch.multiple(execute, BREAK_EVEN_SAMPLES=2.0, BREAK_EVEN_TILES=1e9)


def run(name: str, case: Case, repeats: int, strategy: str) -> list[dict]:
    rngs = nnx.Rngs(0)
    block = case.block(case.shape[-1], rngs=rngs)
    x = jax.random.normal(jax.random.key(1), case.shape)
    grid = () if case.tile is None else tuple(-(-n // case.tile) for n in case.shape[1:3])
    units = case.shape[0] * int(np.prod(grid))

    def call(execution):
        if case.tile is None:
            ways = dict(execution=execution, strategy=strategy)
            return jax.jit(lambda x, keep: execute.samples(block, x, keep, **ways))
        ways = dict(size=case.tile, radius=receptive_radius(block, x), execution=execution, strategy=strategy)
        return jax.jit(lambda x, keep: execute.tiles(block, x, keep, **ways))

    dense, masked, compact = jax.jit(lambda x: block(x)), call("masked"), call("compact")
    order = jnp.asarray(np.random.default_rng(0).permutation(units)).reshape(case.shape[0], *grid)
    with without_fall_back():
        alone = call("compact").lower(x, (order < 0).astype(x.dtype)).compile()
    rows = []
    for share in KEPT:
        keep = (order < round(share * units)).astype(x.dtype)
        with jax.default_matmul_precision("highest"):  # a GPU rounds to ten bits otherwise, which is what is timed
            error = float(jnp.abs(compact(x, keep) - masked(x, keep)).max())
        assert error <= 1e-5 * float(jnp.abs(x).max()), f"{name}: compact differs from masked by {error}"
        whole, fast, raw = median_ms(
            [lambda: dense(x), lambda k=keep: compact(x, k), lambda k=keep: alone(x, k)], repeats
        )
        rows.append(
            dict(
                case=name,
                shape="x".join(map(str, case.shape)),
                tile=case.tile or "",
                strategy=strategy,
                kept=share,
                dense_ms=round(whole, 3),
                compact_ms=round(fast, 3),
                speedup=round(whole / fast, 2),
                ideal="" if not share else round(1 / share, 2),
                no_fall_back_ms=round(raw, 3),
                max_error=error,
            )
        )
        print(
            f"{name:28} kept {share:6.1%}  dense {whole:8.2f} ms  compact {fast:8.2f} ms  {whole / fast:6.2f}x"
            f"  (ideal {1 / share if share else float('inf'):5.2f}x; without fall-back {whole / raw:5.2f}x)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/executors.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *LARGE], default=list(CASES))
    parser.add_argument("--strategy", choices=("auto", "loop", "buckets"), default="auto")
    arguments = parser.parse_args()
    print(
        f"{tables.machine()}, jax {jax.__version__}",
        file=sys.stderr,
    )
    cases = {name: (CASES | LARGE)[name] for name in arguments.cases}
    rows = [row for name, case in cases.items() for row in run(name, case, arguments.repeats, arguments.strategy)]
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
