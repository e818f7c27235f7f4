"""Levels of a decoder that tiles need not reach: where an exit is sure, the finer levels run no block.

Letters: B examples, H W pixels, C D channels, K classes, h w tiles.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import execute, wrapper
from dynjax.core.decision import PREFIX, Decision
from dynjax.core.gates import Threshold, threshold
from dynjax.core.receptive import receptive_radius, window_macs
from dynjax.core.wrapper import Wrapper
from dynjax.ops.confidence import Confidence, doubt


class Cascade(Wrapper):
    """Levels from the coarsest to the finest, each with blocks and with logits of every pixel; tiles of the picture
    whose pixels are sure of their classes run no further block.

    Deep Layer Cascade (Li et al. 2017, arXiv:1704.01344) and anytime dense prediction with confidence (Liu et al. 2022,
    arXiv:2104.00749, section 3.2), along a decoder. Deviation: tiles of pixels stop together, by their mean confidence,
    so that stopping saves time; what joins the levels and the logits run everywhere.

    When training (not `deterministic`) nothing stops; train the logits of every level, `predictions`.

    Args:
        joins: modules, one a level, `(finer map, map so far)` to a map of the finer one's size: twice the one so far,
            odd sizes rounded up.
        blocks: modules, one a level, that keep the map's shape, of stride 1.
        exits: modules, one a level, from its map to logits (B, H, W, K).
        size: side of a tile in pixels of the first level's map; at each further one it is twice as long.
        confidence: see `dynjax.ops.confidence`.
        at: confidence in (0, 1) at which a tile stops when the threshold is 0; a budget moves the threshold.

    Raises:
        ValueError: if numbers of modules differ, or a block is dynamic itself.
    """

    by_hand = "it takes the parts of a decoder: dj.Cascade(joins, blocks, exits, size=4)"

    def __init__(
        self,
        joins: Sequence[Callable],
        blocks: Sequence[Callable],
        exits: Sequence[Callable],
        *,
        size: int,
        confidence: Confidence = "max_prob",
        at: float = 0.9,
    ):
        if not len(joins) == len(blocks) == len(exits) or not joins:
            numbers = f"{len(joins)} joins, {len(blocks)} blocks and {len(exits)} exits"
            raise ValueError(f"Cascade needs one of each for every level; there are {numbers}")
        if size < 1 or not 0 < at < 1:
            raise ValueError(f"size={size} must be at least 1 pixel, and at={at} a confidence in (0, 1)")
        for block in blocks:
            wrapper.refuse_nested("Cascade", block)
        self.joins, self.blocks, self.exits = nnx.List(joins), nnx.List(blocks), nnx.List(exits)
        self.size, self.confidence, self.at = size, confidence, at
        self.threshold = Threshold(jnp.zeros(()))

    def predictions(self, coarse: Array, fines: Sequence[Array]) -> list[jax.Array]:
        """The logits of every level, each at its own resolution, the coarsest first."""
        x, found = coarse, []
        for join, block, leave, fine in zip(self.joins, self.blocks, self.exits, fines, strict=True):
            x = block(join(fine, x))
            found.append(leave(x))
        return found

    def __call__(
        self, coarse: Float[Array, "B H W C"], fines: Sequence[Array]
    ) -> tuple[list[jax.Array], list[Float[Array, "B h w"]]]:
        """The logits of every level, and which tiles go on from each but the last (0 or 1); of a tile that stopped, the
        logits of later levels mean nothing. `fines` are the maps that the levels join, the coarsest first."""
        x, found, inputs, keeps, probabilities = coarse, list[jax.Array](), list[jax.Array](), [], []
        for number, (join, block, leave) in enumerate(zip(self.joins, self.blocks, self.exits, strict=True)):
            x, size = join(fines[number], x), self.size * 2**number
            inputs.append(x)
            if not number:
                active = probability = jnp.ones((x.shape[0], *wrapper.grid(x, size)), jnp.float32)
                x = block(x)
            else:
                unsure = doubt(found[-1], self.confidence, self.at, size // 2)
                # What is drawn by chance is no probability; the number that all draws are compared with counts.
                chance = jnp.full_like(unsure, jax.scipy.special.logit(self.at))
                chance = (chance if self.confidence == "random" else unsure) - self.threshold[...]
                probability = probability * jax.nn.sigmoid(chance)
                active = active * threshold(unsure, self.threshold[...]) if self.deterministic else active
                x = self.tiles(block, x, active, size, receptive_radius(block, x))
            keeps.append(active)
            probabilities.append(probability)
            found.append(leave(x))
        if self.tracing:
            self._account(inputs, jnp.stack(keeps, -1), jnp.stack(probabilities, -1))
        return found, keeps[1:]

    def _account(
        self, inputs: Sequence[jax.Array], keep: Float[Array, "B h w K"], probability: Float[Array, "B h w K"]
    ) -> None:
        whole = [wrapper.macs_per_example(block, x) for block, x in zip(self.blocks, inputs, strict=True)]
        unit = [whole[0] / keep[0, ..., 0].size]
        for number, (block, x) in enumerate(zip(self.blocks, inputs, strict=True)):
            if number:
                unit.append(window_macs(block, x, self.size * 2**number, receptive_radius(block, x)))
        tile = wrapper.tile_of(inputs[0], self.size)
        self.account(Decision(keep, probability, "tile", PREFIX), unit, whole, tile)


def chosen(
    logits: Sequence[Float[Array, "B _h _w K"]],
    going: Sequence[Float[Array, "B _r _c"]],
    size: int,
    enlarge: Callable[[jax.Array, int], jax.Array],
) -> Float[Array, "B H W K"]:
    """Logits of every pixel of the last level given, each from the level that it stopped at; `enlarge` makes a map so
    many times as large. `going` may have more levels."""
    total = logits[0]
    for number, (own, active) in enumerate(zip(logits[1:], going, strict=False), 1):
        before = enlarge(total, 2)[:, : own.shape[1], : own.shape[2]]
        total = execute.blend(execute.tile_pixels(active, size * 2**number, own.shape[1:3]), own, before)
    return total
