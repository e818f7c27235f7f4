"""What the fields of a configuration may be, so that a wrong value is one line; those of models stand with each family.

What ties a model to its data (classes, the size of pictures) is checked where both are known: see `dynjax.tasks`.
"""

import math
from collections.abc import Iterator

from dynjax import models
from dynjax.config import Config
from dynjax.data import few
from dynjax.models.rules import LARGEST_SIDE, Rule, refuse


def check_config(config: Config) -> None:
    """Raises UserError naming, as its option, the first field whose value makes no sense."""
    refuse((Rule(*each) for each in _general(config)), "")
    models.check(config.model)


def _general(config: Config) -> Iterator[tuple[str, object, bool, str]]:
    loss, o = config.loss, config.optimizer
    yield "steps", config.steps, config.steps >= 1, "at least 1"
    yield "steps", config.steps, config.steps < 2**31, "less than 2147483648"
    yield "batch_size", config.batch_size, config.batch_size >= 1, "at least 1"
    yield "seed", config.seed, config.seed >= 0, "0 or more"
    yield "seed", config.seed, config.seed < 2**32, "less than 4294967296"
    yield "checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 1, "at least 1"
    yield "evaluate_every", config.evaluate_every, config.evaluate_every >= 0, "0 (only at the end) or more"
    for name, size in (("size", config.data.size), ("crop", config.data.crop)):
        sides = size is None or (len(size) == 2 and all(1 <= side <= LARGEST_SIDE for side in size))
        yield f"data.{name}", size, sides, f"height and width in pixels, each from 1 to {LARGEST_SIDE}"
    yield (
        "data.labelled",
        config.data.labelled,
        not config.data.labelled or few.is_wanted(config.data.labelled),
        few.WANTED,
    )
    yield "budget.target", config.budget.target, 0 < config.budget.target <= 1, "a share of the MACs in (0, 1]"
    yield "budget.weight", config.budget.weight, 0 <= config.budget.weight < math.inf, "0 or more"
    for name in (
        *("cross_entropy", "dice", "focal", "lovasz", "boundary", "one_vs_all", "tags", "consistency"),
        *("load_balance", "router_z", "presence", "ponder", "reinforce", "wrong", "gradient_penalty", "distillation"),
    ):
        yield f"loss.{name}", getattr(loss, name), 0 <= getattr(loss, name) < math.inf, "0 or more"
    yield "loss.confidence", loss.confidence, 0 <= loss.confidence <= 1, "in [0, 1]"
    yield "loss.label_smoothing", loss.label_smoothing, 0 <= loss.label_smoothing < 1, "in [0, 1)"
    yield "optimizer.learning_rate", o.learning_rate, 0 < o.learning_rate < math.inf, "more than 0"
    yield "optimizer.gate_learning_rate", o.gate_learning_rate, 0 <= o.gate_learning_rate < math.inf, "0 or more"
    yield "optimizer.warmup", o.warmup, 0 <= o.warmup <= 1, "a share of the steps in [0, 1]"
    yield "optimizer.weight_decay", o.weight_decay, 0 <= o.weight_decay < math.inf, "0 or more"
    yield "optimizer.clip", o.clip, o.clip > 0, "more than 0 (inf turns it off)"
    yield "optimizer.ema", o.ema, 0 <= o.ema < 1, "in [0, 1)"
    yield "optimizer.momentum", o.momentum, 0 <= o.momentum < 1, "in [0, 1)"
    yield "optimizer.decay", o.decay, 0 <= o.decay < 1, "in [0, 1)"
    yield "loss.augment", loss.augment, 0 <= loss.augment <= 1, "in [0, 1]"
    yield "optimizer.accumulate", o.accumulate, o.accumulate >= 1, "at least 1"
