"""A deployed model inside of JAX code: mapped by `jax.vmap`, and on a batch that is spread over the cores as devices.

    python -m benchmarks.inside [--out benchmarks/results/inside.csv] [--repeats 15] [--examples 64] [--kept 0.25]

Milliseconds of a batch, timed in turn in one process: the plain net (`plain`) and the one that skips (`compact`), of
one batch; of the same examples mapped one by one (`vmap`, and `vmap_unfolded`, which is the compact net as JAX maps
it, not deployed); and of the batch spread over two devices (`mesh_gathers` is the compact net inside of `jax.jit` on
Auto axes that nobody named, where the compiler gathers the batch; `mesh_axis` names the axis).
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dynjax as dj
from benchmarks import tables
from benchmarks.executors import median_ms


class Block(nnx.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.second = nnx.Conv(channels, channels, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x + self.second(nnx.relu(self.first(x)))


def ways(examples: int, channels: int, size: int, kept: float) -> dict:
    """What is timed: functions without arguments."""
    rngs = nnx.Rngs(0)
    plain = nnx.Sequential(*(Block(channels, rngs) for _ in range(4)))
    keep = (np.arange(examples) % round(1 / kept) == 0).astype(np.float32)  # as many on each device
    loud = np.where(keep, 3.0, 0.1)[:, None, None, None]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(examples, size, size, channels)) * loud, jnp.float32)
    model = nnx.Sequential(*(dj.Skip(block, Loud()) for block in plain.layers))
    fast = dj.deploy(model, 1.0, [x])
    one = fast.model
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    named = dj.Deployed(one, axis="data")
    run = {
        "plain": (lambda x: plain(x), x),
        "compact": (lambda x: fast(x), x),
        "vmap_plain": (jax.vmap(lambda x: plain(x[None])[0]), x),
        "vmap_unfolded": (jax.vmap(lambda x: one(x[None])[0]), x),
        "vmap": (jax.vmap(lambda x: fast(x[None])[0]), x),
        "mesh_plain": (lambda x: plain(x), spread),
        "mesh_gathers": (lambda x: one(x), spread),
        "mesh_axis": (lambda x: named(x), spread),
    }
    expected, found = np.asarray(plain(x)), {}
    for name, (way, given) in run.items():
        with jax.set_mesh(mesh):
            compiled = jax.jit(way).lower(given).compile()
        error = np.abs(np.asarray(compiled(given)) - np.where(keep[:, None, None, None], expected, x)).max()
        assert "plain" in name or error <= 1e-5 * np.abs(expected).max(), f"{name} differs by {error}"
        found[name] = (lambda compiled=compiled, given=given: compiled(given)), "all-gather" in compiled.as_text()
    return found


class Loud(nnx.Module):
    """Keeps the loud examples: exactly those that were made so, in every layer."""

    def __call__(self, x):
        keep = (jnp.abs(x).mean((1, 2, 3)) > 0.5).astype(jnp.float32)
        return dj.Decision(keep, keep, "example")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inside.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--kept", type=float, default=0.25)
    arguments = parser.parse_args(argv)
    if jax.config.jax_num_cpu_devices < 2:
        jax.config.update("jax_num_cpu_devices", 2)
    print(f"{tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    found = ways(arguments.examples, arguments.channels, arguments.size, arguments.kept)
    times = median_ms([way for way, _ in found.values()], arguments.repeats)
    rows = [
        dict(way=name, examples=arguments.examples, kept=arguments.kept, ms=round(float(ms), 2), all_gather=gathers)
        for (name, (_, gathers)), ms in zip(found.items(), times, strict=True)
    ]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
