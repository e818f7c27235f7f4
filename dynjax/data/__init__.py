"""Sources of data by name, and batches from them.

A source is one of ours or a class of your own with what `dynjax.data.source.Source` names; its `spec` says what it
gives. To use your own by name, in rows and with `--data.name`, register a function that makes it:

    def make(config, split, *, seed, classes):  # a DataConfig; "train", "val" or "test"; see `make_source`
        return Reviews(config.path, split)

    dynjax.data.register("reviews", make)
"""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dynjax.config import DataConfig, UserError
from dynjax.data.source import SPLITS, Source, calibration_batches

if TYPE_CHECKING:
    from dynjax.data.loader import make_loader

__all__ = ["calibration_batches", "make_loader", "make_source", "register"]


@runtime_checkable
class Make(Protocol):
    """Makes the source of one split; the arguments are those of `make_source`. Raises UserError."""

    def __call__(self, config: DataConfig, split: str, *, seed: int, classes: Sequence[str] | None) -> Source: ...


_MAKES: dict[str, Make | str] = {
    "digits": "digit_scenes",
    "camvid": "camvid",
    "folder": "folder",
    "isbi_em": "isbi_em",
    "aerial_roads": "aerial_roads",
    "digits8": "digits",
    "mnist": "mnist",
    "fashion_mnist": "mnist",
    "cifar10": "cifar10",
    "class_folder": "class_folder",
    "tfds:": "tfds",
}
"""By name; of ours the module, whose `make` is imported only when it is wanted."""


def register(name: str, make: Make) -> None:
    """Give sources a name for `DataConfig.name`, in place of any that had it; one that ends in a colon stands for all
    names that begin so."""
    _MAKES[name] = make


def make_source(
    config: DataConfig,
    split: str,
    seed: int = 0,
    *,
    classes: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> Source:
    """The source that `config.name` says, checked.

    `seed` is for digits, and for which training pictures are `config.labelled`. `classes` are the names of the classes
    that a model was trained for: where names or their number are otherwise found in the files (folder, class_folder,
    tfds:NAME of masks), these count, and a split need not have all of them. Elsewhere they change nothing; whoever
    loads a model compares `source.classes`. With `config.crop` examples are windows of pictures, and with
    `config.labelled` those of training are the labelled ones alone or, with `unlabelled`, each beside one that is not
    (`few.WithUnlabelled`). Raises UserError, one for all that is wrong with
    the files.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r}: there are {', '.join(SPLITS)}")
    try:
        Path(config.path).expanduser()
    except RuntimeError as error:  # ~ where nobody knows a home
        raise UserError(f"data.path={config.path}: {error}") from None
    begin, colon, _ = config.name.partition(":")
    make = _MAKES.get(config.name) or _MAKES.get(begin + colon)
    if make is None:
        names = [f"{name}NAME" if name.endswith(":") else name for name in _MAKES]
        near = difflib.get_close_matches(config.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"data.name={config.name!r} is not known: {', '.join(names)}{hint}")
    if isinstance(make, str):
        if config.masks != "ids" and config.name != "folder":
            raise UserError(f"data.masks={config.masks}: that is for data.name=folder, not {config.name}; leave it out")
        make = importlib.import_module(f"dynjax.data.{make}").make
    return _part(make(config, split, seed=seed, classes=classes), config, seed, unlabelled)


def _part(source: Source, config: DataConfig, seed: int, unlabelled: bool) -> Source:
    """What the configuration wants of a source. Raises UserError."""
    if config.weak != "full":
        from dynjax.data.pairs import PairSource

        if not isinstance(source, PairSource) or "mask" not in source.spec:
            raise UserError(f"data.weak={config.weak}: data.name={config.name} has no masks from files; leave it out")
    if config.crop is not None:
        from dynjax.data.windows import cut

        source = cut(source, config.crop)
    if config.labelled and source.split == "train":
        from dynjax.data.few import WithUnlabelled, labelled

        source, bare = labelled(source, config.labelled, seed)
        if unlabelled:
            source = WithUnlabelled(source, bare, seed)
    return source


def __getattr__(name: str) -> object:
    """`make_loader`, for which grain is imported only when somebody asks."""
    if name == "make_loader":
        from dynjax.data.loader import make_loader

        return make_loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
