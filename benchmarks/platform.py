"""Convolutions as XLA has them, beside what `dynjax.core.convolve` makes of them on CPUs: timed alternately.

    python -m benchmarks.platform [--out benchmarks/results/platform_kernels.csv] [--repeats 15] [--cases 3x3_90x120x96
    ...] [--batches 1 8]

Of every layer, forward alone and with the gradient: median milliseconds of XLA's own convolution and of the same one
as shifted products (depthwise) or as a matrix product (of a single pixel, or of few channels), and their ratio. Of a
single pixel also as the map times the matrix, with as many axes as the map has.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from jax import lax

from benchmarks import tables
from benchmarks.executors import median_ms
from benchmarks.kernels import with_gradient
from dynjax.core import convolve


@dataclasses.dataclass(frozen=True)
class Case:
    size: tuple[int, int]
    before: int
    after: int
    """Channels; as many as before where each has a kernel of its own."""
    side: int
    stride: int = 1

    @property
    def depthwise(self) -> bool:
        return self.before == self.after


CASES = {
    "3x3_90x120x96": Case((90, 120), 96, 96, 3),
    "3x3_45x60x144": Case((45, 60), 144, 144, 3),
    "5x5_45x60x144_stride2": Case((45, 60), 144, 144, 5, 2),
    "5x5_23x30x240": Case((23, 30), 240, 240, 5),
    "5x5_12x15x672": Case((12, 15), 672, 672, 5),
    "1x1_45x60x24_144": Case((45, 60), 24, 144, 1),
    "1x1_23x30x240_40": Case((23, 30), 240, 40, 1),
    "1x1_12x15x112_672": Case((12, 15), 112, 672, 1),
    "3x3_180x240x3_32_stride2": Case((180, 240), 3, 32, 3, 2),
}
"""Of EfficientNet-Lite0 at 180x240."""
BATCHES = (1, 8)


def ways(case: Case) -> dict[str, Callable]:
    """XLA's own convolution, and what takes its place."""
    strides, groups = (case.stride, case.stride), case.before if case.depthwise else 1
    arguments = dict(window_strides=strides, padding="SAME", feature_group_count=groups)
    numbers = ("NHWC", "HWIO", "NHWC")
    xla = lambda x, kernel: lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **arguments)  # noqa: E731
    if case.depthwise:
        shifted = lambda x, k: convolve.depthwise(x, k, strides=strides, strategy="shifted")  # noqa: E731
        return {"xla": xla, "shifted": shifted}
    product = lambda x, kernel: convolve.convolution(x, kernel, dimension_numbers=numbers, **arguments)  # noqa: E731
    whole = {"x @ kernel": lambda x, kernel: x @ kernel[0, 0]} if case.side == 1 else {}
    return {"xla": xla, **whole, "product": product}


def run(name: str, case: Case, batch: int, repeats: int) -> list[dict]:
    x = jax.random.normal(jax.random.key(0), (batch, *case.size, case.before))
    inputs = 1 if case.depthwise else case.before
    kernel = jax.random.normal(jax.random.key(1), (case.side, case.side, inputs, case.after))
    rows = []
    for part, transform in (("forward", lambda way: way), ("gradient", with_gradient)):
        found = {way: jax.jit(transform(made)) for way, made in ways(case).items()}
        calls = [functools.partial(program, x, kernel) for program in found.values()]
        for way, ms in zip(found, times := median_ms(calls, repeats), strict=True):
            ratio = times[0] / ms
            rows.append(
                dict(case=name, batch=batch, part=part, way=way, ms=round(ms, 3), times_as_fast=round(ratio, 2))
            )
            print(f"{name:22} batch {batch}  {part:8}  {way:10} {ms:8.3f} ms  {ratio:6.2f}x as fast", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/platform_kernels.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    arguments = parser.parse_args()
    print(f"{tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    rows = []
    for name in arguments.cases:
        for batch in arguments.batches:
            rows += run(name, CASES[name], batch, arguments.repeats)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
