"""How far an output pixel of a block reaches, and whether tiles of the block can be computed on their own."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynjax import execute, windows
from dynjax.ops import wrapping

_PROBES = (33, 129)
"""Sides of the maps on which a block is probed, smallest first."""


def receptive_radius(block: Callable, x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Pixels that one output pixel of `block` reaches to each side, at least 0.

    Blocks of convolutions and pointwise layers are read from their jaxpr. Others are probed: a NaN in one input pixel
    shows which outputs depend on it. Parameters' values do not matter, so this works while `jit` traces.

    Raises:
        ValueError: if the block has a stride, reaches over the whole map, or treats pixels differently by their place.
    """
    block, spec = wrapping.still(block), jax.ShapeDtypeStruct((1, 32, 32, x.shape[-1]), x.dtype)
    with _errors_named(block):
        out = execute.shape_of(block, spec).shape
        if out[:3] != (1, 32, 32):
            raise ValueError(
                f"it turns a map of 32x32 pixels into {'x'.join(map(str, out[1:3])) or 'no map'}: tiles need stride 1 "
                "and SAME padding; wrap the layers around the stride instead"
            )
        reach = windows.reach(windows.trace(block, x.shape, x.dtype))
    return probe(block, x.shape[-1], x.dtype) if reach is None else reach


def probe(block: Callable, channels: int, dtype=jnp.float32) -> int:
    """The receptive radius as a NaN in the input shows it; see `receptive_radius`."""
    block = wrapping.still(block)
    with _errors_named(block):
        for side in _PROBES:
            reach = _reach_on(block, channels, jnp.dtype(dtype), side)
            if reach is not None:
                return reach
        raise ValueError(
            f"it mixes the whole map{_culprit(block)}: tiles cannot be computed on their own; wrap the layers around "
            "it, or use Skip"
        )


def _reach_on(block: Callable, channels: int, dtype: np.dtype, side: int) -> int | None:
    """The radius as a square map of `side` pixels shows it; None if it reaches the border."""
    graphdef, state = nnx.split(block) if isinstance(block, nnx.Module) else (block, None)
    leaves, tree = jax.tree.flatten(state)
    key = (graphdef, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), channels, dtype, side)
    try:
        hash(key)
    except TypeError:
        ask = _responses.__wrapped__
    else:
        ask = _responses
    constant, first, second = ask(*key)
    centre, touched = side // 2, [np.isnan(y).any(-1) for y in (first, second)]
    reach = max((abs(int(at) - centre) for place in np.nonzero(touched[0]) for at in place), default=0)
    if reach >= centre:
        return None
    inner = constant[reach : side - reach, reach : side - reach]
    # By rounding pixels may differ a little, by a pattern over the map they differ more.
    same = np.allclose(inner, inner[:1, :1], rtol=1e-3 if dtype.itemsize > 2 else 0.05, equal_nan=True)
    if not same or not np.array_equal(np.roll(touched[0], (1, 1), (0, 1)), touched[1]):
        raise ValueError(
            "it treats pixels differently by their place (a stride inside, or a pattern over the map): tiles would be "
            "wrong; wrap smaller parts of it"
        )
    return reach


@functools.lru_cache(maxsize=256)
def _responses(definition, tree, specs: tuple, channels: int, dtype: np.dtype, side: int) -> np.ndarray:
    """Outputs (3, side, side, D) for a constant map, and for two with a NaN: in the centre, and diagonally after it.

    From what can be hashed, since the blocks of a model are alike, and are asked for whenever it is traced.
    """
    x = np.full((3, side, side, channels), 0.25, dtype)
    for number in (1, 2):
        x[number, (at := side // 2 + number - 1), at] = np.nan

    def run(x: jax.Array) -> jax.Array:
        # The real parameters may be tracers. Their values do not matter: NaN times anything is NaN.
        state = tree.unflatten([_stand_in(*spec) for spec in specs])
        block = nnx.merge(definition, state) if isinstance(definition, nnx.GraphDef) else definition
        return block(x)

    with jax.ensure_compile_time_eval():
        return np.asarray(jax.jit(run)(x), np.float32)


def _stand_in(shape: tuple[int, ...], dtype) -> jax.Array:
    """An array in the place of a parameter, small enough that nothing overflows."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape)
    return jnp.full(shape, 0.01 if jnp.issubdtype(dtype, jnp.floating) else 0, dtype)


@contextlib.contextmanager
def _errors_named(block: Callable) -> Iterator[None]:
    """Errors raised inside say which block they are about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name = type(block).__name__ if isinstance(block, nnx.Module) else getattr(block, "__name__", repr(block))
        raise ValueError(f"{name} cannot be run on tiles: {error}") from error


def _culprit(block: Callable) -> str:
    """Names the layer that is known to mix a whole map, if there is one."""
    if isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            if isinstance(module, nnx.GroupNorm | nnx.InstanceNorm | nnx.MultiHeadAttention):
                return f" ({type(module).__name__} at {'/'.join(map(str, path))!r})"
    return " (global pooling, attention, or a normalisation over the map)"
