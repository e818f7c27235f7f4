"""What decoders with levels share: from the coarsest map up, each joined with the next finer one, and blocks.

Letters: B examples, H W pixels, C channels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dynjax.models.blocks import Block, Classify, ClassifyingHead
from dynjax.models.dense import Backbone, BackboneConfig, Site, sites_of
from dynjax.models.rules import Rule


class Decoder(ClassifyingHead):
    """Gives every pixel of the finest map the logits of the stride^2 pixels of the picture under it.

    Args:
        join: `(channels of a map, those of the next coarser one, rngs=rngs)` to a module that is called with both maps
            and gives one of the finer one's shape.
        blocks: residual blocks of each level but the coarsest, finest first.

    Raises:
        ValueError: where a map of the backbone has not half the resolution of the one before.
    """

    def __init__(
        self,
        join: Callable[..., nnx.Module],
        blocks: Sequence[int],
        backbone: Backbone,
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        strides, widths = backbone.strides, backbone.widths
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(f"strides={strides} of the backbone: each level must work at half the resolution")
        self.widths = widths
        self.up = nnx.List([join(fine, coarse, rngs=rngs) for fine, coarse in itertools.pairwise(widths)])
        levels = zip(widths[:-1], blocks, strict=True)
        self.blocks = nnx.List([nnx.List([Block(w, rngs=rngs) for _ in range(n)]) for w, n in levels])
        self.classify = Classify(widths[0], classes, strides[0], sharp=True, rngs=rngs)

    def decode(self, maps: Sequence[Array]) -> jax.Array:
        x: jax.Array = jnp.asarray(maps[-1])
        for level in reversed(range(len(self.blocks))):
            x = self.up[level](maps[level], x)
            for block in self.blocks[level]:
                x = block(x)
        return x

    def sites(self) -> Iterator[Site]:
        return sites_of(self.blocks, self.widths)


def of_levels(blocks: tuple[int, ...], backbone: BackboneConfig) -> Iterator[Rule]:
    """Of a field `blocks` of a decoder."""
    levels = len(backbone.widths) - 1
    wanted = f"one number for each level but the coarsest, which are {levels}"
    yield Rule("blocks", blocks, len(blocks) == levels, wanted)
