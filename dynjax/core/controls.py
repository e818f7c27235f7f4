"""Gates that learn nothing: a fixed decision for tests, and chance, the control of every table.

Letters: B examples, h w tiles, K branches.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import gates
from dynjax.core.decision import AXES, EACH, ONE, Decision, Place, Rule, some

Draw = Literal["single", "sandwich", "independent"]


class SampledPaths(gates.Gate):
    """Paths drawn by chance: trains a supernet by sampling its sub-networks, and is the control of learned routing.

    `x` (B, ...) gives a decision of shape (B, paths); an open path counts in full. `draw`, for each example anew:

    - "single": one path, each as likely, so that one way leads through a supernet (Guo et al. 2020, arXiv:1904.00420,
      uniform sampling of a single path). Deviation: an example, not a batch, has one way, so that every step trains
      every cell.
    - "sandwich": of three examples one has all paths open, one none, and one "independent" ones: the largest, the
      smallest and a random sub-network (the sandwich rule of Yu & Huang 2019, arXiv:1903.05134), side by side in a
      batch.
    - "independent": each path is open with probability `rate`, which the threshold moves.

    When deterministic all are "independent", by the example's content (see `RandomGate`).
    """

    def __init__(self, paths: int, draw: Draw = "single", *, rate: float = 0.5, rngs: nnx.Rngs):
        if draw not in get_args(Draw):
            raise ValueError(f"draw={draw!r} must be 'single', 'sandwich' or 'independent'")
        self.paths, self.draw, self.logit = gates.positive(paths, "paths"), draw, _logit(rate)
        self.threshold = gates.Threshold(jnp.zeros(()))
        self.rngs = nnx.Rngs(gate=rngs.params())

    def __call__(self, x: Float[Array, "B ..."]) -> Decision:
        noise = _noise(self, self.rngs, x, (self.paths,))
        if self.draw == "single" and not self.deterministic:
            keep = gates.one_hot_argmax(noise)
        else:
            keep = gates.threshold(self.logit - self.threshold[...] + noise)
        if self.draw == "sandwich" and not self.deterministic:
            turn = (jnp.arange(x.shape[0]) % 3)[:, None]
            keep = jnp.where(turn == 2, keep, (turn == 0).astype(keep.dtype))
        return Decision(keep, keep, "example")


class FixedGate(nnx.Module):
    """The same decision always, whatever the input.

    `keep` of 0s and 1s is of shape (B,), (B, h, w) or (B, T), with one more axis where there are several kinds of work
    on a unit, and with `size`, the side of a tile in pixels, where there are tiles. Its first axis may be 1, which is
    repeated for every example. `place` and `rule` say what it is about; left out, (B,) is per example, (B, K) one of K
    per example, (B, h, w) with `size` per tile, (B, T, K) without it some of K per token, (B, h, w, K) one of K per
    tile.

    Raises:
        ValueError: for a `keep` of another number of axes than its place has.
    """

    def __init__(self, keep, size: int | None = None, *, place: Place | None = None, rule: Rule | None = None):
        keep = jnp.asarray(keep, jnp.float32)
        if keep.ndim not in (1, 2, 3, 4):
            raise ValueError(f"keep has shape {keep.shape}; it must be (B,), (B, K), (B, h, w) or (B, h, w, K)")
        third: Place = "tile" if size is not None else "token"
        usual: tuple[Place, ...] = ("example", "example", third, "tile")
        self.place = usual[keep.ndim - 1] if place is None else place
        if self.place not in AXES:
            raise ValueError(f"place={place!r} must be one of {', '.join(AXES)}")
        axes = AXES[self.place]
        if keep.ndim not in (axes, axes + 1):
            raise ValueError(
                f"keep has shape {keep.shape}; per {self.place} it must have {axes} axes, or {axes + 1} with kinds"
            )
        several = ONE if self.place != "token" else some(keep.shape[-1])
        self.rule = rule or (EACH if keep.ndim == axes else several)
        self.keep = nnx.Variable(keep)
        self.size = gates.positive(size, "size")

    def __call__(self, x: Float[Array, "B ..."]) -> Decision:
        keep = self.keep[...]
        if keep.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"keep has {keep.shape[0]} examples and the input has {x.shape[0]}; give it that many, or 1"
            )
        keep = jnp.broadcast_to(keep, (x.shape[0], *keep.shape[1:]))
        return Decision(keep, keep, self.place, self.rule)


class GridGate(nnx.Module):
    """Tiles of `size` pixels in a fixed order, spread evenly over the map: the control that is blind to content.

    `x` (B, H, W, C) gives the same decision (B, h, w) for every example. At threshold t a share sigmoid(-t) is kept, in
    the order of an ordered dither (Bayer 1973): half of the tiles are a checkerboard, a quarter every other one of
    every other row.
    """

    def __init__(self, size: int = 1):
        self.size = gates.positive(size, "size")
        self.threshold = gates.Threshold(jnp.zeros(()))

    def __call__(self, x: Float[Array, "B H W C"]) -> Decision:
        height, width = (-(-n // self.size) for n in x.shape[1:3])
        matrix = np.zeros((1, 1), int)
        while len(matrix) < max(height, width):
            matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
        rank = np.argsort(np.argsort(matrix[:height, :width].reshape(-1), kind="stable"))
        share = 1 - (rank.reshape(1, height, width) + 0.5) / rank.size
        logits = jnp.asarray(np.log(share / (1 - share)), jnp.float32) - self.threshold[...]
        logits = jnp.broadcast_to(logits, (x.shape[0], height, width))
        return Decision(gates.threshold(logits), jax.nn.sigmoid(logits), "tile")


class RandomGate(gates.Gate):
    """Keeps a share `rate` at random: the control of every table.

    Per example (B,), per tile (B, h, w) with `size`, or each of `units` groups of channels (B, K) by itself; paths are
    drawn by `SampledPaths`. With `branches`, takes one of so many (B, K), or (B, h, w, K) with `size`: each is
    rate / (1 - rate) times as likely as the one before. When deterministic it looks just as random but is a function of
    the example's content, so that every execution agrees.
    """

    def __init__(
        self,
        rate: float,
        *,
        size: int | None = None,
        units: int | None = None,
        branches: int | None = None,
        rngs: nnx.Rngs,
    ):
        if units is not None and (size is not None or branches is not None):
            raise ValueError(f"units={units} are decided per example and alone: leave out size and branches")
        self.logit, self.size = _logit(rate), gates.positive(size, "size")
        self.units, self.branches = gates.positive(units, "units"), gates.positive(branches, "branches")
        self.threshold = gates.Threshold(jnp.zeros(()))
        self.rngs = nnx.Rngs(gate=rngs.params())

    def __call__(self, x: Float[Array, "B ..."]) -> Decision:
        shape = () if self.size is None else tuple(-(-n // self.size) for n in x.shape[1:3])
        shape = shape if self.units is None else (self.units,)
        place: Place = "example" if self.size is None else "tile"
        logit, noise = self.logit - self.threshold[...], _noise(self, self.rngs, x, shape)
        if self.branches is not None:
            probability = jax.nn.softmax(logit * jnp.arange(self.branches))
            # By the inverse of the distribution function: a lower threshold never means a cheaper branch.
            bounds = jnp.cumsum(probability)[:-1].reshape((1,) * noise.ndim + (-1,))
            chosen = (jax.nn.sigmoid(noise)[..., None] > bounds).sum(-1)
            keep = jax.nn.one_hot(chosen, self.branches)
            probability = jnp.broadcast_to(probability, keep.shape)
            return Decision(keep, probability, place, ONE)
        keep = gates.threshold(logit + noise)
        probability = jnp.broadcast_to(jax.nn.sigmoid(logit), keep.shape)
        return Decision(keep, probability, place)


def _logit(rate: float) -> float:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} must be in (0, 1)")
    return math.log(rate) - math.log1p(-rate)


def _noise(gate: gates.Gate, rngs: nnx.Rngs, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Logistic noise (B, *shape); when deterministic a function of each example's content."""
    if not gate.deterministic:
        return jax.random.logistic(gates.next_key(rngs), (x.shape[0], *shape))
    content = x.astype(jnp.float32).mean(tuple(range(1, x.ndim))).reshape(-1, *(1,) * len(shape))
    return gates.logistic(gates.content_chance(content, jax.random.uniform(jax.random.key(0), (1, *shape))))
