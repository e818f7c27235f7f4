"""What tells real pictures from drawn ones, in full, or dynamic: in depth and width, by picture and phase (DynamicD).

Letters: B examples, H W pixels, h w places of a map, C channels, K groups of channels, G classes.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynjax.core.controls import RandomGate
from dynjax.core.decision import Decision
from dynjax.core.gates import ChannelGate
from dynjax.models.blocks import gather_pixels, leaky, make_gate
from dynjax.ops.skip import Skip
from dynjax.ops.width import Channels

GROUPS = 4
"""Groups of hidden channels, of which a dynamic block has those that picture and phase ask for."""


class Share(nnx.Variable):
    """Share of the groups of channels that the training has opened so far."""


class PhaseGate(nnx.Module):
    """The groups of channels that `gate` keeps, of those that the training's phase has opened: the first ones.

    DynamicD (Yang et al. 2022, arXiv:2209.09897, section 3.2): the discriminator's capacity grows with the training,
    here from `start` on to all of it at `until`. Deviation: the groups are opened in order and keep their weights, and
    beyond the phase the picture has a say.
    """

    def __init__(self, gate: ChannelGate | RandomGate, *, start: float = 0.5, until: float = 0.5):
        self.gate, self.start, self.until = gate, start, until
        self.share = Share(jnp.ones(()))

    def schedule(self, progress: Float[Array, ""] | float) -> None:
        """Open as many groups as the share of the training that is over asks for."""
        done = jnp.clip(jnp.asarray(progress, jnp.float32) / self.until, 0, 1)
        self.share[...] = self.start + (1 - self.start) * done

    def __call__(self, x: Float[Array, "B h w C"]) -> Decision:
        chosen = self.gate(x)
        groups = chosen.keep.shape[-1]
        is_open = (jnp.arange(groups) < jnp.ceil(self.share[...] * groups - 1e-3)).astype(chosen.keep.dtype)[None]
        return Decision(chosen.keep * is_open, chosen.probability * is_open, chosen.place, chosen.rule)


class Residual(nnx.Module):
    """Two 3x3 convolutions around a shortcut, without normalisation: R3GAN (Huang et al. 2024, arXiv:2501.05441,
    section 3) has none either. The last starts at zero."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        first = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        last = nnx.Conv(channels, channels, (3, 3), kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.inner: nnx.Sequential | Channels = nnx.Sequential(first, leaky, last)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        return x + self.inner(leaky(x))


class Discriminator(nnx.Module):
    """Pictures (B, H, W, C) from -1 to 1, and labels where there are classes, to scores (B,), higher for real.

    A class has a direction of its own in the last features (Miyato & Koyama 2018, arXiv:1802.05637, eq. 3).

    Args:
        shape: of the largest pictures.
        widths: channels of the maps, the finest first.
        fine: side of the squares of pixels that are taken as one.
        sizes: numbers of sizes of pictures that it takes: the full size, half of it, and so on.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, ...],
        fine: int,
        classes: int,
        *,
        sizes: int = 1,
        rngs: nnx.Rngs,
    ):
        self.fine, self.classes, self.sizes = fine, classes, sizes
        colours = shape[2] * fine**2
        self.enter = nnx.List([nnx.Linear(colours, width, rngs=rngs) for width in widths[:sizes]])
        self.blocks: nnx.List = nnx.List([Residual(width, rngs=rngs) for width in widths])
        pairs = itertools.pairwise(widths)
        self.down = nnx.List([nnx.Linear(4 * a, b, rngs=rngs) for a, b in pairs])
        step = fine * 2 ** (len(widths) - 1)
        features = widths[-1] * (shape[0] // step) * (shape[1] // step)
        self.leave = nnx.Linear(features, 1, rngs=rngs)
        self.directions = nnx.Linear(features, classes, use_bias=False, rngs=rngs) if classes else None

    def __call__(
        self, image: Float[Array, "B H W C"], label: Int[Array, " B"] | None = None, *, size: int = 0
    ) -> Float[Array, " B"]:
        """`size` is how often the picture is halved: 0 is the full size."""
        x = self.enter[size](gather_pixels(image, self.fine))
        for number, block in enumerate(self.blocks):
            if number < size:
                continue
            x = block(x)
            if number < len(self.down):
                x = self.down[number](gather_pixels(leaky(x)))
        x = leaky(x).reshape(len(x), -1)
        score = self.leave(x)[:, 0]
        if self.directions is not None:
            if label is None:
                raise ValueError(f"this discriminator knows {self.classes} classes: give the labels (B,)")
            score = score + (self.directions(x) * jax.nn.one_hot(label, self.classes, dtype=x.dtype)).sum(-1)
        return score.astype(jnp.float32)


def make_dynamic(model: Discriminator, gate: str, *, rngs: nnx.Rngs) -> None:
    """Give every block gates, so that a picture may skip it, or run it with some of its hidden channels."""
    for number, block in enumerate(model.blocks):
        first, rectify, last = block.inner.layers
        channels = first.in_features
        decides = make_gate(gate, channels, groups=math.gcd(GROUPS, channels), rngs=rngs)
        assert isinstance(decides, ChannelGate | RandomGate)
        block.inner = Channels([first, rectify], last, PhaseGate(decides))
        model.blocks[number] = Skip(block, make_gate(gate, channels, rngs=rngs))
