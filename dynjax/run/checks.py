"""What the fields of a configuration may be: the rules of all in one place, so that a wrong value is one line.

What ties a model to its data (classes, the size of pictures) is checked where both are known: see `dynjax.tasks`.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dynjax.config import Config, ModelConfig, UserError

WIDEST = 65536
"""Channels or features of a layer, at most."""
DEEPEST = 1000
"""Layers, blocks, steps or experts, at most."""
HALVINGS = 10
"""How often a resolution may be halved."""
LARGEST_SIDE = 16384
"""Pixels of a side of the pictures that a model works at."""

Rule = tuple[str, Any, bool, str]
"""A field, its value, whether that is right (False too for nan), and what it must be."""


def check_config(config: Config) -> None:
    """Raises UserError naming, as its option, the first field whose value makes no sense."""
    _check(_general(config), "")
    check_model(config.model)


def check_model(model: ModelConfig, option: str = "model.") -> None:
    """The same of a model. Options that fit each other may still make no network: then the model's own `build` says
    so."""
    _check(_choices(model, ""), option)
    _check(_RULES[model.family](model), option)


def _choices(model: Any, prefix: str) -> Iterator[Rule]:
    """Fields that are one of a few names, also of models within."""
    hints = typing.get_type_hints(type(model))
    for field in dataclasses.fields(model):
        name, value, hint = prefix + field.name, getattr(model, field.name), hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            names = typing.get_args(hint)
            yield name, value, value in names, " or ".join(map(str, names))
        elif dataclasses.is_dataclass(value):
            yield from _choices(value, f"{name}.")


def _check(rules: Iterable[Rule], option: str) -> None:
    for name, value, good, wanted in rules:
        if not good:
            told = (" ".join(map(str, value)) or "empty") if isinstance(value, tuple) else value
            raise UserError(f"--{(option + name).replace('_', '-')} is {told}: it must be {wanted}")


def _general(config: Config) -> Iterator[Rule]:
    loss, o, size = config.loss, config.optimizer, config.data.size
    yield "steps", config.steps, config.steps >= 1, "at least 1"
    yield "steps", config.steps, config.steps < 2**31, "less than 2147483648"
    yield "batch_size", config.batch_size, config.batch_size >= 1, "at least 1"
    yield "seed", config.seed, config.seed >= 0, "0 or more"
    yield "seed", config.seed, config.seed < 2**32, "less than 4294967296"
    yield "checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 1, "at least 1"
    yield "evaluate_every", config.evaluate_every, config.evaluate_every >= 0, "0 (only at the end) or more"
    sides = size is None or (len(size) == 2 and all(1 <= side <= LARGEST_SIDE for side in size))
    yield "data.size", size, sides, f"height and width in pixels, each from 1 to {LARGEST_SIDE}"
    yield "budget.target", config.budget.target, 0 < config.budget.target <= 1, "a share of the MACs in (0, 1]"
    yield "budget.weight", config.budget.weight, 0 <= config.budget.weight < math.inf, "0 or more"
    for name in ("cross_entropy", "dice", "load_balance", "router_z", "ponder", "reinforce", "wrong"):
        yield f"loss.{name}", getattr(loss, name), 0 <= getattr(loss, name) < math.inf, "0 or more"
    yield "loss.label_smoothing", loss.label_smoothing, 0 <= loss.label_smoothing < 1, "in [0, 1)"
    yield "optimizer.learning_rate", o.learning_rate, 0 < o.learning_rate < math.inf, "more than 0"
    yield "optimizer.gate_learning_rate", o.gate_learning_rate, 0 <= o.gate_learning_rate < math.inf, "0 or more"
    yield "optimizer.warmup", o.warmup, 0 <= o.warmup <= 1, "a share of the steps in [0, 1]"
    yield "optimizer.weight_decay", o.weight_decay, 0 <= o.weight_decay < math.inf, "0 or more"
    yield "optimizer.clip", o.clip, o.clip > 0, "more than 0 (inf turns it off)"
    yield "optimizer.ema", o.ema, 0 <= o.ema < 1, "in [0, 1)"
    yield "optimizer.accumulate", o.accumulate, o.accumulate >= 1, "at least 1"


# Models


def _between(model: Any, names: str, least: int, most: int) -> Iterator[Rule]:
    for name in names.split():
        value = getattr(model, name)
        yield name, value, least <= value <= most, f"from {least} to {most}"


def _each(model: Any, name: str, least: int, most: int) -> Iterator[Rule]:
    values = getattr(model, name)
    yield name, values, all(least <= value <= most for value in values), f"each from {least} to {most}"


def _levels(model: Any, level: str) -> Iterator[Rule]:
    """Of families with `widths` and `blocks`."""
    yield "widths", model.widths, len(model.widths) >= 1, f"one number of channels for each {level}"
    yield from _each(model, "widths", 1, WIDEST)
    many = len(model.widths)
    most = HALVINGS + 1
    yield "widths", model.widths, many <= most, f"of at most {most} {level}s: each halves the picture"
    wanted = f"one number for each {level}, of which --model.widths has {many}"
    yield "blocks", model.blocks, len(model.blocks) == many, wanted
    yield from _each(model, "blocks", 0, DEEPEST)


def _stride(model: Any, *strides: int) -> Iterator[Rule]:
    *others, last = map(str, strides)
    yield "stem_stride", model.stem_stride, model.stem_stride in strides, f"{', '.join(others)} or {last}"


def _has_blocks(model: Any) -> Iterator[Rule]:
    yield "blocks", model.blocks, any(model.blocks), f"1 or more in one of them: {model.dynamics} needs blocks"


def _unet(model: Any) -> Iterator[Rule]:
    yield from _levels(model, "level")
    yield from _stride(model, 1, 2, 4)
    if model.dynamics == "skip":
        yield from _has_blocks(model)
    if model.dynamics not in ("tiles", "select"):
        return
    levels = len(model.widths)
    yield "tiles", model.tiles, 1 <= len(model.tiles) <= levels, f"one side for each of the first 1 to {levels} levels"
    yield from _each(model, "tiles", 1, LARGEST_SIDE)
    blocks = model.blocks[: len(model.tiles)]
    yield "blocks", model.blocks, all(blocks), f"1 or more in the levels that have tiles, the first {len(blocks)}"


def _resnet(model: Any) -> Iterator[Rule]:
    yield from _levels(model, "stage")
    yield from _stride(model, 1, 2)
    if model.dynamics not in ("static", "exits"):
        yield from _has_blocks(model)
    if model.dynamics in ("channels", "slices"):
        narrowest = min((w for w, n in zip(model.widths, model.blocks, strict=True) if n), default=1)
        yield from _between(model, "groups", 1, narrowest)
    if model.dynamics == "channels":
        divides = all(w % model.groups == 0 for w, n in zip(model.widths, model.blocks, strict=True) if n)
        yield "groups", model.groups, divides, f"a divisor of all --model.widths {' '.join(map(str, model.widths))}"


def _msdnet(model: Any) -> Iterator[Rule]:
    yield from _between(model, "scales", 1, HALVINGS + 1)
    yield from _between(model, "channels growth", 1, WIDEST)
    yield from _between(model, "blocks base step", 1, DEEPEST)
    halves = model.scales == 1 or model.growth >= 2
    yield "growth", model.growth, halves, "at least 2: a scale takes half of it from the next finer one"
    yield from _doubled(model, "channels growth")


def _ranet(model: Any) -> Iterator[Rule]:
    yield from _between(model, "scales", 1, HALVINGS + 1)
    yield from _between(model, "channels", 1, WIDEST)
    yield from _between(model, "growth", 4, WIDEST)  # a quarter of it comes from the coarser sub-network
    yield from _between(model, "blocks layers step", 1, DEEPEST)
    yield from _doubled(model, "channels growth")


def _doubled(model: Any, names: str) -> Iterator[Rule]:
    """Of families whose every coarser scale has twice the channels."""
    for name in names.split():
        value, most = getattr(model, name), WIDEST >> (model.scales - 1)
        yield name, value, value <= most, f"at most {most}: it doubles with each of the {model.scales} scales"


def _routed(model: Any) -> Iterator[Rule]:
    yield from _between(model, "channels", 1, WIDEST)
    yield from _between(model, "scales", 1, HALVINGS + 1)
    yield from _between(model, "layers", model.scales, DEEPEST)  # each layer reaches one scale more
    yield from _stride(model, 1, 2, 4)
    yield from _doubled(model, "channels")
    control = model.gate != "random" or model.dynamics not in ("single", "sandwich")
    yield "gate", model.gate, control, f"learned: random is the control of gates, and {model.dynamics} learns none"


def _halting(model: Any) -> Iterator[Rule]:
    yield from _between(model, "channels", 1, WIDEST)
    yield from _between(model, "halvings", 0, HALVINGS)
    yield from _between(model, "steps", 1, DEEPEST)
    if model.dynamics == "sact":
        yield from _between(model, "tile", 1, LARGEST_SIDE)


def _moe(model: Any) -> Iterator[Rule]:
    yield from _between(model, "patch", 1, 1024)
    yield from _between(model, "width hidden", 1, WIDEST)
    yield from _between(model, "depth heads experts top least", 1, DEEPEST)
    yield "width", model.width, model.width % 4 == 0, "a multiple of 4"
    yield from _heads(model, "width")
    if model.dynamics == "experts":
        yield "top", model.top, model.top <= model.experts, f"at most --model.experts, which is {model.experts}"
        yield "least", model.least, model.least <= model.top, f"at most --model.top, which is {model.top}"


def _heads(model: Any, name: str) -> Iterator[Rule]:
    value = getattr(model, name)
    yield name, value, value % model.heads == 0, f"a multiple of --model.heads, which is {model.heads}"


def _dynamicconvnet(model: Any) -> Iterator[Rule]:
    yield from _levels(model, "stage")
    yield from _stride(model, 1, 2)
    if model.dynamics != "static":
        yield from _has_blocks(model)
        yield from _between(model, "kernels", 1, DEEPEST)
    per_pixel = model.dynamics in ("involution", "ddf")
    has_weights = model.gate != "random" or not per_pixel
    yield "gate", model.gate, has_weights, f"learned: {model.dynamics} has no weights to draw, only filters"


def _drawn(model: Any) -> Iterator[Rule]:
    """Of families that draw pictures."""
    yield from _shape(model)
    yield from _between(model, "values", 2, 256)
    yield from _between(model, "components", 1, DEEPEST)
    grey = model.shape[2] == 1
    one = model.likelihood != "categorical" or grey
    yield "likelihood", model.likelihood, one, f"logistic for {model.shape[2]} channels: categorical has one"
    named = not getattr(model, "embed", False) or grey
    yield "embed", getattr(model, "embed", False), named, f"False for {model.shape[2]} channels: a name has one"


def _shape(model: Any) -> Iterator[Rule]:
    three = len(model.shape) == 3
    yield "shape", model.shape, three, "height, width and channels"
    height, width, channels = model.shape
    sides = 1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE
    yield "shape", model.shape, sides, f"height, width and channels, the sides from 1 to {LARGEST_SIDE}"
    yield "shape", model.shape, channels in (1, 3), "height, width and channels, of which there are 1 or 3"


def _pixelcnn(model: Any) -> Iterator[Rule]:
    yield from _drawn(model)
    yield from _between(model, "features", 1, WIDEST)
    yield from _between(model, "layers", 1, DEEPEST)


def _pixeltransformer(model: Any) -> Iterator[Rule]:
    yield from _drawn(model)
    yield from _between(model, "features", 1, WIDEST)
    yield from _between(model, "layers heads", 1, DEEPEST)
    yield from _heads(model, "features")
    if model.dynamics == "exits":
        yield "layers", model.layers, model.layers >= 2, "at least 2: exits are between them"


def _nextscale(model: Any) -> Iterator[Rule]:
    yield from _drawn(model)
    yield from _between(model, "scales", 2, HALVINGS + 1)
    height, width, _ = model.shape
    fits = 2**model.scales <= min(height, width)
    yield "scales", model.scales, fits, f"so few that the coarsest of {height}x{width} pixels has 2 rows and columns"
    yield from _between(model, "coarse_features features plain", 1, WIDEST)
    yield from _between(model, "coarse_layers", 1, DEEPEST)
    yield from _between(model, "blocks", 0, DEEPEST)
    yield from _between(model, "reach", 0, 64)
    yield from _between(model, "tile", 1, LARGEST_SIDE)


def _vqvae(model: Any) -> Iterator[Rule]:
    yield from _shape(model)
    yield from _between(model, "halvings", 0, HALVINGS)
    (height, width, _), step = model.shape, 2**model.halvings
    whole = height % step == 0 and width % step == 0
    yield "halvings", model.halvings, whole, f"such that {height}x{width} pixels can be halved so often"
    yield from _between(model, "codes", 2, WIDEST)
    yield from _between(model, "code_features features", 1, WIDEST)
    yield from _between(model, "blocks", 0, DEEPEST)
    yield "commitment", model.commitment, 0 <= model.commitment < math.inf, "0 or more"


def _codes(model: Any) -> Iterator[Rule]:
    for part, config in (("vqvae", lambda: model.vqvae), ("prior", lambda: _prior(model))):
        inner = config()  # the prior's is known where the VQ-VAE makes sense
        for name, value, good, wanted in _RULES[inner.family](inner):
            yield f"{part}.{name}", value, good, wanted.replace("--model.", f"--model.{part}.")


def _prior(model: Any) -> ModelConfig:
    """The prior with what it takes from the codes, whatever stands there."""
    step = 2 ** max(0, min(model.vqvae.halvings, HALVINGS))
    grid = (max(1, model.vqvae.shape[0] // step), max(1, model.vqvae.shape[1] // step), 1)
    return dataclasses.replace(model.prior, shape=grid, values=2, likelihood="categorical", embed=True)


_RULES: dict[str, Callable[[Any], Iterator[Rule]]] = {
    "unet": _unet,
    "resnet": _resnet,
    "msdnet": _msdnet,
    "routed": _routed,
    "ranet": _ranet,
    "halting": _halting,
    "moe": _moe,
    "dynamicconvnet": _dynamicconvnet,
    "pixelcnn": _pixelcnn,
    "pixeltransformer": _pixeltransformer,
    "nextscale": _nextscale,
    "vqvae": _vqvae,
    "codes": _codes,
}
