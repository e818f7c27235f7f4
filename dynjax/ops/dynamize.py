"""Put wrappers into a model that nobody here wrote, by the paths that nnx shows for its modules."""

import difflib
import re
from collections.abc import Callable, Mapping

from flax import nnx

from dynjax.gates import SampleGate, TileGate
from dynjax.ops.depth import Skip
from dynjax.ops.spatial import Tiles

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
        wrappers: regular expression for a path such as "encoder/0/conv" to `Skip`, `Tiles`, or a function
            `(block, features, rngs) -> module` that wraps it: `lambda block, features, rngs: Tiles(block, TileGate(features, size=8, rngs=rngs))`.
            The first pattern that matches counts.
        features: channels of the wrapped modules' input, for their gates: a number, a function `(path, module) -> channels`, or None to
            take the input channels of the first layer inside the module that has them.
        rngs: for the gates' parameters and noise.

    Raises:
        ValueError: for a pattern that matches nothing (near matches are listed), or where the input channels are not to be found.
    """
    model = nnx.clone(model)
    paths = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if path}
    chosen: dict[str, str] = {}
    for pattern in wrappers:
        matches = [path for path in paths if re.fullmatch(pattern, path)]
        if not matches:
            near = difflib.get_close_matches(re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern), paths, n=5, cutoff=0.3) or sorted(paths)[:5]
            raise ValueError(f"no module's path matches {pattern!r}; near: {', '.join(near)}")
        for path in matches:
            chosen.setdefault(path, pattern)
    outermost = [path for path in sorted(chosen) if not any(path.startswith(f"{other}/") for other in chosen)]
    # List containers are modules too; wrapping one would hide its items from the model that indexes it.
    outermost = [path for path in outermost if not isinstance(paths[path], nnx.List | nnx.Dict)]
    for path in outermost:
        block, wrapper = paths[path], wrappers[chosen[path]]
        channels = _features(path, block, features)
        wrapped = wrapper(block, _GATES[wrapper](channels, rngs=rngs)) if wrapper in _GATES else wrapper(block, channels, rngs)
        parent, _, name = path.rpartition("/")
        parent = paths[parent] if parent else model
        if isinstance(parent, nnx.List):
            parent[int(name)] = wrapped
        elif isinstance(parent, nnx.Dict):
            parent[name] = wrapped
        else:
            setattr(parent, name, wrapped)
    return model


def _features(path: str, block: nnx.Module, features) -> int:
    if features is not None:
        return features(path, block) if callable(features) else features
    for _, module in nnx.iter_modules(block):
        for name in ("in_features", "num_features"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    raise ValueError(f"the input channels of {path!r} ({type(block).__name__}) are not to be seen from its layers: give features=")
