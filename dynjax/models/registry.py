"""Which families of models there are, and what each says of itself. A family is registered by its own file."""

import collections
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from flax import nnx

from dynjax.config import ModelConfig, UserError
from dynjax.core import convolve
from dynjax.models import rules
from dynjax.models.frozen import TRAINED
from dynjax.models.rules import Range, Rule

C = TypeVar("C", bound=ModelConfig)
Module = TypeVar("Module", bound=nnx.Module)

BUDGET = frozenset({"budget.target", "budget.sampled", "budget.weight"})
"""Options that a family uses whose gates are trained under a budget."""
SOLVED = BUDGET - {"budget.weight"}
"""Of one that is trained whatever it costs, such as one with exits: thresholds are solved for a budget afterwards."""


def without_dynamics(config: C) -> C:
    """Of configurations that have fields `dynamics` and `gate` where there are any."""
    fields = {"dynamics": "static", "gate": "learned"}
    return dataclasses.replace(config, **{name: fields[name] for name in fields.keys() & vars(config)})


@dataclasses.dataclass(frozen=True)
class Family(Generic[C]):
    """A family of models, known by the `family` of its configuration; or a part of one, such as a backbone."""

    config: Callable[..., C]
    """The class of its configurations: a frozen dataclass, whose field `family` has the name as default."""
    build: Callable[..., nnx.Module]
    """`(config, classes, *, rngs, twin_params=None)`: the model, with the variables of a static twin where given."""
    task: str | Callable[[C], str] = "classification"
    """Name of the task that it is for (see `dynjax.tasks`)."""
    tiny: Mapping[str, object] | Callable[[C], Mapping[str, object]] = dataclasses.field(default_factory=dict)
    """Fields of its smallest form, which trains in seconds."""
    rules: Callable[..., Iterator[Rule]] = lambda *_: iter(())
    """`(config)`: which values make sense."""
    uses: frozenset[str] | Callable[[C], frozenset[str]] = frozenset()
    """Options that its training looks at, unless it is static, beside those of its task: "budget.target"."""
    dynamics: Callable[[C], str] = lambda config: vars(config).get("dynamics", "static")
    """What is dynamic in it, in a word; "static": nothing."""
    twin: Callable[[C], C] = without_dynamics
    """Configuration of the same net without dynamics."""
    apart: tuple[str, ...] = ()
    """Fields that the twin's weights do not depend on, beside `dynamics` and `gate`."""
    base: Callable[[C], ModelConfig] = lambda config: config
    """Configuration of the model that it takes its first weights from, but for dynamics."""
    weights: Callable[[C], str] = lambda config: vars(config).get("weights", "")
    """Weights that were trained elsewhere and that training begins with, as an option has them; empty: none."""
    begin: Callable[[C, Any], None] = lambda config, model: None
    """`(config, model)`: put these into the new static model, in place."""


OPEN: dict[type, dict[str, Family]] = collections.defaultdict(dict)
"""Of each interface of configurations the families that are registered for it, by name."""
FAMILIES = OPEN[ModelConfig]
"""Of whole models."""


def register(family: Family[C], interface: type = ModelConfig) -> Family[C]:
    """Make a family known: rows and files may name it from now on. Raises ValueError where another one has its name."""
    name = vars(family.config)["family"]
    other = OPEN[interface].get(name)
    if other is not None and other.config.__qualname__ != family.config.__qualname__:
        raise ValueError(f"family {name!r} is already that of {other.config.__qualname__}: give it another name")
    OPEN[interface][name] = family
    return family


def family_of(config: ModelConfig) -> Family:
    """Raises UserError where nobody registered the family."""
    for families in OPEN.values():
        if (found := families.get(config.family)) is not None and found.config is type(config):
            return found
    raise UserError(f"model.family {config.family} ({type(config).__name__}) is not registered: import its file")


def build(config: ModelConfig, classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The model of `config`, with the variables of a static twin under the wrappers if these are given.

    Raises UserError for a configuration that makes no sense.
    """
    check(config)
    return convolve.by_platform(family_of(config).build(config, classes, rngs=rngs, twin_params=twin_params))


def pretrained(config: ModelConfig) -> bool:
    """Whether training begins with weights that were trained elsewhere."""
    return bool(family_of(config).weights(config))


def beginning(config: ModelConfig, classes: int, *, rngs: nnx.Rngs) -> nnx.State | None:
    """Variables of the static twin, with weights that were trained elsewhere; None where the configuration wants none.

    Raises UserError where these are not there or do not fit.
    """
    twin = static_twin(config)
    if not pretrained(twin):
        return None
    model = build(twin, classes, rngs=rngs)
    family_of(twin).begin(twin, model)
    return nnx.state(model, TRAINED)


def filled(model: Module, twin_params: nnx.State | None) -> Module:
    """`model` itself, with the variables of a static twin where there are any."""
    if twin_params is not None:
        nnx.update(model, twin_params)
    return model


def built_by(model: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """`Family.build` of a model that `model(config, classes, rngs=rngs)` makes whatever is dynamic in it."""

    def build(config: C, classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
        return filled(model(config, classes, rngs=rngs), twin_params)

    return build


def task_of(config: ModelConfig) -> str:
    """Name of the task that the model is for."""
    task = family_of(config).task
    return task if isinstance(task, str) else task(config)


def uses(config: ModelConfig) -> frozenset[str]:
    """Options "loss.x" and "budget.x" that the model's training looks at, beside those of its task."""
    found = family_of(config).uses
    return frozenset() if vars(config).get("dynamics") == "static" else found(config) if callable(found) else found


def dynamics_of(config: ModelConfig) -> str:
    """What is dynamic in the model, in a word; "static" where nothing is."""
    return family_of(config).dynamics(config)


def describe(config: ModelConfig) -> str:
    return f"{config.family}, {dynamics_of(config)}"


def is_static(config: ModelConfig) -> bool:
    return dynamics_of(config) == "static"


def static_twin(config: C) -> C:
    """The same net without dynamics."""
    return family_of(config).twin(config)


def tiny(config: C) -> C:
    """The model in its smallest form, with the same dynamics."""
    fields = family_of(config).tiny
    return dataclasses.replace(config, **(fields(config) if callable(fields) else fields))


def base_of(config: ModelConfig) -> ModelConfig:
    """The model that this one must start from, if that is another one; else `config` itself."""
    return family_of(config).base(config)


def difference(there: ModelConfig, here: ModelConfig, option: str = "model") -> str:
    """Why two configurations have no static twin in common, in words; empty where they have."""
    here = base_of(here)
    if type(there) is not type(here):
        return f"{option}.family is {there.family} there and {here.family} here"
    apart = ("dynamics", "gate", *family_of(here).apart)
    for field in dataclasses.fields(here):
        theirs, ours = getattr(there, field.name), getattr(here, field.name)
        if theirs == ours or field.name in apart:
            continue
        if not (isinstance(theirs, ModelConfig) and isinstance(ours, ModelConfig)):
            return f"{option}.{field.name} is {theirs} there and {ours} here"
        if found := difference(theirs, ours, f"{option}.{field.name}"):
            return found
    return ""


def check(config: ModelConfig, option: str = "model.") -> None:
    """Raises UserError naming, as its option, the first field whose value makes no sense.

    Options that fit each other may still make no network: then `build` says so.
    """
    rules.refuse(_choices(config, ""), option)
    rules.refuse(rules_of(config), option)


def rules_of(config: ModelConfig, *others: ModelConfig) -> Iterator[Rule]:
    """The rules of the configuration's family, and of a part those that tie it to other parts."""
    gate = vars(config).get("gate")
    controls = gate != "random" or vars(config).get("dynamics") != "static"
    yield Rule("gate", gate, controls, "learned: random is a control of dynamics, and there are none")
    yield from family_of(config).rules(config, *others)


def _choices(config: ModelConfig, prefix: str) -> Iterator[Rule]:
    """Fields that are one of a few names, or in a range, also of configurations within."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value, hint = prefix + field.name, getattr(config, field.name), hints[field.name]
        yield from (each.rule(name, value) for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range))
        if typing.get_origin(hint) is typing.Literal:
            names = typing.get_args(hint)
            yield Rule(name, value, value in names, " or ".join(map(str, names)))
        elif isinstance(value, ModelConfig):
            yield from _choices(value, f"{name}.")


def kind_of(config: object) -> type | types.GenericAlias:
    """The type of a configuration, in which the types of its parts are put: Config[ResNetConfig]."""
    kind, hints = type(config), typing.get_type_hints(type(config))
    parts = [name for name, hint in hints.items() if isinstance(hint, TypeVar)]
    return types.GenericAlias(kind, tuple(kind_of(getattr(config, name)) for name in parts)) if parts else kind
