"""Tasks: what is to be predicted, its loss and its scores. A training loop takes any of them."""

import dataclasses
from collections.abc import Callable

from dynjax import models
from dynjax.config import BudgetConfig, Config, UserError, VQVAEConfig
from dynjax.data.source import Source, size_of, target_of
from dynjax.tasks.autoregressive import AutoregressiveTask
from dynjax.tasks.classification import ClassificationTask
from dynjax.tasks.reconstruction import ReconstructionTask
from dynjax.tasks.segmentation import SegmentationTask, class_frequencies, class_weights
from dynjax.tasks.task import Batch, Player, Shown, Task

__all__ = ["TASKS", "USES", "Batch", "Player", "Shown", "Task", "make_task", "refuse_unused"]


def _task_of(config: Config) -> str:
    """The name of the task that the row's model is for."""
    if models.reconstructs(config.model):
        return "reconstruction"
    if models.generates(config.model):
        return "autoregressive"
    return "segmentation" if models.segments(config.model) else "classification"


USES = {
    "autoregressive": frozenset[str](),
    "classification": frozenset({"loss.cross_entropy", "loss.label_smoothing"}),
    "reconstruction": frozenset[str](),
    "segmentation": frozenset({"loss.cross_entropy", "loss.dice", "loss.class_weights", "loss.label_smoothing"}),
}
"""Options of the loss that a task looks at whatever the model, by its name. May be added to."""


def _uses(config: Config) -> frozenset[str]:
    """Options of the loss and the budget that training and its evaluation look at, such as loss.dice."""
    model, task = config.model, _task_of(config)
    used = set(USES.get(task, ()))
    # Mixed kernels skip nothing.
    if task in ("reconstruction", "autoregressive") or model.dynamics == "static" or model.family == "dynamicconvnet":
        return frozenset(used)
    used |= {"budget.target", "budget.sampled", "budget.weight"}
    if model.dynamics == "pondernet" and model.gate == "learned":
        used |= {"loss.ponder"}
    if model.dynamics == "reinforce":
        used |= {"loss.reinforce", "loss.wrong"}
    if (model.family, model.dynamics) in (("unet", "select"), ("resnet", "slices"), ("moe", "experts")):
        used |= {"loss.load_balance"}
    if model.family == "moe" and model.gate == "learned":
        used |= {"loss.router_z"}
    # Exits and PonderNet are trained on every output whatever they cost; of REINFORCE the reward says what blocks cost.
    by_budget = model.dynamics not in ("exits", "reinforce") and "loss.ponder" not in used
    return frozenset(used if by_budget else used - {"budget.weight"})


def refuse_unused(config: Config) -> None:
    """Raises UserError for an option of the loss or the budget that is set, and that nothing of the row looks at."""
    used = _uses(config)
    for part in ("loss", "budget"):
        own = getattr(config, part)
        for field in dataclasses.fields(own):
            name, value = f"{part}.{field.name}", getattr(own, field.name)
            if name not in used and value != field.default:
                what = f"{config.model.family}, {config.model.dynamics}"
                raise UserError(
                    f"--{name.replace('_', '-')} {value}: row {config.row} ({what}) does not use it; leave it out"
                )


def make_task(config: Config, source: Source, *, training: bool = True) -> Task:
    """The task that the row's model is for. Raises UserError where `source` does not fit it.

    For training, a source of classes must have two, in its names and in its masks or labels, and class weights are
    measured on it.
    """
    return TASKS[_task_of(config)](config, source, training)


def _autoregressive(config: Config, source: Source, training: bool) -> Task:
    _check_size(config, source)
    return AutoregressiveTask()


def _reconstruction(config: Config, source: Source, training: bool) -> Task:
    _check_size(config, source)
    assert isinstance(config.model, VQVAEConfig)
    return ReconstructionTask(config.model.commitment)


def _classification(config: Config, source: Source, training: bool) -> Task:
    _check_target(config, source, "label", "pictures with one label each", training)
    return ClassificationTask(tuple(source.classes), config.loss, _spends(config))


def _segmentation(config: Config, source: Source, training: bool) -> Task:
    _check_target(config, source, "mask", "pictures with masks", training)
    classes, kind = tuple(source.classes), config.loss.class_weights
    weights = class_weights(kind, class_frequencies(source)) if training and kind != "none" else None
    return SegmentationTask(len(classes), classes, config.loss, weights, _spends(config))


TASKS: dict[str, Callable[[Config, Source, bool], Task]] = {
    "autoregressive": _autoregressive,
    "classification": _classification,
    "reconstruction": _reconstruction,
    "segmentation": _segmentation,
}
"""By the name that a model's family gives, from the row, a source and whether it is for training. May be added to."""


def _spends(config: Config) -> BudgetConfig | None:
    return None if models.static_twin(config.model) == config.model else config.budget


def _check_size(config: Config, source: Source) -> None:
    """Raises UserError where pictures have another size than those that the model draws."""
    model = config.model
    assert models.generates(model) or models.reconstructs(model)
    if (size := size_of(source)) != tuple(model.shape[:2]):
        height, width = size
        raise UserError(
            f"row {config.row} draws pictures of {'x'.join(map(str, model.shape[:2]))} and those of "
            f"data.name={config.data.name} are {height}x{width}: give --data.size or --model.shape"
        )


def _check_target(config: Config, source: Source, target: str, what: str, training: bool) -> None:
    """One class alone is learnt to 100% by any model. Raises UserError."""
    found = source.spec[target_of(source.spec)]
    if found.role != target:
        raise UserError(
            f"row {config.row} ({config.model.family}) needs {what}; data.name={config.data.name} has a "
            f"{found.role} for each picture"
        )
    if not training:
        return
    names, seen = tuple(source.classes), source.seen
    if len(names) < 2:
        what = f"one class alone, {names[0]}" if names else "no class"
    elif seen is not None and len(seen) < 2:
        what = f"{len(names)} classes, of which only {names[min(seen)]} occurs in its {found.role}s"
        if found.ignored is not None:
            what += f" ({found.ignored} marks ignored pixels)"
    else:
        return
    raise UserError(
        f"row {config.row} tells classes apart; data.name={config.data.name}, {source.split}, has {what}: "
        "there must be at least 2"
    )
