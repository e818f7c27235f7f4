"""What many classes cost: the dense last layer of a head against a shortlist, timed alternately in one process.

    python -m benchmarks.many_classes [--out benchmarks/results/many_classes.csv] [--repeats 9] [--classes 11 200 ...]

A map of 48x48 pixels and 24 features becomes logits, or the classes of the largest, of 96x96 pixels (`Classify`,
sharp). Decisions are given, not learned: a gate's own work is not in the times. For every number of classes and share
of them on the shortlist, at batch 1: milliseconds of all logits, `dense` and `shortlist`; of the largest, `argmax` of
the dense logits, `blocks` (`largest`: no array of all logits) and `list`, the same for a shortlist; and megabytes that
the compiled programs need beside inputs and outputs. Once for each number of classes: memory and milliseconds of a
training step's loss and gradient, batch 4, of `dense` and with a shortlist and its gate, which trains on all logits.
Also checks every result against the masked execution.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import tables
from benchmarks.executors import median_ms
from dynjax.core import views
from dynjax.core.controls import FixedGate
from dynjax.core.decision import EACH
from dynjax.core.trace import traced
from dynjax.models.blocks import Classify
from dynjax.ops.shortlist import PresenceGate, Shortlist, presence_loss
from dynjax.tasks.losses import cross_entropy

KEPT = (0.05, 0.1, 1.0)
FEATURES, STRIDE, BATCH = 24, 2, 4


def compiled(fn: Callable, *args: Any) -> tuple[Callable[[], Any], float]:
    """`fn(*args)`, compiled, and the megabytes that it needs beside its inputs and outputs."""
    program = jax.jit(fn).lower(*args).compile()
    memory = program.memory_analysis()
    return lambda: program(*args), (np.nan if memory is None else memory.temp_size_in_bytes / 1e6)


def head(classes: int) -> Classify:
    return Classify(FEATURES, classes, STRIDE, sharp=True, rngs=nnx.Rngs(0))


def listed(classes: int, gate: Callable) -> Classify:
    layer = head(classes)
    layer.linear = Shortlist(layer.linear, gate, classes)
    return layer


def inference(classes: int, side: int, repeats: int) -> list[dict]:
    """Of a batch of one, a row for each share of classes kept."""
    x, size = jax.random.normal(jax.random.key(1), (1, side, side, FEATURES)), (STRIDE * side, STRIDE * side)
    layer, order = head(classes), np.random.default_rng(0).permutation(classes)
    dense, argmax = (compiled(f, x) for f in (lambda x: layer(x, size), lambda x: layer(x, size).argmax(-1)))
    blocks, rows = compiled(lambda x: layer.largest(x, size), x), []
    for kept in dict.fromkeys(max(1, round(share * classes)) for share in KEPT):
        graphdef, state = nnx.split(views.compact(listed(classes, FixedGate([order < kept], rule=EACH))))
        merged = views.masked(nnx.merge(graphdef, state))
        few = compiled(lambda state, x, g=graphdef: nnx.merge(g, state)(x, size), state, x)
        best = compiled(lambda state, x, g=graphdef: nnx.merge(g, state).largest(x, size), state, x)
        expected = merged(x, size)
        error = float(jnp.abs(few[0]() - expected).max())
        assert error <= 1e-5 and bool((best[0]() == expected.argmax(-1)).all()), f"{classes}: off by {error}"
        ways = dict(dense=dense, shortlist=few, argmax=argmax, blocks=blocks, list=best)
        times = median_ms([call for call, _ in ways.values()], repeats)
        found = dict(zip(ways, times, strict=True))
        rows.append(
            dict(
                classes=classes,
                kept=kept,
                **{f"{name}_ms": round(ms, 3) for name, ms in found.items()},
                **{f"{name}_mb": round(memory, 2) for name, (_, memory) in ways.items()},
                logits_mb=round(4 * classes * size[0] * size[1] / 1e6, 2),
                logits_speedup=round(found["dense"] / found["shortlist"], 2),
                blocks_speedup=round(found["argmax"] / found["blocks"], 2),
                list_speedup=round(found["argmax"] / found["list"], 2),
                max_error=error,
            )
        )
    return rows


def training(classes: int, side: int, repeats: int) -> dict:
    """Loss and gradient of the head alone, also to its input."""
    keys = jax.random.split(jax.random.key(2))
    size = (STRIDE * side, STRIDE * side)
    x = jax.random.normal(keys[0], (BATCH, side, side, FEATURES))
    mask = jax.random.randint(keys[1], (BATCH, *size), 0, classes)
    present = jnp.arange(classes)[None] % 20 == jnp.arange(BATCH)[:, None]

    def step(layer: Classify) -> tuple[Callable, float]:
        graphdef, state = nnx.split(views.training(layer))
        params, rest = nnx.split_state(state, nnx.Param, ...)

        def loss(params: nnx.State, x: jax.Array, rest: nnx.State) -> jax.Array:
            logits, trace = traced(nnx.merge(graphdef, params, rest, copy=True))(x, size)
            terms = (presence_loss(each.probability, present).mean() for each in trace.decisions.values())
            return sum(terms, cross_entropy(logits, mask))

        return compiled(jax.grad(loss, argnums=(0, 1)), params, x, rest)

    gate = PresenceGate(FEATURES, classes, rngs=nnx.Rngs(1))
    (dense, dense_mb), (listing, listing_mb) = step(head(classes)), step(listed(classes, gate))
    dense_ms, listing_ms = median_ms([dense, listing], repeats)
    return dict(
        step_dense_ms=round(dense_ms, 1),
        step_shortlist_ms=round(listing_ms, 1),
        step_dense_mb=round(dense_mb, 2),
        step_shortlist_mb=round(listing_mb, 2),
        step_ratio=round(listing_ms / dense_ms, 3),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/many_classes.csv"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--classes", type=int, nargs="+", default=[11, 200, 500, 1000])
    parser.add_argument("--side", type=int, default=48)
    arguments = parser.parse_args(argv)
    print(f"{tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    rows = []
    for classes in arguments.classes:
        step = training(classes, arguments.side, arguments.repeats)
        for row in inference(classes, arguments.side, arguments.repeats):
            rows.append(row | step)
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    tables.write(arguments.out, rows)


if __name__ == "__main__":
    main()
