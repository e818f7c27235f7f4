"""Tasks: what is to be predicted, its loss and its scores. A training loop takes any of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from dynjax import models
from dynjax.config import BudgetConfig, Config, LossConfig, UserError
from dynjax.data import few
from dynjax.data.source import Source, input_of, size_of, target_of
from dynjax.models.gan import GanConfig
from dynjax.models.vae import VAEConfig
from dynjax.models.vqvae import VQVAEConfig
from dynjax.tasks.adversarial import AdversarialTask
from dynjax.tasks.autoregressive import AutoregressiveTask
from dynjax.tasks.classification import ClassificationTask
from dynjax.tasks.consistency import ConsistentTask
from dynjax.tasks.features import make_extractor, reference
from dynjax.tasks.reconstruction import ReconstructionTask
from dynjax.tasks.segmentation import SegmentationTask, class_frequencies, class_weights
from dynjax.tasks.task import Batch, Player, Shown, Task
from dynjax.tasks.variational import VariationalTask

__all__ = ["Batch", "Player", "Shown", "Task", "make_task", "refuse_unused", "register"]


@runtime_checkable
class OfShape(Protocol):
    """The configuration of a model of pictures of one shape (H, W, C)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...


Make: TypeAlias = Callable[[Config, Source, bool], Task]
"""Makes the task of a row from a source of its data, for training or only to evaluate. Raises UserError."""

OF_FEATURES = frozenset({"features", "features_path"})
"""Options of a row by whose features pictures are compared."""

_TASKS: dict[str, tuple[Make, frozenset[str]]] = {}


def register(name: str, make: Make, uses: frozenset[str] = frozenset()) -> None:
    """Give tasks a name, which families of models have as their `task`; `uses` names the options of the loss that it
    looks at, such as "loss.dice", whatever the model."""
    _TASKS[name] = make, uses


def refuse_unused(config: Config) -> None:
    """Raises UserError for an option of the loss or the budget that is set, and that nothing of the row looks at, and
    for a row whose losses all have weight 0."""
    used = _kind(config)[1] | models.uses(config.model)
    if not config.loss.consistency:
        used -= {"loss.confidence"}
    options: dict[str, tuple[dataclasses.Field, Any]] = {}
    options |= {f"loss.{field.name}": (field, config.loss) for field in dataclasses.fields(config.loss)}
    options |= {f"budget.{field.name}": (field, config.budget) for field in dataclasses.fields(config.budget)}
    options |= {field.name: (field, config) for field in dataclasses.fields(config) if field.name in OF_FEATURES}
    for name, (field, own) in options.items():
        value = vars(own)[field.name]
        if name not in used and value != field.default:
            row = f"row {config.row} ({models.describe(config.model)})"
            raise UserError(f"--{name.replace('_', '-')} {value}: {row} does not use it; leave it out")
    if "loss.tags" in used:
        _refuse_by_labels(config)
    if config.loss.tags:
        return
    # A policy may learn by itself, from its reward.
    terms = [name for name in ("loss.cross_entropy", *sorted(_OF_PIXELS), "loss.reinforce") if name in used]
    if "loss.cross_entropy" in used and not any(_option(config, name) for name in terms):
        told = ", ".join(f"--{name.replace('_', '-')}" for name in terms)
        raise UserError(
            f"row {config.row} has nothing to learn from: {told} {'is' if len(terms) == 1 else 'are all'} 0"
        )


def _refuse_by_labels(config: Config) -> None:
    """Raises UserError where a loss of segmentation wants other labels than the data have."""
    data, loss = config.data, config.loss
    if loss.consistency and not data.labelled and data.weak == "full":
        raise UserError(
            f"--loss.consistency {loss.consistency} learns from pictures without labels, and all have theirs: give "
            "--data.labelled, such as 1/8, or --data.weak points"
        )
    if data.weak != "tags":
        if loss.tags:
            raise UserError(f"--loss.tags {loss.tags} is for --data.weak tags, not {data.weak}; leave it out")
        return
    wants = [name for name in ("loss.cross_entropy", *sorted(_OF_PIXELS)) if _option(config, name)]
    if wants or loss.class_weights != "none" or not loss.tags:
        zero = "".join(f" --{name.replace('_', '-')} 0" for name in wants)
        none = " --loss.class-weights none" * (loss.class_weights != "none")
        raise UserError(
            f"--data.weak tags says of no pixel what it is: give --loss.tags {loss.tags or 1.0}{zero}{none}"
        )


def _option(config: Config, name: str) -> Any:
    """The value of an option of the loss, "loss.x"."""
    return vars(config.loss)[name.removeprefix("loss.")]


def make_task(config: Config, source: Source, *, training: bool = True) -> Task:
    """The task that the row's model is for. Raises UserError where `source` does not fit it.

    For training, a source of classes must have two, in its names and in its masks or labels, and class weights are
    measured on it.
    """
    return _kind(config)[0](config, source, training)


def _kind(config: Config) -> tuple[Make, frozenset[str]]:
    name = models.task_of(config.model)
    if name not in _TASKS:
        raise UserError(f"row {config.row}: task {name!r} is not registered: there are {', '.join(sorted(_TASKS))}")
    return _TASKS[name]


def _autoregressive(config: Config, source: Source, training: bool) -> Task:
    _check_size(config, source)
    return AutoregressiveTask()


def _reconstruction(config: Config, source: Source, training: bool) -> Task:
    _check_size(config, source)
    assert isinstance(config.model, VQVAEConfig)
    return ReconstructionTask(config.model.commitment)


def _adversarial(config: Config, source: Source, training: bool) -> Task:
    from dynjax.data import make_source

    _check_size(config, source)
    model = config.model
    assert isinstance(model, GanConfig)
    train = source if source.split == "train" else make_source(config.data, "train")
    judged = make_source(config.data, "val") if training else source
    extractor = make_extractor(config.features, train, config.features_path)
    # What kernels and sizes cost is not steered.
    spends = config.budget if models.uses(model) else None
    return AdversarialTask(config.loss, model.dynamics, extractor, reference(extractor, judged), spends)


def _variational(config: Config, source: Source, training: bool) -> Task:
    _check_size(config, source)
    assert isinstance(config.model, VAEConfig)
    return VariationalTask(config.model.beta, config.model.free_bits, _spends(config))


def _classification(config: Config, source: Source, training: bool) -> Task:
    _check_target(config, source, "label", "pictures with one label each", training)
    return ClassificationTask(tuple(source.classes), config.loss, _spends(config), input_of(source.spec))


def _segmentation(config: Config, source: Source, training: bool) -> Task:
    _check_target(config, source, "mask", "pictures with masks", training)
    classes, kind = tuple(source.classes), config.loss.class_weights
    weights = None
    if training and kind != "none":
        try:
            weights = class_weights(kind, class_frequencies(few.marked_of(source)))
        except ValueError as error:
            raise UserError(f"{source.describe()}: {error}; --loss.class-weights none does without") from None
    make = ConsistentTask if training and config.loss.consistency else SegmentationTask
    return make(classes, config.loss, weights, _spends(config))


_OF_CLASSES = frozenset({"loss.cross_entropy", "loss.label_smoothing"})
_OF_PIXELS = frozenset({"loss.dice", "loss.focal", "loss.lovasz", "loss.boundary", "loss.one_vs_all"})
_OF_FEW = frozenset({"loss.tags", "loss.consistency", "loss.confidence"})
_OF_PLAYERS = OF_FEATURES | {"loss.adversarial", "loss.gradient_penalty", "loss.augment", "loss.distillation"}
register("adversarial", _adversarial, _OF_PLAYERS)
register("autoregressive", _autoregressive)
register("classification", _classification, _OF_CLASSES)
register("reconstruction", _reconstruction)
register("variational", _variational)
register("segmentation", _segmentation, _OF_CLASSES | _OF_PIXELS | _OF_FEW | {"loss.class_weights"})


def _spends(config: Config) -> BudgetConfig | None:
    return None if models.is_static(config.model) else config.budget


def _check_size(config: Config, source: Source) -> None:
    """Raises UserError where pictures have another size than those that the model draws."""
    assert isinstance(config.model, OfShape)
    (height, width), shape = size_of(source), config.model.shape
    if (height, width) != tuple(shape[:2]):
        raise UserError(
            f"row {config.row} draws pictures of {'x'.join(map(str, shape[:2]))} and those of "
            f"data.name={config.data.name} are {height}x{width}: give --data.size or --model.shape"
        )


def _check_target(config: Config, source: Source, role: str, what: str, training: bool) -> None:
    """One class alone is learnt to 100% by any model. Raises UserError."""
    field = source.spec[target_of(source.spec)]
    if field.role != role:
        raise UserError(
            f"row {config.row} ({config.model.family}) needs {what}; data.name={config.data.name} has a "
            f"{field.role} for each picture"
        )
    if not training:
        return
    names, seen = tuple(source.classes), source.seen
    if len(names) < 2:
        what = f"one class alone, {names[0]}" if names else "no class"
    elif seen is not None and len(seen) < 2:
        what = f"{len(names)} classes, of which only {names[min(seen)]} occurs in its {role}s"
        if field.ignored is not None:
            what += f" ({field.ignored} marks ignored pixels)"
        if config.data.name == "folder" and config.data.masks == "ids" and role == "mask":
            what += "; masks of 0 and 255 for two classes are --data.masks binary"
    else:
        return
    raise UserError(
        f"row {config.row} tells classes apart; data.name={config.data.name}, {source.split}, has {what}: "
        "there must be at least 2"
    )
