"""Put wrappers into a model that nobody here wrote, by the paths that nnx shows for its modules."""

import contextlib
import difflib
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from dynjax.core import execute, views
from dynjax.core.gates import SampleGate, TileGate
from dynjax.core.modules import name, replace
from dynjax.ops.skip import Skip
from dynjax.ops.tiles import Tiles

_GATES = {Skip: SampleGate, Tiles: TileGate}


def dynamize(
    model: nnx.Module,
    wrappers: Mapping[str, Callable],
    *,
    features: int | Callable[[str, nnx.Module], int] | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of `model` in which every module whose whole path matches a pattern is wrapped; outermost matches only.

    Args:
        model: any nnx module; it is not changed, and shares no parameters with the copy.
        wrappers: regular expression for a path such as "encoder/0/conv" to `Skip`, `Tiles`, or a function that wraps a
            module, `(block, features, rngs) -> module`, for example
            `lambda block, features, rngs: Tiles(block, TileGate(features, size=8, rngs=rngs))`. The first pattern that
            matches counts; containers (`nnx.List`, `nnx.Dict`) are no modules to match. What is dynamic already, from
            a call before, may be wrapped by what decides about whole examples.
        features: channels of the wrapped modules' input, for their gates: a number, a function
            `(path, module) -> channels`, or None to find those that the module runs on.
        rngs: for the gates' parameters and noise.

    Raises:
        ValueError: for a pattern that matches nothing (near matches are listed), or where the input channels are not to
            be found.
    """
    if not isinstance(model, nnx.Module):
        what = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"the model is a {what} and no flax.nnx.Module: a Linen model must be written in nnx first")
    copy = nnx.clone(model)
    # Lists and dicts are modules too; wrapping one would hide its items from the model that indexes it.
    paths = {name(path): m for path, m in nnx.iter_modules(copy) if path and not isinstance(m, nnx.List | nnx.Dict)}
    chosen: dict[str, Callable] = {}
    matched: dict[str, list[str]] = {}
    for pattern, wrapper in wrappers.items():
        matches = [path for path in paths if re.fullmatch(pattern, path)]
        if not matches:
            plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
            near = difflib.get_close_matches(plain, paths, n=5, cutoff=0.3) or sorted(paths)[:5]
            raise ValueError(
                f"no module's path matches {pattern!r}; near: {', '.join(near) or 'the model has no modules'}"
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
    new = {}
    for path in sorted(chosen.keys() - inner):
        block, wrapper = paths[path], chosen[path]
        channels = _features(path, block, features)
        gated = (_GATES[wrapper](channels, rngs=rngs),) if wrapper in _GATES else (channels, rngs)
        new[id(block)] = wrapper(block, *gated)
    replace(copy, new)
    return copy


def _features(path: str, block: nnx.Module, features: int | Callable | None) -> int:
    if features is not None:
        return features(path, block) if callable(features) else features
    # Those that the first layer takes: of what any layer inside takes, the number that the block runs on.
    names, modules = ("in_features", "num_features"), [module for _, module in nnx.iter_modules(block)]
    found = {getattr(module, name, None) for module in modules for name in names}
    numbers, still = sorted(number for number in found if isinstance(number, int)), views.still(block)
    for channels in numbers:
        for shape in ((1, 32, 32, channels), (1, 32, channels), (1, channels)):
            # Whatever a block raises on channels that it was not made for.
            with contextlib.suppress(Exception):
                execute.shape_of(still, jax.ShapeDtypeStruct(shape, jnp.float32))
                return channels
    if len(numbers) == 1:
        return numbers[0]
    raise ValueError(
        f"the input channels of {path!r} ({type(block).__name__}) cannot be told from its layers: "
        "give features=, a number or a function (path, module) -> channels"
    )
