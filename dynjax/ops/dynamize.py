"""Put wrappers into a model that nobody here wrote, by the paths that nnx shows for its modules."""

import difflib
import functools
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import linen, nnx

from dynjax.core import convolve, views
from dynjax.core.deployed import call_of
from dynjax.core.modules import name, replace
from dynjax.core.standing import inputs
from dynjax.core.wrapper import Wrapper


def dynamize(
    model: nnx.Module,
    wrappers: Mapping[str, Callable],
    *,
    features: int | Callable[[str, nnx.Module], int] | None = None,
    example: Any = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of `model` in which every module whose whole path matches a pattern is wrapped; outermost matches only.

    Args:
        model: any nnx module; it is not changed, and shares no parameters with the copy.
        wrappers: regular expression for a path such as "encoder/0/conv" to `Skip`, `Tiles`, `MixtureOfDepths`, or a
            function that wraps a module, `(block, features, rngs) -> module`, for example
            `lambda block, features, rngs: Tiles(block, TileGate(features, size=8, rngs=rngs))`. The first pattern that
            matches counts; containers (`nnx.List`, `nnx.Dict`) are no modules to match. What is dynamic already, from
            a call before, may be wrapped by what decides about whole examples.
        features: channels of the wrapped modules' input, for their gates: a number, a function
            `(path, module) -> channels`, or None to find those that the module runs on.
        example: what the model is called with, an array, a tree of arrays or a whole call `(args, kwargs)`, or their
            shapes: the channels are then those that the modules are given in it. Nothing is computed.
        rngs: for the gates' parameters and noise.

    Raises:
        ValueError: for a pattern that matches nothing (near matches are listed), a stack of layers, what lies inside of
            a dynamic module, or where the input channels are not to be found.
    """
    _check_model(model)
    copy = convolve.by_platform(nnx.clone(model))
    # Lists and dicts are modules too; wrapping one would hide its items from the model that indexes it.
    paths = {name(path): m for path, m in nnx.iter_modules(copy) if path and not isinstance(m, nnx.List | nnx.Dict)}
    chosen = _matches(paths, wrappers)
    for path in chosen:
        _check_place(path, copy, paths)
        _check_stack(path, paths[path])
    if features is None and example is not None:
        features = _given(copy, chosen, example)
    new = {}
    for path, wrapper in sorted(chosen.items()):
        channels = _features(path, paths[path], features)
        around = wrapper.around if _is_kind(wrapper) else wrapper
        new[id(paths[path])] = around(paths[path], channels, rngs)
    replace(copy, new)
    return copy


def _is_kind(wrapper: Any) -> TypeGuard[type[Wrapper]]:
    return isinstance(wrapper, type) and issubclass(wrapper, Wrapper)


def _check_model(model: Any) -> None:
    """Raise ValueError for what is no nnx module, with the way to one."""
    if isinstance(model, nnx.Module):
        return
    kind = model if isinstance(model, type) else type(model)
    what = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(model, linen.Module):
        cure = (
            "Linen modules are bridged, block by block, so that there are blocks to wrap: "
            "nnx.bridge.ToNNX(block, rngs=rngs).lazy_init(x)"
        )
    elif any(base.__module__.split(".")[0] == "equinox" for base in kind.__mro__):
        cure = "an Equinox module has no nnx variables: write it with nnx, or wrap parts as functions, dj.Skip(f, gate)"
    elif isinstance(model, type):
        cure = "it is a class: make a model of it"
    elif callable(model):
        cure = "a function has no modules to find: wrap it as it is, dj.Skip(f, gate), in an nnx module of yours"
    else:
        cure = "give the model itself"
    raise ValueError(f"the model is no flax.nnx.Module but {what}: {cure}")


def _matches(paths: Mapping[str, nnx.Module], wrappers: Mapping[str, Callable]) -> dict[str, Callable]:
    """The wrapper of every path that a pattern matches."""
    chosen: dict[str, Callable] = {}
    matched: dict[str, list[str]] = {}
    for pattern, wrapper in wrappers.items():
        if _is_kind(wrapper) and wrapper.by_hand:
            raise ValueError(f"{pattern!r}: {wrapper.__name__} alone does not say enough: {wrapper.by_hand}")
        matches = [path for path in paths if re.fullmatch(pattern, path)]
        if not matches:
            plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
            near = difflib.get_close_matches(plain, paths, n=5, cutoff=0.3) or sorted(paths)[:5]
            raise ValueError(
                f"no module's path matches {pattern!r}; near: {', '.join(near) or 'the model has no modules'}"
                f"{_BRIDGED if any(isinstance(m, nnx.bridge.ToNNX) for m in paths.values()) or not paths else ''}"
            )
        matched[pattern] = matches
        for path in matches:
            chosen.setdefault(path, wrapper)
    inner = [path for path in chosen if any(path.startswith(f"{other}/") for other in chosen)]
    for pattern, matches in matched.items():
        if set(matches) <= set(inner):
            raise ValueError(
                f"all that {pattern!r} matches ({', '.join(matches[:3])}) lies inside of a module that another pattern "
                "wraps, and one call wraps a piece of work once: wrap the outer one or the inner"
            )
    return {path: wrapper for path, wrapper in chosen.items() if path not in inner}


_BRIDGED = "; a bridged Linen model is one module: bridge its blocks one by one (nnx.bridge.ToNNX) to wrap them"


def _features(path: str, block: nnx.Module, features: int | Callable | None) -> int:
    if features is not None:
        return features(path, block) if callable(features) else features
    # Those that the first layer takes: of what any layer inside takes, the number that the block runs on.
    names, modules = ("in_features", "num_features"), [module for _, module in nnx.iter_modules(block)]
    found = {getattr(module, name, None) for module in modules for name in names}
    numbers, run = sorted(number for number in found if isinstance(number, int)), views.fresh(views.still(block))
    causes: list[str] = []
    for channels in numbers:
        for shape in ((1, 32, 32, channels), (1, 32, channels), (1, channels)):
            try:
                jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))
                return channels
            except Exception as error:  # whatever a block raises on channels that it was not made for
                first = str(error).splitlines()
                causes.append(f"{type(error).__name__}: {first[0] if first else ''}")
    if len(numbers) == 1:
        return numbers[0]
    if not numbers:
        why = "no layer in it says how many it takes"
    else:
        why = f"it has layers of {', '.join(map(str, numbers))} and cannot be run on one array of them ({causes[-1]})"
    raise ValueError(
        f"the input channels of {path!r} ({type(block).__name__}) cannot be told: {why}. Give example=, what the model "
        "is called with, or features=, a number or a function (path, module) -> channels"
    )


def _check_place(path: str, model: nnx.Module, paths: Mapping[str, nnx.Module]) -> None:
    """Raise ValueError for a module inside of a wrapper that could not tell its decisions apart."""
    parts = path.split("/")
    for number in range(len(parts)):
        outer = paths.get("/".join(parts[:number])) if number else model
        if not isinstance(outer, Wrapper):
            continue
        at = f"{type(outer).__name__} at {'/'.join(parts[:number]) or 'the top'!r}"
        if isinstance(outer.gate, nnx.Module) and any(each is paths[path] for _, each in nnx.iter_modules(outer.gate)):
            raise ValueError(f"{path!r} is a part of the gate of {at}: what decides is not skipped itself")
        if not outer.nests:
            raise ValueError(
                f"{path!r} lies inside of {at}, which is dynamic already and cannot tell decisions inside of it apart: "
                "wrap the outer module or the inner one; Skip, PolicySkip, Select and Exits per example may hold them"
            )


_AXES = {
    nnx.Linear: ("kernel", 2),
    nnx.Conv: ("kernel", 2),
    nnx.Embed: ("embedding", 2),
    nnx.LayerNorm: ("scale", 1),
    nnx.RMSNorm: ("scale", 1),
    nnx.BatchNorm: ("scale", 1),
    nnx.GroupNorm: ("scale", 1),
}
"""Axes that the parameters of a single layer have; of a convolution those of the kernel's window come on top."""


def _check_stack(path: str, block: nnx.Module) -> None:
    """Raise ValueError for layers stacked by nnx.vmap, which nnx.scan runs: one gate would decide for all of them."""
    for inner, module in nnx.iter_modules(block):
        parameter, axes = _AXES.get(type(module), ("", 0))
        variable = vars(module).get(parameter)
        if not isinstance(variable, nnx.Variable):
            continue
        expected = axes + (len(module.kernel_size) if isinstance(module, nnx.Conv) else 0)
        if variable.ndim > expected:
            raise ValueError(
                f"{path!r} is a stack of {variable.shape[0]} layers in one module ({name(inner) or 'it'} has a "
                f"{parameter} of shape {variable.shape}), as nnx.vmap makes it and nnx.scan runs it: no decision comes "
                "out of that loop. Unroll it, so that each layer has a gate: graphdef, state = nnx.split(the stack); "
                "layers = nnx.List([nnx.merge(graphdef, jax.tree.map(lambda a: a[i], state)) for i in "
                f"range({variable.shape[0]})]), and `for layer in self.layers: x = layer(x)` in the model"
            )


def _given(model: nnx.Module, paths: Collection[str], example: Any) -> Callable[[str, nnx.Module], int]:
    """The channels that the module on each path is given when `model` is called with `example`."""
    listening = nnx.clone(views.still(model))
    modules = {name(path): module for path, module in nnx.iter_modules(listening)}
    fixed, arrays = call_of(example)
    run = lambda listen: functools.partial(jax.eval_shape, listen)  # noqa: E731
    given = inputs(listening, {path: modules[path] for path in paths}, operator.call, fixed, arrays, run)
    heard = {path: [array for array in arrays if array is not None] for path, (_, arrays) in given.items()}
    missing = sorted(path for path in paths if not heard.get(path))
    if missing:
        raise ValueError(f"with this example the model gives nothing to {', '.join(missing[:3])}: give features=")
    return lambda path, _: heard[path][0].shape[-1]
