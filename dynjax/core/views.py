"""Views of a model: the same variables, run in another way."""

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from dynjax.core import modules
from dynjax.core.arguments import name_of
from dynjax.core.decision import unseen

Model = TypeVar("Model")  # a module, which need not be callable, or what is called in its place


def still(model: Model) -> Model:
    """As it is evaluated: all computed and masked, no noise, running averages; no trace is being taken inside."""
    return unseen(_view(model, execution="masked", deterministic=True, use_running_average=True))


def training(model: Model) -> Model:
    """As it is trained: masked, with noise, and statistics that move on."""
    return _view(model, execution="masked", deterministic=False, use_running_average=False)


def masked(model: Model) -> Model:
    """`model`, all of it computed."""
    return _view(model, execution="masked")


def compact(model: Model) -> Model:
    """As it is deployed, skipping for real: no noise, running averages.

    Call it under `jax.jit`, as all that is compact: its loops are compiled anew in every call that is not.
    """
    return _view(model, execution="compact", deterministic=True, use_running_average=True)


def fresh(block: Callable) -> Callable:
    """`block` as a function that runs a copy of it: inside of what JAX traces, whatever the block does to itself.

    Layers that draw keys, keep statistics or are run by nnx.scan refuse a trace that they were not made in.
    """
    if not isinstance(block, nnx.Module):
        return block
    graphdef, state = nnx.split(block)

    def run(*args: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, state, copy=True)(*args, **kwargs)

    run.__name__ = name_of(block)
    return run


def changed(model: Any, *args: Any, method: str = "__call__", **kwargs: Any) -> tuple[Any, nnx.State]:
    """What a method of `model` gives, and the variables that the call changed."""
    before = {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    output = getattr(model, method)(*args, **kwargs)
    after = nnx.to_flat_state(nnx.state(model))
    found = [(path, leaf) for path, leaf in after if _value(leaf) is not before.get(path)]
    return output, nnx.from_flat_state(found)


def _value(leaf: Any) -> Any:
    """What is in a variable; an array may also be an attribute by itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _view(model: Model, **ways: Any) -> Model:
    """`model` in these ways, which what is no module has none of.

    Flags that modules keep as attributes of their own, without a view, are set as `nnx.Module.eval` sets them.
    """
    if not isinstance(model, nnx.Module):
        return model
    view = modules.view(model, **ways)
    flags: dict[str, Any] = {name: ways[name] for name in ("deterministic", "use_running_average") if name in ways}
    if "deterministic" in ways:
        flags["training"] = not ways["deterministic"]
    for _, module in nnx.iter_modules(view):
        for name, value in flags.items():
            if isinstance(vars(module).get(name), bool):
                setattr(module, name, value)
    return without_keys(view) if ways.get("deterministic") else view


def without_keys(model: Model) -> Model:
    """`model`, changed, whose bridged Linen modules draw no keys, which they do in every call, noise or not."""
    for _, module in nnx.iter_modules(model) if isinstance(model, nnx.Module) else ():
        if isinstance(module, nnx.bridge.ToNNX):
            module.to_nnx__rngs = None
    return model
