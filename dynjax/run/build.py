"""A row's model, if the memory holds it."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import jax
from flax import nnx

from dynjax import models
from dynjax.config import Config, UserError

SMALL = 512
"""A model whose options are no larger is not looked at for its memory: that takes seconds."""


def build(config: Config, classes: int, twin: nnx.State | None = None) -> nnx.Module:
    """The row's model with fresh parameters, or with those of its static `twin` under the wrappers.

    Raises UserError where its options make no model, or one that the memory does not hold.
    """
    try:
        check_memory(config, classes)
        return models.build(config.model, classes, rngs=nnx.Rngs(config.seed), twin_params=twin)
    except ValueError as error:
        raise UserError(f"row {config.row}: its --model options make no model: {error}") from error


def check_memory(config: Config, classes: int, copies: int = 1) -> None:
    """Raises UserError where so many copies of the model's variables are more than this machine's memory; looks at
    models with large numbers alone."""
    numbers = jax.tree.leaves(dataclasses.asdict(config.model))
    if max((number for number in numbers if isinstance(number, int)), default=0) <= SMALL:
        return
    model = jax.eval_shape(lambda: nnx.state(models.build(config.model, classes, rngs=nnx.Rngs(0))))
    need = copies * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    if need > (there := _memory()):
        what = f"{copies} copies of the model" if copies > 1 else "the model"
        raise UserError(
            f"row {config.row}: {what} would take {need / 2**30:.1f} GB, and there are {there / 2**30:.1f} GB: "
            "give smaller numbers to the --model options"
        )


def _memory() -> int:
    """Bytes of memory that this process may have, on its device if that has its own."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    found += [stats["bytes_limit"] for stats in [jax.local_devices()[0].memory_stats()] if stats]
    return min(found)
