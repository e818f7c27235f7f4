"""Dynamic space: work only on the tiles of a map that need it.

Letters: B examples, H W pixels, h w tiles, C channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynjax import cost, execute, windows
from dynjax.ops import wrapping

_PROBES = (33, 129)
"""Sides of the maps on which a block is probed, smallest first."""


class Tiles(nnx.Module):
    """Run `block` on the tiles that the gate keeps; the others pass unchanged, or through `otherwise`.

    DynConv's idea (Verelst & Tuytelaars 2020, arXiv:1912.03203) at the granularity of SBNet (Ren et al. 2018,
    arXiv:1801.02108). Deviation: the compact result equals the masked one exactly, since each tile is computed with the
    border that the block's receptive field needs. With `otherwise`, a rich kernel goes to edges and texture and a plain
    one to the background.

    Args:
        block: a stride-1, SAME-padded module, (B, H, W, C) to (B, H, W, C').
        gate: gives a decision of shape (B, h, w) and has the side of a tile in pixels as `gate.size`, for example
            `TileGate`.
        otherwise: a cheap module for the tiles not kept; run on the whole map, so its cost is static. Needed if C' is
            not C.
        radius: receptive radius of the block in pixels; found by looking at the block where it is left out.

    Raises:
        ValueError: for a block that tiles would make wrong: global pooling, attention or normalisation over the map, a
            stride, a change of channels without `otherwise`, a dynamic module inside.
    """

    def __init__(
        self, block: Callable, gate: Callable, *, otherwise: Callable | None = None, radius: int | None = None
    ):
        wrapping.refuse_nested("Tiles", block)
        if getattr(gate, "size", None) is None:
            raise ValueError(
                "Tiles needs a gate with a tile size: TileGate(channels, size=16, rngs=rngs), "
                "or FixedGate(keep, size=16)"
            )
        self.block, self.gate, self.otherwise, self.radius = block, gate, otherwise, radius
        self.execution, self.strategy = "masked", "auto"

    def set_view(self, execution: str | None = None, strategy: str | None = None, **kwargs) -> dict:
        self.execution, self.strategy = execution or self.execution, strategy or self.strategy
        return kwargs

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        size = self.gate.size
        grid = (x.shape[0], *(-(-n // size) for n in x.shape[1:3]))
        decision = wrapping.expect(
            self.gate(x), "tile", grid, "Tiles", f"tiles of {size} pixels on {x.shape[1]}x{x.shape[2]}"
        )
        radius = receptive_radius(self.block, x) if self.radius is None else self.radius
        if self.otherwise is None:
            out = execute.shape_of(wrapping.still(self.block), x).shape
            if out != x.shape:
                raise ValueError(
                    f"{_describe(self.block)} turns {x.shape[-1]} channels into {out[-1]}, so a tile cannot pass unchanged: "
                    f"give Tiles an otherwise=, for example nnx.Conv({x.shape[-1]}, {out[-1]}, (1, 1), rngs=rngs)"
                )
        if wrapping.tracing(self):
            unit = window_macs(self.block, x, size, radius)
            wrapping.account(self, decision, (unit,), (wrapping.macs_per_example(self.block, x),))
        return execute.tiles(
            wrapping.ready(self.block, self.execution),
            x,
            decision.keep,
            size=size,
            radius=radius,
            otherwise=self.otherwise,
            execution=self.execution,
            strategy=self.strategy,
        )


def window_macs(block: Callable, x: jax.Array | jax.ShapeDtypeStruct, size: int, radius: int) -> float:
    """MACs that the compact execution spends on one tile of `size` pixels, its border included."""
    block, side = wrapping.still(block), size + 2 * radius
    closed = windows.trace(block, x.shape, x.dtype)
    window = jax.ShapeDtypeStruct((1, side, side, x.shape[-1]), x.dtype)
    if not windows.supported(closed, size=size, radius=radius):
        return cost.macs(block, window)
    inside = jax.ShapeDtypeStruct((1, side, side, 1), bool)
    return cost.macs(lambda w, i: windows.run_strip(closed, w, i, size=size, radius=radius), window, inside)


def receptive_radius(block: Callable, x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Pixels that one output pixel of `block` reaches to each side, at least 0.

    Blocks of convolutions and pointwise layers are read from their jaxpr. Others are probed: a NaN in one input pixel
    shows which outputs depend on it. Parameters' values do not matter, so this works while `jit` traces.

    Raises:
        ValueError: if the block has a stride, reaches over the whole map, or treats pixels differently by their place.
    """
    block = wrapping.still(block)
    spec = jax.ShapeDtypeStruct((1, 32, 32, x.shape[-1]), x.dtype)
    out = execute.shape_of(block, spec).shape
    if out[:3] != (1, 32, 32):
        raise ValueError(
            f"{_describe(block)} turns a map of 32x32 pixels into {'x'.join(map(str, out[1:3])) or 'no map'}: tiles need stride 1 and "
            "SAME padding; wrap the layers around the stride instead"
        )
    reach = windows.reach(windows.trace(block, x.shape, x.dtype))
    return probe(block, x.shape[-1], x.dtype) if reach is None else reach


def probe(block: Callable, channels: int, dtype=jnp.float32) -> int:
    """The receptive radius as a NaN in the input shows it; see `receptive_radius`."""
    block = wrapping.still(block)
    for side in _PROBES:
        centre = side // 2
        touched = [_touched(block, channels, dtype, side, at) for at in (centre, centre + 1)]
        rows, columns = (np.flatnonzero(touched[0].any(axis)) for axis in (1, 0))
        if not rows.size:
            return 0
        if 0 < min(rows[0], columns[0]) and max(rows[-1], columns[-1]) < side - 1:
            if not np.array_equal(np.roll(touched[0], (1, 1), (0, 1)), touched[1]):
                raise ValueError(
                    f"{_describe(block)} treats pixels differently by their place (a stride inside, or a pattern over the map): "
                    "tiles would be wrong; wrap smaller parts of it"
                )
            return int(max(centre - rows[0], rows[-1] - centre, centre - columns[0], columns[-1] - centre))
    raise ValueError(
        f"{_describe(block)} mixes the whole map{_culprit(block)}: tiles cannot be computed on their own; wrap the layers around it, or use Skip"
    )


def _touched(block: Callable, channels: int, dtype, side: int, at: int) -> np.ndarray:
    """Which output pixels (side, side) depend on input pixel (at, at)."""
    graphdef, state = nnx.split(block) if isinstance(block, nnx.Module) else (None, None)
    with jax.ensure_compile_time_eval():
        # The real parameters may be tracers. Their values do not matter: NaN times anything is NaN.
        state = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype) if _is_float(leaf) else leaf, state)

        def run(state, x):
            return (nnx.merge(graphdef, state) if graphdef is not None else block)(x)

        x = np.zeros((1, side, side, channels), dtype)
        x[:, at, at] = np.nan
        return np.isnan(np.asarray(jax.jit(run)(state, x), np.float32)).any((0, 3))


def _is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _culprit(block: Callable) -> str:
    """Names the layer that is known to mix a whole map, if there is one."""
    if isinstance(block, nnx.Module):
        for path, module in nnx.iter_modules(block):
            if isinstance(module, nnx.GroupNorm | nnx.InstanceNorm | nnx.MultiHeadAttention):
                return f" ({type(module).__name__} at {'/'.join(map(str, path))!r})"
    return " (global pooling, attention, or a normalisation over the map)"


def _describe(block: Callable) -> str:
    return type(block).__name__ if isinstance(block, nnx.Module) else getattr(block, "__name__", repr(block))
