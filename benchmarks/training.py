"""What a masked training step costs beside the static twin's: both timed alternately in one process, on random
pictures.

python -m benchmarks.training [--out benchmarks/results/training.csv] [--repeats 7] [--rows camvid_small_tiles ...]
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import tables
from benchmarks.executors import median_ms
from dynjax import budget, models
from dynjax.config import Config
from dynjax.run.step import make_step
from dynjax.tasks.segmentation import SegmentationTask
from experiments import rows

ROWS = ("camvid_small_tiles", "camvid_small_skip", "digits_unet_tiles", "digits_unet_skip", "digits_unet_select")
CLASSES = 11


def stepper(config: Config) -> Callable[[], jax.Array]:
    """A function that takes one training step of the row and returns its loss."""
    height, width = config.data.size or (96, 96)
    model = models.build(config.model, CLASSES, rngs=nnx.Rngs(0))
    spends = None if models.is_static(config.model) else config.budget
    task = SegmentationTask(tuple(map(str, range(CLASSES))), config.loss, None, spends)
    state, step = make_step(model, task, config, budget.gate_filter)
    state = dataclasses.replace(state, ema=jax.tree.map(jnp.copy, state.ema))  # donated: nothing may be there twice
    step = jax.jit(step, donate_argnums=0)
    keys = jax.random.split(jax.random.key(1))
    batch = {
        "image": jax.random.randint(keys[0], (config.batch_size, height, width, 3), 0, 256).astype(jnp.uint8),
        "mask": jax.random.randint(keys[1], (config.batch_size, height, width), 0, CLASSES),
    }

    def call() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.csv"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    arguments = parser.parse_args()
    found = []
    for name in arguments.rows:
        config = rows.get_row(name)
        twin = dataclasses.replace(config, model=models.static_twin(config.model))
        static, masked = median_ms([stepper(twin), stepper(config)], arguments.repeats)
        found.append(
            dict(row=name, static_ms=round(static, 1), masked_ms=round(masked, 1), ratio=round(masked / static, 3))
        )
        print(
            f"{name:22} static step {static:8.1f} ms  masked step {masked:8.1f} ms  ratio {masked / static:.3f}",
            flush=True,
        )
    tables.write(arguments.out, found)


if __name__ == "__main__":
    main()
