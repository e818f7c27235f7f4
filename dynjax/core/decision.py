"""A decision is data: what a gate chose for one input, and what the choice costs.

Letters: B examples, h w tiles, T tokens, K kinds of work on one unit (branches, stages, groups, steps, experts).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from dynjax.core.modules import view

Block = TypeVar("Block")

Place = Literal["example", "tile", "token", "time"]
"""Where a unit lies: (B,), (B, h, w), (B, T) or (B, T). With several kinds of work on a unit there is one more axis."""
AXES: dict[str, int] = {"example": 1, "tile": 3, "token": 2, "time": 2}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What may be chosen of the kinds of work on one unit: `most` of them at once (None: all of them)."""

    name: str
    most: int | None = None


EACH = Rule("each")
"""Each on its own: blocks, groups of channels, paths."""
ONE = Rule("one", 1)
"""One of K, the cheapest first."""
PREFIX = Rule("prefix")
"""The first so many: stages up to an exit, the steps of a recurrence."""
MIXTURE = Rule("mixture")
"""All of them, each counting as much as its probability says."""


def some(k: int) -> Rule:
    """Up to `k` of the K."""
    return Rule("some", k)


@runtime_checkable
class Cost(Protocol):
    """What the kept units cost; a frozen object, which must not depend on the number of examples."""

    def __call__(self, kept: Float[Array, "B kinds"], /) -> Float[Array, " B"]:
        """MACs per example of so many kept units of each kind."""

    @property
    def masked(self) -> float:
        """MACs per example that the masked execution computes, whatever is kept."""

    def full(self, most: int | None, /) -> float:
        """MACs per example with everything kept, of which a unit can take `most` kinds at once (None: all)."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """So many MACs for each kept unit, and never more than for the whole input.

    Both have one value, or one for each kind: `unit` for one kept unit, the border that a tile's window needs included,
    `whole` for the whole input, which is the most that an executor spends and what masked execution always computes.
    """

    unit: tuple[float, ...] = (0.0,)
    whole: tuple[float, ...] = (0.0,)

    def __call__(self, kept: Float[Array, "B kinds"]) -> Float[Array, " B"]:
        spent = kept * jnp.asarray([self.unit], jnp.float32)
        # The executor takes the whole input rather than spend more; open gates must still feel a pull, so the cap has
        # no gradient.
        capped = jnp.minimum(spent, jnp.asarray([self.whole], jnp.float32))
        return (spent + jax.lax.stop_gradient(capped - spent)).sum(1)

    @property
    def masked(self) -> float:
        return sum(self.whole)

    def full(self, most: int | None) -> float:
        return sum(sorted(self.whole, reverse=True)[:most])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decision:
    """What was kept, how probable that was, what it is about, and what it costs.

    `keep` is exactly 0 or 1; when training its gradient is that of the relaxed choice (straight through).
    `probability` is the relaxed choice in [0, 1], differentiable, without noise. `place` says where a unit lies and
    `rule` what may be chosen of the kinds of work on it, which are the last axis where there are several: one-hot for
    one of K; for stages, which of them are run.

    A gate fills these; the wrapper that executes the decision, which takes its own place and rule alone, adds `cost`
    and, where there are tiles, `tile`: their sides as shares of the map's height and width. `excluded` is what the
    decisions inside together count too much where they are in kinds that exclude each other. `folded` is how many of
    its examples, which follow one another, are one of the model's: the frames of a clip, the patches of a picture.
    """

    # Any: in trees of shapes, or while JAX maps over one, the leaves are no arrays.
    keep: Float[Array, "..."] | Any
    probability: Float[Array, "..."] | Any
    place: Place = dataclasses.field(metadata=dict(static=True))
    rule: Rule = dataclasses.field(default=EACH, metadata=dict(static=True))
    cost: Cost = dataclasses.field(default=Linear(), metadata=dict(static=True))
    tile: tuple[float, float] | None = dataclasses.field(default=None, metadata=dict(static=True))
    excluded: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    folded: int = dataclasses.field(default=1, metadata=dict(static=True))

    @property
    def full_macs(self) -> float:
        """MACs per example of the model with everything kept; of kinds that exclude each other, the dearest."""
        return self.folded * self.cost.full(self.rule.most)

    @property
    def masked_macs(self) -> float:
        """MACs per example of the model that the masked execution computes, whatever is kept."""
        return self.folded * self.cost.masked

    def macs(self) -> Float[Array, " B"]:
        """MACs spent per example of the model; the gradient reaches the gate through `keep`."""
        return self.of_model(self.cost(self.units(self.keep).sum(1)))

    def of_model(self, values: Float[Array, "..."]) -> Float[Array, "..."]:
        """Sums of what there is for each example decided about, over those that are one of the model's."""
        return values.reshape(-1, self.folded, *values.shape[1:]).sum(1) if self.folded > 1 else values

    def fold(self, examples: int) -> "Decision":
        """The same, as one about so many examples of a model.

        Raises:
            ValueError: if it is about no multiple of them.
        """
        decided = self.keep.shape[0]
        if decided % examples:
            raise ValueError(f"a decision about {decided} examples is no sum over the {examples} of the model")
        times = decided // examples
        return dataclasses.replace(self, folded=times, excluded=times * self.excluded) if times > 1 else self

    def units(self, chosen: Float[Array, "..."]) -> Float[Array, "B units kinds"]:
        """What is like `keep`, with every place of one example on one axis and the kinds (or 1) on the last."""
        chosen = chosen.astype(jnp.float32)
        chosen = chosen[..., None] if chosen.ndim == AXES[self.place] else chosen
        if chosen.ndim == 2:
            return chosen[:, None]
        # One reshape of one kind, as it must be for examples spread over a mesh of Explicit axes.
        return chosen.reshape(chosen.shape[0], math.prod(chosen.shape[1:-1]), chosen.shape[-1])

    def kept(self) -> Float[Array, ""]:
        """Share of the units kept; where kinds exclude each other, of those that took another than the first."""
        keep = self.units(self.keep)
        return keep.mean() if self.rule.most is None else keep.max(-1).mean() - keep[..., 0].mean()


class Decisions(nnx.Variable):
    """The nnx collection in which wrappers sow their decisions; `traced` captures it."""


INSIDE = (
    "decides inside a function that JAX transforms (scan, fori_loop, while_loop, vmap, cond, switch, checkpoint, jit, "
    "grad), and its decision does not come out of it, so the trace would call it static: write the loop in Python, or "
    "give the module to nnx.remat or nnx.jit as an argument, which carry decisions out"
)

_made: contextvars.ContextVar[list[tuple[str, Any]] | None] = contextvars.ContextVar("made", default=None)
"""What was recorded while the innermost trace is taken: the module's name, and the decision's likeness."""
_paths: contextvars.ContextVar[dict[int, tuple[str, str]]] = contextvars.ContextVar("paths", default={})  # noqa: B039
"""Path and kind of the modules that are traced, by their identity."""


def tracing(module: nnx.Module) -> bool:
    """Whether a trace is being taken of the module, so that what it records comes out."""
    return "__captures__" in vars(module)


def record(module: nnx.Module, decision: Decision) -> None:
    """Sow `decision` under `module`'s path; does nothing unless a trace is being taken.

    Raises:
        ValueError: inside a function that JAX transforms, which the decision cannot leave.
    """
    if not tracing(module):
        return
    name = _named(module)
    try:
        for captured in vars(module)["__captures__"]:
            captured.set_value(captured.get_value())
    except TraceContextError as error:
        raise ValueError(f"{name} {INSIDE}") from error
    made = _made.get()
    if made is not None:
        made.append((name, _likeness(decision)))
    module.sow(Decisions, "decision", decision)


@contextlib.contextmanager
def coming_out() -> Iterator[None]:
    """Where decisions are outputs of what is transformed, they are not lost, though they have other shapes inside."""
    token = _made.set(None)
    try:
        yield
    finally:
        _made.reset(token)


def _named(module: nnx.Module) -> str:
    """Kind and path of a module; of what nnx.scan and the like made of one, the paths where it may have been."""
    kind, known = type(module).__name__, _paths.get()
    if id(module) in known:
        return f"{kind} at {known[id(module)][0] or 'the top'!r}"
    paths = [path for path, other in known.values() if other == kind]
    return f"{kind} at {' or '.join(map(repr, paths[:3])) or 'an unknown path'}"


def unseen(block: Block) -> Block:
    """`block` as an executor's loop runs it, or as it is only looked at: no trace is taken inside."""
    if not isinstance(block, nnx.Module) or not any(tracing(m) for _, m in nnx.iter_modules(block)):
        return block
    block = view(block)
    for _, module in nnx.iter_modules(block):
        if tracing(module):
            delattr(module, "__captures__")
    return block


def captured(
    kind: type[nnx.Variable], run: Callable, module: nnx.Module, /, *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """What `run(module, ...)` gives, and what was sown as `kind`, by the path of its module ("a/b#1": its second)."""
    # A view shares the variables but is made of new modules: capturing writes to modules, which those of an outer
    # trace refuse.
    outer = _paths.get().get(id(module), ("", ""))[0]
    module = view(module)

    def call(module: nnx.Module, /, *args: Any, **kwargs: Any) -> Any:
        own = {}
        for path, each in nnx.iter_modules(module):
            own[id(each)] = "/".join(map(str, (*filter(None, [outer]), *path))), type(each).__name__
            if isinstance(each, nnx.List | nnx.bridge.ToNNX) and tracing(each):
                # Flax 0.12.8 captures on lists too. They sow nothing, and a name among their numbers cannot be
                # sorted, which nnx.split and nnx.view do; a bridged Linen module takes it for a collection.
                delattr(each, "__captures__")
        token = _paths.set(own)
        try:
            return run(module, *args, **kwargs)
        finally:
            _paths.reset(token)

    output, state = nnx.capture(call, kind)(module, *args, **kwargs)
    found: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        calls = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        name = "/".join(map(str, path[:-1]))
        found |= {name if not number else f"{name}#{number}": each for number, each in enumerate(calls)}
    return output, found


def seen(run: Callable, module: nnx.Module, /, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Decision]]:
    """What `run(module, ...)` gives, and the decisions taken in it by the path of their module ("a/b#1": its second).

    Raises:
        ValueError: for a decision inside a function that JAX transforms, out of which it does not come.
    """
    made: list[tuple[str, Any]] = []
    token = _made.set(made)
    try:
        output, decisions = captured(Decisions, run, module, *args, **kwargs)
    finally:
        _made.reset(token)
    # nnx.scan and the like merge copies of modules, on which decisions are recorded and lost.
    lost = Counter(likeness for _, likeness in made) - Counter(map(_likeness, decisions.values()))
    for kind, likeness in made:
        if likeness in lost:
            jax.clear_caches()  # a second call must not find the loop compiled, and pass
            raise ValueError(f"{kind} {INSIDE}")
    return output, decisions


def record_inside(module: nnx.Module, decisions: Mapping[str, Decision]) -> None:
    """Record decisions of modules of `module`, which `seen` named."""
    modules = {"/".join(map(str, path)): each for path, each in nnx.iter_modules(module)}
    for path, decision in decisions.items():
        record(modules[path.split("#")[0]], decision)


def _likeness(decision: Decision) -> tuple:
    """What tells decisions apart without a look at their values."""
    return decision.place, decision.rule, decision.keep.shape, decision.cost
