"""Dynamic space: work only on the tiles of a map that need it.

Letters: B examples, H W pixels, h w tiles, C channels.
"""

from collections.abc import Callable, Collection
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import execute, views, wrapper
from dynjax.core.arguments import is_array
from dynjax.core.decision import EACH
from dynjax.core.gates import TileGate
from dynjax.core.receptive import receptive_radius
from dynjax.core.wrapper import Wrapper


class Tiles(Wrapper):
    """Run `block` on the tiles that the gate keeps; the others pass unchanged, or through `otherwise`.

    DynConv's idea (Verelst & Tuytelaars 2020, arXiv:1912.03203) at the granularity of SBNet (Ren et al. 2018,
    arXiv:1801.02108). Deviation: the compact result equals the masked one exactly, since each tile is computed with the
    border that the block's receptive field needs. With `otherwise`, a rich kernel goes to edges and texture and a plain
    one to the background.

    Args:
        block: a stride-1, SAME-padded module, (B, H, W, C) to (B, H, W, C').
        gate: gives a decision of shape (B, h, w) and has the side of a tile in pixels as `gate.size`, for example
            `TileGate`.
        otherwise: a cheap module for the tiles not kept; run on the whole map, so its cost is static, and when compact
            only where a tile is not kept. Needed if C' is not C.
        radius: pixels of border that are computed around a tile, at least the block's receptive radius, which is taken
            where it is left out.
        batched: as in `Skip`. Of what has the examples as its first axis, maps of the same height and width are cut as
            x is; anything else, such as what FiLM scales by, goes with the tiles of its example.

    Raises:
        ValueError: for a block that tiles would make wrong: global pooling, attention, normalisation or comparison over
            the map, padding from the opposite border, a stride, a change of channels without `otherwise`, a dynamic
            module inside; for a radius that is too small.
    """

    def __init__(
        self,
        block: Callable,
        gate: Callable,
        *,
        otherwise: Callable | None = None,
        radius: int | None = None,
        batched: Collection[int | str] | None = None,
    ):
        wrapper.refuse_nested("Tiles", block)
        size = wrapper.tile_size(gate)
        if size is None:
            raise ValueError(
                "Tiles needs a gate with a tile size: TileGate(channels, size=16, rngs=rngs), "
                "or FixedGate(keep, size=16)"
            )
        if radius is not None and radius < 0:
            raise ValueError(f"radius={radius} must be at least 0 pixels, or None to have it found")
        self.block, self.gate, self.otherwise = block, gate, otherwise
        self.size, self.radius, self.batched = size, radius, batched

    @classmethod
    def around(cls, block: Callable, features: int, rngs: nnx.Rngs) -> "Tiles":
        return cls(block, TileGate(features, rngs=rngs))

    def whole(self) -> Callable:
        return self.block

    def __call__(self, *args: Any, **kwargs: Any) -> Float[Array, "B H W D"]:
        x, (block,), inputs = self.bind([self.block], args, kwargs)
        if not is_array(x):
            raise ValueError(f"Tiles needs maps (B, H, W, C) and was given a {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"Tiles needs maps (B, H, W, C) and was given shape {x.shape}: is the batch axis missing?")
        size = self.size
        hint = f"tiles of {size} pixels on {x.shape[1]}x{x.shape[2]}"
        decision = self.expect(self.gate(x), "tile", EACH, (x.shape[0], *wrapper.grid(x, size)), hint)
        reach = receptive_radius(block, inputs)
        radius = reach if self.radius is None else self.radius
        if radius < reach:
            raise ValueError(
                f"radius={radius} is too small: {type(self.block).__name__} reaches {reach} pixels; leave radius "
                "out to have it found"
            )
        if self.otherwise is None:
            out = execute.shape_of(views.still(block), inputs).shape
            if out[-1] != x.shape[-1]:
                raise ValueError(
                    f"Tiles: {type(self.block).__name__} turns {x.shape[-1]} channels into {out[-1]}, so a tile cannot "
                    f"pass unchanged: give an otherwise=, for example nnx.Linear({x.shape[-1]}, {out[-1]}, rngs=rngs)"
                )
        self.account_tiles(decision, [block], inputs, size, [radius])
        return self.tiles(block, inputs, decision.keep, size, radius, self._rest(x))

    def _rest(self, x: Float[Array, "B H W C"]) -> Callable | None:
        """`otherwise`, as an executor can run it in a branch."""
        if self.otherwise is None:
            return None
        if not wrapper.is_dynamic(self.otherwise):
            return wrapper.ready(self.otherwise, self.execution)
        y = self.otherwise(x)  # here, where its decisions are seen
        return lambda _: y
