"""Pictures with masks: sources by name, and batches from them."""

import difflib
from typing import Any

import numpy as np

from dynjax.config import DataConfig, UserError

__all__ = ["calibration_batches", "make_loader", "make_source"]

NAMES = ("digits", "camvid", "folder", "tfds:NAME")
SPLITS = ("train", "val", "test")


def make_source(config: DataConfig, split: str, seed: int = 0) -> Any:
    """The source that `config.name` says, checked: `source[i]` is {"image": uint8 (H, W, 3), "mask": int32 (H, W)}.

    Every source has `len`, `classes`, `ignore_label` (what ignored pixels carry in its masks, or None), `size` (H, W),
    `name` and `describe()`. `seed` is for digits alone. Raises UserError, one for all that is wrong with the files.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: there are {', '.join(SPLITS)}")
    if config.name == "digits":
        from dynjax.data.digits import make_digits

        return make_digits(split, examples=config.examples, difficulty=config.difficulty, seed=seed, size=config.size)
    if config.name == "camvid":
        from dynjax.data.camvid import make_camvid

        return make_camvid(config.path, split, size=config.size, on_error=config.on_error)
    if config.name == "folder":
        from dynjax.data.folder import make_folder

        return make_folder(config.path, split, classes=config.classes, size=config.size, on_error=config.on_error)
    if config.name.startswith("tfds:"):
        from dynjax.data.tfds import make_tfds

        name = config.name.removeprefix("tfds:")
        return make_tfds(name, config.path, split, classes=config.classes, size=config.size, on_error=config.on_error)
    near = difflib.get_close_matches(config.name, NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"data.name={config.name!r} is not known: {', '.join(NAMES)}{hint}")


def make_loader(source: Any, batch_size: int, **options: Any) -> Any:
    """Batches by grain; see `dynjax.data.loader.make_loader`, which this imports only when called."""
    from dynjax.data.loader import make_loader as make

    return make(source, batch_size, **options)


def calibration_batches(source: Any, batch_size: int, count: int) -> list[np.ndarray]:
    """Pictures for solving a budget; see `dynjax.data.loader.calibration_batches`."""
    from dynjax.data.loader import calibration_batches as make

    return make(source, batch_size, count)
