"""The modules of a model by their paths, and putting others in their places."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Kind = TypeVar("Kind", bound=nnx.Module)


def name(path: tuple) -> str:
    """A path as nnx shows it, "encoder/0/conv"; that of the model itself is empty."""
    return "/".join(map(str, path))


def outermost(model: nnx.Module, kind: type[Kind]) -> dict[str, Kind]:
    """The modules of a kind, by path, that lie in no other of it."""
    found: dict[str, Kind] = {}
    for path, module in sorted(nnx.iter_modules(model), key=lambda pair: len(pair[0])):
        parents = {name(path[:n]) for n in range(len(path))}
        if isinstance(module, kind) and not parents & found.keys():
            found[name(path)] = module
    return found


def view(model: Kind, **ways: Any) -> Kind:
    """As `nnx.view`, where modules need not know of these ways; of `nnx.Rngs` it draws nothing.

    A stream of keys passes for its `set_view`, since every name is one of its streams.
    """
    return nnx.view(model, only=lambda _, node: not isinstance(node, nnx.Rngs), raise_if_not_found=False, **ways)


def passed_on(module: nnx.Module, inner: str, attribute: str) -> Any:
    """For `__getattr__` of a module that stands for its module `inner`: other attributes are that one's."""
    if attribute.startswith("_") or attribute in ("set_view", inner):
        raise AttributeError(attribute)
    return getattr(vars(module)[inner], attribute)


def replace(model: nnx.Module, new: Mapping[int, Any]) -> None:
    """Put new[id(module)] into every place of `model` where the module is: what was shared stays shared."""
    for _, parent in list(nnx.iter_modules(model)):
        if isinstance(parent, nnx.List):
            for index, item in enumerate(parent):
                if id(item) in new:
                    parent[index] = new[id(item)]
            continue
        for attribute, value in list(vars(parent).items()):
            if id(value) in new:
                setattr(parent, attribute, new[id(value)])
            elif isinstance(value, tuple | list | dict) and not attribute.startswith("_pytree__"):
                leaves = jax.tree.leaves(value, is_leaf=_is_node)
                if any(id(leaf) in new for leaf in leaves):
                    swapped = jax.tree.map(lambda leaf: new.get(id(leaf), leaf), value, is_leaf=_is_node)
                    setattr(parent, attribute, nnx.data(swapped))


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Variable)
