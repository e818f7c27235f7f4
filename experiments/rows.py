"""Every row by its name. A row is a function without arguments that returns a Config; its docstring is the lab book."""

import dataclasses
import difflib
from collections.abc import Callable

from dynjax import models
from dynjax.config import Config, UserError
from experiments import (
    autoregressive,
    camvid_lite0,
    camvid_unet,
    digits_unet,
    dynamicconvnet,
    few_labels,
    gan,
    halt,
    many_classes,
    moe,
    msdnet,
    my_pictures,
    nextscale,
    policy,
    ranet,
    resnet,
    routed,
    vae,
    vqvae,
    width,
)

PREDICT = (
    digits_unet,
    many_classes,
    camvid_unet,
    camvid_lite0,
    my_pictures,
    few_labels,
    resnet,
    policy,
    width,
    msdnet,
    ranet,
    halt,
    routed,
    moe,
    dynamicconvnet,
)
DRAW = (autoregressive, nextscale, vqvae, gan, vae)
ROWS: dict[str, Callable[[], Config]] = {row.__name__: row for file in (*PREDICT, *DRAW) for row in file.ROWS}


def get_row(name: str) -> Config:
    """The configuration of row `name`. Raises UserError with near matches."""
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the rows are {', '.join(ROWS)}"
        raise UserError(f"unknown row {name!r}: {hint}")
    return ROWS[name]()


def tiny(config: Config) -> Config:
    """The same row in a size that trains two steps in seconds: what is done stays, how much shrinks. For tests.

    Pictures with labels are those of digits8, which need no download.
    """
    if models.task_of(config.model) == "segmentation":
        crop = None if config.data.crop is None else (32, 48)
        data = dataclasses.replace(config.data, size=(48, 48), crop=crop, examples=8)
    else:
        data = dataclasses.replace(config.data, name="digits8", path="", size=(8, 8), examples=16)
    return dataclasses.replace(
        config,
        data=data,
        model=models.tiny(config.model),
        steps=2,
        batch_size=8,
        checkpoint_every=2,
        evaluate_every=0,
    )
