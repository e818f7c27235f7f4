"""What every wrapper does: look at the wrapped module without changing it, count it, refuse what cannot be skipped."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, get_args, runtime_checkable

import jax
from flax import nnx

from dynjax.core import cost, execute
from dynjax.core.decision import Block, Decision, record, unseen
from dynjax.core.execute import Execution, Strategy

EXECUTIONS: tuple[Execution, ...] = get_args(Execution)
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


def still(block: Block) -> Block:
    """`block` as it runs when deployed: no noise, running averages. A view: it shares the parameters.

    It is only looked at, so no trace is taken inside.
    """
    if not isinstance(block, nnx.Module):
        return block
    return unseen(nnx.view(block, deterministic=True, use_running_average=True, raise_if_not_found=False))


def ready(block: Callable, execution: str) -> Callable:
    """`block` for this execution. Compact execution runs it in loops and branches, which no trace can see into.

    Raises:
        ValueError: for compact execution of a block that still trains: BatchNorm that updates its statistics, dropout.
    """
    if execution not in ("masked", "compact"):
        raise ValueError(f"execution={execution!r} must be 'masked' or 'compact'")
    if execution == "compact" and isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            training = "updates its statistics" if getattr(module, "use_running_average", None) is False else ""
            training = "draws noise" if getattr(module, "deterministic", None) is False else training
            if training:
                raise ValueError(
                    f"compact execution cannot train: {type(module).__name__} at {_name(path)} still {training}; "
                    "use nnx.view(model, execution='compact', deterministic=True, use_running_average=True)"
                )
        return unseen(block)
    return block


@runtime_checkable
class Dynamic(Protocol):
    """A module that carries decisions out."""

    execution: Execution
    strategy: Strategy


def set_ways(wrapper: Dynamic, execution: str | None, strategy: str | None) -> None:
    """Set how `wrapper` carries decisions out, as far as a view says so.

    Raises:
        ValueError: for a way that there is none of.
    """
    if execution is not None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r} must be 'masked' or 'compact'")
        wrapper.execution = execution
    if strategy is not None:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} must be 'auto', 'loop' or 'buckets'")
        wrapper.strategy = strategy


def refuse_nested(wrapper: str, block: Callable) -> None:
    """Raise ValueError if `block` holds dynamic modules: two decisions about one piece of work cannot be accounted."""
    if isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            if hasattr(module, "execution"):
                raise ValueError(
                    f"{wrapper} around a module that is dynamic already ({type(module).__name__} at {_name(path)}): "
                    "wrap the outer module or the inner one, not both"
                )


def one_example(x: execute.Tree) -> execute.Tree:
    """The shapes of one example of `x`, an array or a tree of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)


def macs_per_example(block: Callable, x: execute.Tree) -> float:
    """MACs of `block` on one example of `x`."""
    return cost.macs(still(block), one_example(x))


def expect(
    decision: Decision | Any, granularity: str | tuple[str, ...], shape: tuple[int, ...], wrapper: str, hint: str
) -> Decision:
    """`decision` if it has this granularity (or one of these) and shape, else a ValueError that says which gate fits.

    A fitting shape alone says nothing: groups of channels, of which any may be kept, are no one of K branches.
    """
    if not isinstance(decision, Decision):
        raise ValueError(f"{wrapper}: its gate gave a {type(decision).__name__} and no Decision; {hint}")
    fitting = (granularity,) if isinstance(granularity, str) else granularity
    if decision.granularity not in fitting or decision.keep.shape != shape:
        raise ValueError(
            f"{wrapper} needs a decision per {fitting[0]} of shape {shape}, its gate gave {decision.keep.shape} per "
            f"{decision.granularity}; {hint}"
        )
    if decision.probability.shape != shape:
        raise ValueError(f"{wrapper}: its gate gave keep {shape} and probability {decision.probability.shape}")
    return decision


def account(
    wrapper: nnx.Module,
    decision: Decision,
    unit_macs: tuple[float, ...],
    whole_macs: tuple[float, ...],
    tile: tuple[float, float] | None = None,
    most: int | None = None,
) -> None:
    """Record the decision for the trace, with its costs (see `Decision`) and the place of its tiles."""
    record(wrapper, dataclasses.replace(decision, unit_macs=unit_macs, whole_macs=whole_macs, tile=tile, most=most))


def grid(x: jax.Array, size: int) -> tuple[int, int]:
    """Rows and columns of tiles of `size` pixels on `x`; the last ones may be cut by the border."""
    return -(-x.shape[1] // size), -(-x.shape[2] // size)


def tile_of(x: jax.Array, size: int | None) -> tuple[float, float] | None:
    """Sides of a tile of `size` pixels as shares of the height and width of `x`."""
    return None if size is None else (size / x.shape[1], size / x.shape[2])


def tracing(module: nnx.Module) -> bool:
    """Whether a trace is being taken, so that costs are wanted."""
    return hasattr(module, "__captures__")


def _name(path) -> str:
    return repr("/".join(str(p) for p in path)) if path else "the top"
