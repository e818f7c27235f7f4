"""More work where a prediction is in doubt: a rich network for its tiles, further blocks for its pixels.

Letters: B examples, H W h w pixels, R pixels of a window, K numbers that a pixel is predicted from, P parameters of a
pixel.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import cost, execute, wrapper
from dynjax.core.decision import EACH, PREFIX, Decision
from dynjax.core.gates import EntropyGate, content_chance
from dynjax.core.wrapper import Wrapper


@runtime_checkable
class Uncertain(Protocol):
    """A likelihood of pixels, which knows how unsure it is of one."""

    @property
    def values(self) -> int: ...
    @property
    def channels(self) -> int: ...
    def entropy(self, params: Array, /) -> Array: ...


def doubt(likelihood: Uncertain, params: Float[Array, "*pixels P"]) -> Float[Array, "*pixels"]:
    """Entropy of a prediction as a share of the most there can be, in [0, 1].

    Without a gradient: which pixels are uncertain is no matter of the loss.
    """
    return jax.lax.stop_gradient(likelihood.entropy(params)) / (np.log(likelihood.values) * likelihood.channels)


class Refine(Wrapper):
    """Predicts pixels plainly, and richly in the tiles that the gate keeps.

    As `Tiles`, but the gate sees how uncertain the plain prediction is. Without a gate the rich network runs everywhere
    and there is no plain one.

    Args:
        rich, plain: (B, h, w, K) to (B, h, w, P), each pixel by itself.
        gate: from doubt (B, h, w, 1) to a decision about tiles, for example `EntropyGate(size)`.
    """

    def __init__(
        self, rich: Callable[[Array], Array], plain: Callable | None, gate: Callable | None, likelihood: Uncertain
    ):
        self.rich, self.plain, self.gate, self.likelihood = rich, plain, gate, likelihood
        self.tile = wrapper.tile_size(gate) or 1
        """Side in pixels of the tiles that the gate decides about; 1 without a gate."""

    def __call__(self, x: Float[Array, "B h w K"]) -> tuple[Float[Array, "B h w P"], Float[Array, "B h w"]]:
        """Parameters, and 1 where the rich network gave them."""
        if self.gate is None or self.plain is None:
            return self.rich(x), jnp.ones(x.shape[:3])
        plain, size = self.plain(x), self.tile
        shape = (x.shape[0], *wrapper.grid(x, size))
        unsure = doubt(self.likelihood, plain)[..., None]
        decision = self.expect(self.gate(unsure), "tile", EACH, shape, f"tiles of {size}")
        self.account_tiles(decision, [self.rich], x, size, [0])
        params = self.tiles(self.rich, x, decision.keep, size, 0, lambda _: plain)
        return params, execute.tile_pixels(decision.keep, size, x.shape[1:3])


class PixelExits(Wrapper):
    """Decides after each block but the last which pixels go on: those whose prediction is uncertain.

    CALM's measure of confidence (Schuster et al. 2022, arXiv:2207.07061) is the difference of the two largest
    probabilities; here it is the entropy, which mixtures have too. `random`, the control, is a function of the
    prediction that has nothing to do with doubt.

    Args:
        blocks: number of blocks, at least 2.
    """

    def __init__(self, blocks: int, likelihood: Uncertain, *, random: bool = False):
        if blocks < 2:
            raise ValueError(f"layers={blocks}: exits need at least 2")
        self.gates = nnx.List([EntropyGate(1) for _ in range(blocks - 1)])
        self.likelihood, self.random = likelihood, random

    def __call__(self, level: int, params: Float[Array, "B R P"]) -> Decision:
        """Which pixels (B, R, 1) are not sure of what they predict after block `level`."""
        params = jax.lax.stop_gradient(params.astype(jnp.float32))
        unsure = content_chance(params.mean(-1)) if self.random else doubt(self.likelihood, params)
        return self.gates[level](unsure[..., None, None])

    def go_on(
        self, look: Callable[..., Array], tree: tuple[Array, ...], going: Float[Array, "B R"]
    ) -> Float[Array, "B R F"]:
        """Features after a block, `look(*tree)`, where `going`; elsewhere as they are, the first of the tree."""
        if tree[0].shape[1] > 1:  # pixels of a window are computed at once, whoever of them has left
            return execute.blend(going, look(*tree), tree[0])
        return self.samples(lambda tree: look(*tree), tree, going[:, 0], lambda tree: tree[0])

    def account_pixels(
        self,
        decisions: Sequence[Decision],
        keeps: Sequence[Float[Array, "B pixels"]],
        looks: Sequence[Callable[..., Array]],
        tree: tuple[Array, ...],
        size: tuple[int, int],
    ) -> None:
        """Record which blocks every pixel of pictures of `size` (H, W) took."""
        probabilities = [keeps[0]]
        for decision in decisions:
            probabilities.append(probabilities[-1] * decision.probability[..., 0])
        keep, probability = (jnp.stack(a, -1).reshape(-1, *size, len(keeps)) for a in (keeps, probabilities))
        whole = [cost.macs(look, *wrapper.one_example(tree)) for look in looks]
        unit = [macs / (size[0] * size[1]) for macs in whole]
        self.account(Decision(keep, probability, "tile", PREFIX), unit, whole, (1 / size[0], 1 / size[1]))
