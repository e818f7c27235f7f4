"""Tasks: what is to be predicted, its loss and its scores. A training loop takes any of them."""

from typing import Any

from dynjax import models
from dynjax.config import Config, UserError

__all__ = ["make_task"]


def make_task(config: Config, source: Any, *, training: bool = True) -> Any:
    """The task that belongs to what `source` has to be predicted. Raises UserError where the row's model cannot do it.

    For training, class weights are measured on the source.
    """
    from dynjax.tasks import autoregressive, classification, reconstruction, segmentation

    if models.generates(config.model) or models.reconstructs(config.model):
        if tuple(source.size) != tuple(config.model.shape[:2]):
            height, width = source.size
            raise UserError(
                f"row {config.row} draws pictures of {'x'.join(map(str, config.model.shape[:2]))} and those of "
                f"data.name={config.data.name} are {height}x{width}: give --data.size or --model.shape"
            )
        if models.reconstructs(config.model):
            return reconstruction.ReconstructionTask(config.model.commitment)
        return autoregressive.AutoregressiveTask()
    segments = models.segments(config.model)
    if segments != (source.target == "mask"):
        what = "pictures with masks" if segments else "pictures with one label each"
        raise UserError(
            f"row {config.row} ({config.model.family}) needs {what}; data.name={config.data.name} has a "
            f"{source.target} for each picture"
        )
    spends = None if config.model.dynamics == "static" else config.budget
    classes = tuple(source.classes)
    if not segments:
        return classification.ClassificationTask(classes, config.loss, spends)
    weights = None
    if training and config.loss.class_weights != "none":
        weights = segmentation.class_weights(config.loss.class_weights, segmentation.class_frequencies(source))
    return segmentation.SegmentationTask(len(classes), classes, config.loss, weights, spends)
