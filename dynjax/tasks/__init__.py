"""Tasks: what is to be predicted, its loss and its scores. A training loop takes any of them."""

import dataclasses
import types
from typing import Any

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.data.source import Source, size_of, target_of

__all__ = ["make_task", "refuse_unused"]


def refuse_unused(config: Config) -> None:
    """Raises UserError for an option of the loss or the budget that is set, and that nothing of the row looks at."""
    from dynjax.tasks import autoregressive, classification, reconstruction, segmentation

    parts: dict[str, types.ModuleType] = dict(
        autoregressive=autoregressive,
        classification=classification,
        reconstruction=reconstruction,
        segmentation=segmentation,
    )
    used = parts[models.task_of(config.model)].USES | models.uses(config.model)
    for part in ("loss", "budget"):
        own = getattr(config, part)
        for field in dataclasses.fields(own):
            name, value = f"{part}.{field.name}", getattr(own, field.name)
            if name not in used and value != field.default:
                row = f"row {config.row} ({models.describe(config.model)})"
                raise UserError(f"--{name.replace('_', '-')} {value}: {row} does not use it; leave it out")


def make_task(config: Config, source: Source, *, training: bool = True) -> Any:
    """The task that belongs to what `source` has to be predicted. Raises UserError where the row's model cannot do it.

    For training, the source must have two classes, in its names and in its masks or labels, and class weights are
    measured on it.
    """
    from dynjax.tasks import autoregressive, classification, reconstruction, segmentation

    name = models.task_of(config.model)
    if name in ("autoregressive", "reconstruction"):
        if (size := size_of(source)) != tuple(config.model.shape[:2]):
            height, width = size
            raise UserError(
                f"row {config.row} draws pictures of {'x'.join(map(str, config.model.shape[:2]))} and those of "
                f"data.name={config.data.name} are {height}x{width}: give --data.size or --model.shape"
            )
        if name == "reconstruction":
            return reconstruction.ReconstructionTask(config.model.commitment)
        return autoregressive.AutoregressiveTask()
    segments = name == "segmentation"
    role = source.spec[target_of(source.spec)].role
    if segments != (role == "mask"):
        what = "pictures with masks" if segments else "pictures with one label each"
        raise UserError(
            f"row {config.row} ({config.model.family}) needs {what}; data.name={config.data.name} has a "
            f"{role} for each picture"
        )
    if training:
        _check_classes(config, source)
    spends = None if models.is_static(config.model) else config.budget
    classes = tuple(source.classes)
    if not segments:
        return classification.ClassificationTask(classes, config.loss, spends)
    weights = None
    if training and config.loss.class_weights != "none":
        weights = segmentation.class_weights(config.loss.class_weights, segmentation.class_frequencies(source))
    return segmentation.SegmentationTask(len(classes), classes, config.loss, weights, spends)


def _check_classes(config: Config, source: Source) -> None:
    """One class alone is learnt to 100% by any model. Raises UserError."""
    names, seen, target = tuple(source.classes), source.seen, source.spec[target_of(source.spec)]
    if len(names) < 2:
        what = f"one class alone, {names[0]}" if names else "no class"
    elif seen is not None and len(seen) < 2:
        what = f"{len(names)} classes, of which only {names[min(seen)]} occurs in its {target.role}s"
        if target.ignored is not None:
            what += f" ({target.ignored} marks ignored pixels)"
    else:
        return
    raise UserError(
        f"row {config.row} tells classes apart; data.name={config.data.name}, {source.split}, has {what}: "
        "there must be at least 2"
    )
