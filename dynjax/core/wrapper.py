"""What every wrapper does: how it is run, which decisions it takes, what they cost, and what is decided inside of it.

Letters: B examples, K kinds.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeGuard, cast, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import cost, execute, views
from dynjax.core.arguments import Size, Tree, bind, called, first, name_of, trains
from dynjax.core.decision import Block, Decision, Linear, Place, Rule, record, record_inside, seen, tracing, unseen
from dynjax.core.execute import Execution, Strategy
from dynjax.core.receptive import window_macs


class Wrapper(nnx.Module):
    """A module that carries decisions out: the abstract base of all of them."""

    execution: Execution = "masked"
    strategy: Strategy = "auto"
    deterministic: bool = False
    gate: Any = None
    """What decides, from the input to a decision; None where the wrapper decides by itself."""
    batched: Collection[int | str] | None = None
    by_hand: ClassVar[str] = ""
    """What to write in a call of `dynamize` where the class alone does not say enough."""

    def set_view(
        self,
        execution: str | None = None,
        strategy: str | None = None,
        deterministic: bool | None = None,
        use_running_average: bool | None = None,
    ) -> None:
        # The last is for the blocks alone; named here, since nnx.view refuses names that no module has.
        if execution is not None:
            if execution not in get_args(Execution):
                raise ValueError(f"execution={execution!r} must be 'masked' or 'compact'")
            self.execution = cast(Execution, execution)
        if strategy is not None:
            if strategy not in get_args(Strategy):
                raise ValueError(f"strategy={strategy!r} must be 'auto', 'loop' or 'buckets'")
            self.strategy = cast(Strategy, strategy)
        if deterministic is not None:
            self.deterministic = deterministic

    @classmethod
    def around(cls, block: Callable, features: int, rngs: nnx.Rngs) -> "Wrapper":
        """This kind around a block, with a gate of its own: what `dynamize` makes where it is given the class alone."""
        return cls(block, features, rngs)  # type: ignore[call-arg]

    @property
    def nests(self) -> bool:
        """Whether it may hold what is dynamic itself."""
        return False

    def whole(self) -> Callable | None:
        """What runs where nothing is decided, called in the same way; None where that is no single block."""
        return None

    def bind(
        self, blocks: Sequence[Callable], args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tree, list[Callable], Tree]:
        """The first of a call's arguments, and `blocks` as functions of one: of all that belongs to the examples."""
        x, args, kwargs = called(blocks[0], args, kwargs)
        found, inputs = [], x
        for block in blocks:
            block, inputs = bind(block, x, args, kwargs, self.batched)
            found.append(block)
        return x, found, inputs

    @property
    def tracing(self) -> bool:
        """Whether a trace is being taken, so that costs are wanted."""
        return tracing(self)

    def expect(
        self, decision: Any, place: Place, rule: Rule | Sequence[Rule], shape: tuple[Size, ...], hint: str
    ) -> Decision:
        """`decision` if it has this place, rule (or one of these) and shape, else a ValueError that says what fits.

        A fitting shape alone says nothing: groups of channels, of which any may be kept, are no one of K branches.
        """
        name = type(self).__name__
        if not isinstance(decision, Decision):
            raise ValueError(f"{name}: its gate gave a {type(decision).__name__} and no Decision; {hint}")
        fitting = [rule.name] if isinstance(rule, Rule) else [each.name for each in rule]
        found = decision.place, decision.rule.name, decision.keep.shape
        if found[0] != place or found[1] not in fitting or found[2] != shape:
            raise ValueError(
                f"{name} needs a decision per {place} (rule: {fitting[0]}) of shape {shape}, its gate gave {found[2]} "
                f"per {found[0]} (rule: {found[1]}); {hint}"
            )
        if decision.probability.shape != shape:
            raise ValueError(f"{name}: its gate gave keep {shape} and probability {decision.probability.shape}")
        return decision

    def account(
        self,
        decision: Decision,
        unit: Sequence[float],
        whole: Sequence[float],
        tile: tuple[float, float] | None = None,
        inside: Sequence[float] = (),
    ) -> None:
        """Record the decision for the trace, at so many MACs (see `Linear`) and with the place of its tiles.

        `inside` has for each kind what the decisions within it come to with everything kept.
        """
        inside = inside or (0.0,) * len(whole)
        costs, most = Linear(tuple(unit), tuple(whole)), decision.rule.most
        both = Linear(whole=tuple(own + held for own, held in zip(whole, inside, strict=True)))
        excluded = costs.full(most) + sum(inside) - both.full(most)
        record(self, dataclasses.replace(decision, cost=costs, tile=tile, excluded=excluded))

    def account_blocks(self, decision: Decision, blocks: Sequence[Callable], inputs: Sequence[Tree]) -> None:
        """Record a decision about whole examples, whose kinds are these blocks on these inputs."""
        if self.tracing:
            own, inside = zip(*(own_macs(block, x) for block, x in zip(blocks, inputs, strict=True)), strict=True)
            self.account(decision, own, own, inside=inside)

    def account_tiles(
        self, decision: Decision, blocks: Sequence[Callable], x: Tree, size: int, radii: Sequence[int]
    ) -> None:
        """Record a decision about tiles of `size` pixels of `x`, whose kinds are these blocks of these radii."""
        if self.tracing:
            unit = [window_macs(block, x, size, radius) for block, radius in zip(blocks, radii, strict=True)]
            self.account(decision, unit, [macs_per_example(block, x) for block in blocks], tile_of(first(x), size))

    def tiles(
        self,
        block: Callable,
        x: Tree,
        keep: Float[Array, "B h w"],
        size: int,
        radius: int,
        otherwise: Callable | None = None,
    ) -> Array:
        """`block(x)` on the tiles kept and `otherwise(x)` on the others; see `execute.tiles`."""
        run = functools.partial(execute.tiles, execution=self.execution, strategy=self.strategy)
        return run(ready(block, self.execution), x, keep, size=size, radius=radius, otherwise=otherwise)

    def samples(
        self,
        block: Callable,
        x: Tree,
        keep: Float[Array, " B"],
        otherwise: Callable | None = None,
        probability: Float[Array, " B"] | None = None,
    ) -> Tree:
        """`block(x)` for the examples kept and `otherwise(x)` for the others; see `execute.samples`.

        Decisions inside `block` come out of it: they are recorded as kept where both they and this one say so, and
        with the product of the probabilities (of examples that compact execution did not run, 0).
        """
        run = functools.partial(execute.samples, execution=self.execution, strategy=self.strategy)
        if not self.tracing or not is_dynamic(block):
            return run(ready(block, self.execution), x, keep, otherwise=otherwise)
        probability = keep if probability is None else probability
        if self.execution == "masked":
            return run(self.opened(block, x, keep, probability), x, keep, otherwise=otherwise)
        still = _evaluates(block)

        def opened(x):
            return seen(operator.call, still, x)

        opened.__name__ = name_of(block)
        _, spec = execute.shape_of(opened, x)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), spec)
        rest = (lambda x: x) if otherwise is None else otherwise
        y, inner = run(opened, x, keep, otherwise=lambda x: (rest(x), nothing))
        _record_inside(block, inner, keep, probability)
        return y

    def branches(
        self, blocks: Sequence[Callable], x: Tree, choice: Float[Array, "B K"], probability: Float[Array, "B K"]
    ) -> Array:
        """The block that `choice` picks, per example; see `execute.branches`, and `samples` for decisions inside."""
        run = functools.partial(execute.branches, execution=self.execution, strategy=self.strategy)
        if not self.tracing or not any(map(is_dynamic, blocks)):
            return run([ready(block, self.execution) for block in blocks], x, choice)
        columns = list(zip(blocks, choice.T, probability.T, strict=True))
        if self.execution == "masked":
            return run([self.opened(block, x, k, p) for block, k, p in columns], x, choice)
        specs = [execute.shape_of(views.still(block), x) for block in blocks]
        y = jnp.zeros(specs[0].shape, jnp.result_type(*(spec.dtype for spec in specs)))
        for block, k, p in columns:
            y = self.samples(block, x, k, lambda _, y=y: y, p)
        return y

    def opened(self, block: Callable, x: Tree, keep: Float[Array, " B"], probability: Float[Array, " B"]) -> Callable:
        """What gives `block(x)`, which is run here and now; decisions inside are recorded as `samples` says."""
        if not is_dynamic(block):
            return block
        y, inner = seen(operator.call, block, x)
        _record_inside(block, inner, keep, probability)
        return lambda _: y


def _record_inside(
    block: nnx.Module, inner: dict[str, Decision], keep: Float[Array, " B"], probability: Float[Array, " B"]
) -> None:
    """Record decisions of modules of `block` as part of the decision about it."""

    def both(decision: Decision) -> Decision:
        times = decision.keep.shape[0] // keep.shape[0]  # more than one where the block folds something into the batch
        kept, probable = (
            chosen * jnp.repeat(outer, times).reshape(-1, *(1,) * (chosen.ndim - 1))
            for chosen, outer in ((decision.keep, keep), (decision.probability, probability))
        )
        return dataclasses.replace(decision, keep=kept, probability=probable)

    record_inside(block, {path: both(decision) for path, decision in inner.items()})


def is_dynamic(block: Callable) -> TypeGuard[nnx.Module]:
    """Whether a module in `block`, or itself, is dynamic."""
    return isinstance(block, nnx.Module) and any(isinstance(module, Wrapper) for _, module in nnx.iter_modules(block))


def refuse_nested(wrapper: str, block: Callable) -> None:
    """Raise ValueError if `block` holds dynamic modules, whose decisions could not be told apart by example."""
    for path, module in nnx.iter_modules(block) if isinstance(block, nnx.Module) else ():
        if isinstance(module, Wrapper):
            raise ValueError(
                f"{wrapper} around a module that is dynamic already ({type(module).__name__} at {_name(path)}): "
                "wrap the outer module or the inner one, not both; Skip, Select, Exits and PolicySkip per example may "
                "be around one"
            )


def ready(block: Callable, execution: str) -> Callable:
    """`block` for this execution. Compact execution runs it in loops and branches, which no trace can see into.

    Raises:
        ValueError: for compact execution of a block that still trains: BatchNorm that updates its statistics, dropout.
    """
    return views.fresh(_evaluates(block)) if execution == "compact" else block


def _evaluates(block: Block) -> Block:
    """`block` without a trace, once it is known not to train."""
    if not isinstance(block, nnx.Module):
        return block
    if flag := trains(block):
        raise ValueError(f"compact execution cannot train: {name_of(block)} was called with {flag}")
    for path, module in nnx.iter_modules(block):
        training = "updates its statistics" if getattr(module, "use_running_average", None) is False else ""
        training = "draws noise" if getattr(module, "deterministic", None) is False else training
        if training:
            raise ValueError(
                f"compact execution cannot train: {type(module).__name__} at {_name(path)} still {training}; "
                "use nnx.view(model, execution='compact', deterministic=True, use_running_average=True)"
            )
    return unseen(block)


# What work costs


def one_example(x: Tree) -> Tree:
    """The shapes of one example of `x`, an array or a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)


def macs_per_example(block: Callable, x: Tree) -> float:
    """MACs of `block` on one example of `x`, all of it computed."""
    return cost.macs(views.still(block), one_example(x))


def own_macs(block: Callable, x: Tree) -> tuple[float, float]:
    """MACs of `block` on one example that no decision inside accounts for, and those that all of these can come to."""
    whole, still = macs_per_example(block, x), views.still(block)
    if not is_dynamic(still):
        return whole, 0.0
    inner = jax.eval_shape(lambda x: seen(operator.call, still, x)[1], one_example(x)).values()
    inner = [decision.fold(1) for decision in inner]
    return whole - sum(d.masked_macs for d in inner), sum(d.full_macs - d.excluded for d in inner)


def grid(x: jax.Array, size: int) -> tuple[int, int]:
    """Rows and columns of tiles of `size` pixels on `x`; the last ones may be cut by the border."""
    return -(-x.shape[1] // size), -(-x.shape[2] // size)


@runtime_checkable
class OfTiles(Protocol):
    """A gate that decides about tiles, or whole examples where it has no size."""

    @property
    def size(self) -> int | None:
        """Side of a tile in pixels."""


def tile_size(gate: Callable | None) -> int | None:
    """Side in pixels of the tiles that a gate decides about; None where it decides about whole examples."""
    return gate.size if isinstance(gate, OfTiles) else None


def tile_of(x: jax.Array, size: int) -> tuple[float, float]:
    """Sides of a tile of `size` pixels as shares of the height and width of `x`."""
    return size / x.shape[1], size / x.shape[2]


def _name(path) -> str:
    return repr("/".join(str(p) for p in path)) if path else "the top"
