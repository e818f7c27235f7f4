"""A decoder of self-attention over the positions of a map.

Vaswani et al. 2017 (arXiv:1706.03762) on the map of a backbone, as in Transformer decoders of segmentation; large maps
attend to means of theirs (Zhu et al. 2019, arXiv:1908.07678, section 3.3; Wang et al. 2021, arXiv:2102.12122).

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from dynjax.models.blocks import Classify, ClassifyingHead
from dynjax.models.dense import Backbone, HeadConfig, Site
from dynjax.models.heads.deeplab import level_of
from dynjax.models.heads.pspnet import Gather, pooled
from dynjax.models.registry import Family, register
from dynjax.models.rules import Depth, Range, Rule, Width


@dataclasses.dataclass(frozen=True)
class AttentionHeadConfig:
    """Layers in which every position of the map attends to all."""

    family: Literal["attention"] = "attention"
    features: Width = 64
    heads: Depth = 4
    layers: Depth = 2
    stride: Annotated[int, Range(1, 32)] = 8
    """Pixels of the picture, along a side, to one of the map; coarser maps are enlarged and added to it."""
    keys: Annotated[int, Range(0, 1024)] = 8
    """Parts of the map, along a side, whose means are attended to; 0: every position, whose work and memory grow with
    the square of their number."""


class AttentionLayer(nnx.Module):
    """Attention and a network of two layers, each behind a normalisation and around a shortcut."""

    def __init__(self, features: int, heads: int, keys: int, *, rngs: nnx.Rngs):
        self.keys = keys
        self.norm1, self.norm2 = nnx.LayerNorm(features, rngs=rngs), nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
        self.wide, self.narrow = (
            nnx.Linear(*pair, rngs=rngs) for pair in ((features, 2 * features), (2 * features, features))
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = self.norm1(x)
        # A map with no more positions than there are keys is attended to as it is.
        few = self.keys and self.keys**2 < y.shape[1] * y.shape[2]
        seen = pooled(y, self.keys) if few else y
        queries, keys = (each.reshape(each.shape[0], -1, each.shape[-1]) for each in (y, seen))
        x = x + self.attention(queries, keys).reshape(x.shape)
        return x + self.narrow(nnx.gelu(self.wide(self.norm2(x))))


class AttentionHead(ClassifyingHead):
    """The maps from the coarsest up to that of `stride` as one, layers of attention, and logits.

    Positions are not encoded: the backbone's padding tells them, and the decoder works at any size.
    """

    def __init__(self, config: AttentionHeadConfig, backbone: Backbone, classes: int, *, rngs: nnx.Rngs):
        features, self.level, self.features = config.features, level_of(config.stride, backbone), config.features
        self.gather = Gather(backbone, self.level, features, rngs=rngs)
        layers = [AttentionLayer(features, config.heads, config.keys, rngs=rngs) for _ in range(config.layers)]
        self.layers = nnx.List(layers)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.classify = Classify(features, classes, config.stride, rngs=rngs)

    def decode(self, maps: Sequence[Array]) -> jax.Array:
        x: jax.Array = self.gather(maps)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def sites(self) -> Iterator[Site]:
        """None: a layer looks at the whole map."""
        return iter(())

    def scales(self) -> Iterator[Site]:
        return self.gather.scales()


def _rules(config: AttentionHeadConfig, backbone: object) -> Iterator[Rule]:
    good = config.features % config.heads == 0
    yield Rule("features", config.features, good, f"a multiple of --model.heads, which is {config.heads}")


SMALL = dict(features=8, heads=2, layers=1, stride=2, keys=2)
FAMILY = register(Family(AttentionHeadConfig, AttentionHead, tiny=SMALL, rules=_rules), HeadConfig)
