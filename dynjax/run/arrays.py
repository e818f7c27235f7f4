"""The arrays of a pytree by name, and back into it."""

from typing import Any

import jax


def named_arrays(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a pytree by their path, such as params.stem.kernel; typed random keys as their data."""
    return {_name(path): key_data(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fill(template: Any, arrays: dict[str, jax.Array], prefix: str = "") -> Any:
    """`template` with its arrays replaced by those called `prefix` + their path.

    Raises ValueError naming the first that is missing or has another shape or type.
    """

    def one(path: Any, leaf: Any) -> Any:
        name = prefix + _name(path)
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        array, wanted = arrays[name], key_data(leaf)
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            is_, should_be = (f"{x.dtype}{list(x.shape)}" for x in (array, wanted))
            raise ValueError(f"{name} is {is_}, the model wants {should_be}")
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(one, template)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(leaf: Any) -> Any:
    """`leaf`, or the numbers of a typed random key."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
