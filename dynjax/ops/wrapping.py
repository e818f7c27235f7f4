"""What every wrapper does: look at the wrapped module without changing it, count it, and refuse what cannot be skipped."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from dynjax import cost
from dynjax.decision import Decision, record


def still(block: Callable) -> Callable:
    """`block` as it runs when deployed: no noise, running averages. A view: it shares the parameters."""
    if not isinstance(block, nnx.Module):
        return block
    return nnx.view(block, deterministic=True, use_running_average=True, raise_if_not_found=False)


def ready(block: Callable, execution: str) -> Callable:
    """`block` for this execution.

    Raises:
        ValueError: for compact execution of a block that still updates its BatchNorm statistics.
    """
    if execution not in ("masked", "compact"):
        raise ValueError(f"execution={execution!r} must be 'masked' or 'compact'")
    if execution == "compact" and isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            if isinstance(module, nnx.BatchNorm) and not module.use_running_average:
                raise ValueError(
                    f"compact execution cannot train: BatchNorm at {_name(path)} still updates its statistics; "
                    "use nnx.view(model, execution='compact', deterministic=True, use_running_average=True)"
                )
    return block


def refuse_nested(wrapper: str, block: Callable) -> None:
    """Raise ValueError if `block` holds dynamic modules itself: two decisions about one piece of work cannot be accounted."""
    if isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            if hasattr(module, "execution"):
                raise ValueError(
                    f"{wrapper} around a module that is dynamic already ({type(module).__name__} at {_name(path)}): "
                    "wrap the outer module or the inner one, not both"
                )


def one_example(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)


def macs_per_example(block: Callable, x: jax.Array) -> float:
    """MACs of `block` on one example of `x`."""
    return cost.macs(still(block), one_example(x))


def expect(decision: Decision, granularity: str, shape: tuple[int, ...], wrapper: str, hint: str) -> Decision:
    """`decision` if it has this granularity and shape, else a ValueError that says which gate fits."""
    if decision.keep.shape != shape:
        raise ValueError(f"{wrapper} needs a decision per {granularity} of shape {shape}, its gate gave {decision.keep.shape}; {hint}")
    return dataclasses.replace(decision, granularity=granularity)


def account(wrapper: nnx.Module, decision: Decision, unit_macs: tuple[float, ...], whole_macs: tuple[float, ...]) -> Decision:
    """The decision with its costs, recorded for the trace."""
    decision = dataclasses.replace(decision, unit_macs=unit_macs, whole_macs=whole_macs)
    record(wrapper, decision)
    return decision


def tracing(module: nnx.Module) -> bool:
    """Whether a trace is being taken, so that costs are wanted."""
    return hasattr(module, "__captures__")


def _name(path) -> str:
    return repr("/".join(str(p) for p in path)) if path else "the top"
