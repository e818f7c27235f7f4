"""Pictures with masks or with labels: sources by name, and batches from them."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from dynjax.config import DataConfig, UserError

__all__ = ["calibration_batches", "make_loader", "make_source"]

NAMES = ("digits", "camvid", "folder", "digits8", "mnist", "fashion_mnist", "cifar10", "class_folder", "tfds:NAME")
MNISTS: tuple[Literal["mnist", "fashion_mnist"], ...] = ("mnist", "fashion_mnist")
SPLITS = ("train", "val", "test")
SCENES = 2000  # of digits, where data.examples says nothing


class _Files(TypedDict):
    """What every source of files takes."""

    size: tuple[int, int] | None
    limit: int | None
    on_error: Literal["raise", "skip"]


def make_source(config: DataConfig, split: str, seed: int = 0, *, classes: Sequence[str] | None = None) -> Any:
    """The source that `config.name` says, checked: `source[i]` is {"image": uint8 (H, W, 3)} and, under the key
    `source.target`, "mask": int32 (H, W) or "label": int32 ().

    Every source has `len`, `classes`, `ignore_label` (what ignored pixels carry in its masks, or None), `size` (H, W),
    `name`, `split`, `target`, `handed` (no picture may be mirrored) and `describe()`; those that
    are read, not made, have `seen`, the classes that occur. `seed` is for digits alone.
    `classes` are the names of the classes that a model was trained for: where names or their number are otherwise found
    in the files (folder, class_folder, tfds:NAME of masks), these count, and a split need not have all of them.
    Elsewhere they change nothing; whoever loads a model compares `source.classes`. Raises UserError, one for all that
    is wrong with the files.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: there are {', '.join(SPLITS)}")
    name, path = config.name, config.path
    try:
        Path(path).expanduser()
    except RuntimeError as error:  # ~ where nobody knows a home
        raise UserError(f"data.path={path}: {error}") from None
    if name == "digits":
        from dynjax.data.digit_scenes import make_digits

        examples = SCENES if config.examples is None else config.examples
        return make_digits(split, examples=examples, difficulty=config.difficulty, seed=seed, size=config.size)
    size, limit = config.size, config.examples if split == "train" else None
    if name == "digits8":
        from dynjax.data.digits import make_digits8

        return make_digits8(split, size=size, limit=limit)
    count = len(classes) if classes else config.classes
    files = _Files(size=size, limit=limit, on_error=config.on_error)
    if name == "camvid":
        from dynjax.data.camvid import make_camvid

        return make_camvid(path, split, **files)
    if name == "folder":
        from dynjax.data.folder import make_folder

        return make_folder(path, split, classes=count, **files)
    if name in MNISTS:
        from dynjax.data.mnist import make_mnist

        return make_mnist(name, path, split, **files)
    if name == "cifar10":
        from dynjax.data.cifar10 import make_cifar10

        return make_cifar10(path, split, **files)
    if name == "class_folder":
        from dynjax.data.class_folder import make_class_folder

        return make_class_folder(path, split, names=classes, classes=config.classes, **files)
    if name.startswith("tfds:"):
        from dynjax.data.tfds import make_tfds

        return make_tfds(name.removeprefix("tfds:"), path, split, classes=count, **files)
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"data.name={name!r} is not known: {', '.join(NAMES)}{hint}")


def make_loader(source: Any, batch_size: int, **options: Any) -> Any:
    """Batches by grain; see `dynjax.data.loader.make_loader`, which this imports only when called."""
    from dynjax.data.loader import make_loader as make

    return make(source, batch_size, **options)


def calibration_batches(source: Any, batch_size: int, count: int) -> list[dict[str, np.ndarray]]:
    """Batches for solving a budget; see `dynjax.data.loader.calibration_batches`."""
    from dynjax.data.loader import calibration_batches as make

    return make(source, batch_size, count)
