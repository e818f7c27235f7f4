"""How much longer kernels of the input take than a static convolution: all timed alternately in one process.

    python -m benchmarks.kernels [--out benchmarks/results/kernels.csv] [--repeats 15] [--cases 32x32x16 ...]
    [--batches 8 32 64] [--ways loop condconv ...]

For every shape and batch, forward alone and with the gradient: the median milliseconds of each way, and their ratio to
the static 3x3 convolution. "loop" and "grouped" convolve kernels that are given, one for each example; "mixed" mixes
four kernels for each and convolves (the loop that `CondConv` runs); the layers pool and attend too. What not to do is
timed beside them: "autodiff" leaves the loop's gradient to JAX, "vmap" maps the convolution over kernels, and "outputs"
mixes the outputs of four convolutions. Per pixel: "involution" and "ddf", whose work is not that of a convolution.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from benchmarks import tables
from benchmarks.executors import median_ms
from dynjax import cost
from dynjax.core import convolve
from dynjax.ops.filters import DDF, Involution
from dynjax.ops.kernels import CondConv, DynamicConv, HyperConv, ODConv
from dynjax.ops.warehouse import Warehouse, WarehouseConv

SHAPES = {
    "32x32x16": (32, 32, 16),
    "16x16x64": (16, 16, 64),
    "8x8x128": (8, 8, 128),
    "16x16x24": (16, 16, 24),
    "8x8x48": (8, 8, 48),
    "56x56x64": (56, 56, 64),
}
BATCHES = (8, 32, 64)
KERNELS = 4


def of_warehouse(before: int, after: int, size: tuple[int, int], **options: Any) -> WarehouseConv:
    """The first of two layers that share their cells."""
    warehouse = Warehouse([(*size, before, after)] * 2, rngs=options["rngs"])
    return WarehouseConv(before, after, size, warehouse=warehouse, layer=0, **options)


LAYERS = {
    "condconv": CondConv,
    "dyconv": DynamicConv,
    "odconv": ODConv,
    "hyper": HyperConv,
    "warehouse": of_warehouse,
    "involution": Involution,
    "ddf": DDF,
}
WAYS = ("loop", "grouped", "mixed", "autodiff", "vmap", "outputs", *LAYERS)
SLOW = ("grouped", "autodiff", "vmap", "outputs")
"""Left out at batches over 32, where they take seconds."""


def one(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


def static(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def outputs(x: jax.Array, weights: jax.Array, kernels: jax.Array) -> jax.Array:
    """The outputs of all K convolutions, mixed."""
    features = kernels.shape[-1]
    all_kernels = jnp.moveaxis(kernels, 0, 3).reshape(*kernels.shape[1:4], -1)
    y = static(x, all_kernels).reshape(*x.shape[:3], len(kernels), features)
    return jnp.einsum("bhwkd,bk->bhwd", y, weights)


def way_of(name: str, batch: int, channels: int) -> tuple[Callable, tuple]:
    """A function of arrays whose first is the map, and the other arrays."""
    random = jax.random.key(1)
    kernels = jax.random.normal(random, (KERNELS, 3, 3, channels, channels))
    weights = jax.nn.softmax(jax.random.normal(random, (batch, KERNELS)))
    if name in LAYERS:
        own = {"involution": dict(group_channels=math.gcd(channels, 16)), "ddf": {}}.get(name, dict(use_bias=False))
        layer = LAYERS[name](channels, channels, (3, 3), **own, rngs=nnx.Rngs(0))
        layer = nnx.view(layer, use_running_average=True, raise_if_not_found=False)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        return lambda x, params: nnx.merge(graphdef, params, rest)(x), (params,)
    if name == "static":
        return static, (kernels[0],)
    if name == "mixed":
        return lambda *a: convolve.generated(*a, convolve.mixture, strategy="loop"), (weights, kernels)
    if name == "outputs":
        return outputs, (weights, kernels)
    own = jnp.einsum("bk,khwcd->bhwcd", weights, kernels)
    ways = {
        "loop": lambda x, k: convolve.generated(x, k, (), lambda code, shared: code, strategy="loop"),
        "grouped": lambda x, k: convolve.generated(x, k, (), lambda code, shared: code, strategy="grouped"),
        "autodiff": lambda x, k: lax.map(lambda pair: one(*pair), (x, k)),
        "vmap": jax.vmap(one),
    }
    return ways[name], (own,)


def with_gradient(way: Callable) -> Callable:
    """The gradient of a scalar of `way` to all its arguments."""
    return lambda *args: jax.grad(lambda args: jnp.square(way(*args)).sum())(args)


def run(case: str, batch: int, names: list[str], repeats: int) -> list[dict]:
    height, width, channels = SHAPES[case]
    x = jax.random.normal(jax.random.key(0), (batch, height, width, channels))
    names = ["static", *(name for name in names if batch <= 32 or name not in SLOW)]
    ways = {name: way_of(name, batch, channels) for name in names}
    macs = {name: cost.macs(way, x, *arrays) / batch for name, (way, arrays) in ways.items()}
    rows = []
    for part, transform in (("forward", lambda way: way), ("gradient", with_gradient)):
        # Without their gradient, "autodiff" is "loop".
        timed = [name for name in names if part == "gradient" or name != "autodiff"]
        compiled = [jax.jit(transform(ways[name][0])) for name in timed]
        calls = [lambda f=f, a=ways[name][1]: f(x, *a) for f, name in zip(compiled, timed, strict=True)]
        for name, ms in zip(timed, times := median_ms(calls, repeats), strict=True):
            rows.append(
                dict(
                    case=case,
                    batch=batch,
                    part=part,
                    way=name,
                    ms=round(ms, 3),
                    ratio=round(ms / times[0], 2),
                    macs_ratio=round(macs[name] / macs["static"], 3),
                )
            )
            print(
                f"{case:9} batch {batch:3}  {part:8}  {name:10} {ms:9.2f} ms  {ms / times[0]:6.2f}x the static one"
                f"  (MACs {macs[name] / macs['static']:5.3f}x)",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    arguments = parser.parse_args()
    print(
        f"{tables.machine()}, jax {jax.__version__}",
        file=sys.stderr,
    )
    rows = []
    for case in arguments.cases:
        for batch in arguments.batches:
            rows += run(case, batch, arguments.ways, arguments.repeats)
            tables.write(arguments.out, rows)  # again after each: all of it takes minutes


if __name__ == "__main__":
    main()
