"""Every row by its name. A row is a function without arguments that returns a Config; its docstring is the lab book."""

import dataclasses
import difflib
from collections.abc import Callable

from dynjax.config import Config, ModelConfig, UserError
from experiments import (
    autoregressive,
    camvid_unet,
    digits_unet,
    dynamicconvnet,
    halt,
    moe,
    msdnet,
    nextscale,
    policy,
    ranet,
    resnet,
    routed,
    vqvae,
    width,
)

FILES = (
    digits_unet,
    camvid_unet,
    resnet,
    policy,
    width,
    msdnet,
    ranet,
    halt,
    routed,
    moe,
    dynamicconvnet,
    autoregressive,
    nextscale,
    vqvae,
)
ROWS: dict[str, Callable[[], Config]] = {row.__name__: row for file in FILES for row in file.ROWS}


def get_row(name: str) -> Config:
    """The configuration of row `name`. Raises UserError with near matches."""
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the rows are {', '.join(ROWS)}"
        raise UserError(f"unknown row {name!r}: {hint}")
    return ROWS[name]()


TINY: dict[str, dict] = {
    "unet": dict(widths=(8, 12), blocks=(1, 0), tiles=(4,)),
    "resnet": dict(widths=(4, 8), blocks=(1, 1), groups=2),
    "msdnet": dict(scales=2, channels=4, growth=2, blocks=2, base=1, step=1),
    "ranet": dict(scales=2, channels=4, growth=4, blocks=1, step=1, layers=1),
    "halting": dict(channels=4, halvings=0, steps=2),
    "routed": dict(channels=4, scales=2, layers=2),
    "moe": dict(width=8, depth=1, heads=2, hidden=8, experts=2),
    "dynamicconvnet": dict(widths=(4, 8), blocks=(1, 1), kernels=2),
    "pixelcnn": dict(shape=(8, 8, 1), features=4, layers=1),
    "pixeltransformer": dict(shape=(8, 8, 1), features=8, layers=2, heads=2),
    "nextscale": dict(
        shape=(8, 8, 1), scales=2, coarse_features=4, coarse_layers=1, reach=1, features=8, blocks=1, plain=4
    ),
    "vqvae": dict(shape=(8, 8, 1), halvings=1, codes=4, code_features=2, features=4, blocks=0),
}
"""What each family of models shrinks to."""


def _small(model: ModelConfig) -> dict:
    """The fields of the family's tiny form."""
    if model.family == "codes":
        parts = {name: getattr(model, name) for name in ("vqvae", "prior")}
        return {name: dataclasses.replace(part, **TINY[part.family]) for name, part in parts.items()}
    return TINY[model.family]


def tiny(config: Config) -> Config:
    """The same row in a size that trains two steps in seconds: what is done stays, how much shrinks. For tests.

    Pictures with labels are those of digits8, which need no download.
    """
    if config.model.family == "unet":
        data = dataclasses.replace(config.data, size=(48, 48), examples=8)
    else:
        data = dataclasses.replace(config.data, name="digits8", path="", size=(8, 8), examples=16)
    small = dict(_small(config.model))
    if getattr(config.model, "likelihood", "") == "logistic":
        small["shape"] = (8, 8, config.model.shape[2])
    return dataclasses.replace(
        config,
        data=data,
        model=dataclasses.replace(config.model, **small),
        steps=2,
        batch_size=8,
        checkpoint_every=2,
        evaluate_every=0,
    )
