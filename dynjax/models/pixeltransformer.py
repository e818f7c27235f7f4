"""A causal transformer over pixels (Parmar et al. 2018, arXiv:1802.05751; Chen et al. 2020, "iGPT"), or over codes.

A unit, which samplers advance by, is one pixel; the cache holds the keys and values of all pixels before it. See
`dynjax.models.pixelcnn` for what samplers need.

Letters: B examples, H W pixels, C channels, R pixels of a window, S of a cache, F features, N heads, D features of a
head, P parameters of a pixel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dynjax.config import PixelTransformerConfig
from dynjax.models.likelihoods import make_likelihood

Cache = dict[str, Array]


class CausalBlock(nnx.Module):
    """Attention to the pixels before and the pixel itself, then an MLP; both normalised first and around a shortcut."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        if features % heads:
            raise ValueError(f"features={features} is not a multiple of heads={heads}")
        self.heads = heads
        self.norm1, self.norm2 = nnx.LayerNorm(features, rngs=rngs), nnx.LayerNorm(features, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(features, features, rngs=rngs)
        self.up, self.down = (
            nnx.Linear(a, b, rngs=rngs) for a, b in ((features, 4 * features), (4 * features, features))
        )

    def __call__(self, x: Array, keys: Array, values: Array, first: Array) -> tuple[Array, Array, Array]:
        """Features (B, R, F) of pixels from number `first` (B,) on, and keys and values (B, S, N, D) with theirs in
        place; those of later pixels may be anything."""
        q, k, v = (a.reshape(*x.shape[:2], self.heads, -1) for a in jnp.split(self.qkv(self.norm1(x)), 3, -1))
        put = jax.vmap(lambda a, new, at: lax.dynamic_update_slice_in_dim(a, new, at, 0))
        keys, values = put(keys, k, first), put(values, v, first)
        number = first[:, None] + jnp.arange(x.shape[1])[None]
        seen = jnp.arange(keys.shape[1])[None, None] <= number[..., None]
        y = jax.nn.dot_product_attention(q, keys, values, mask=seen[:, None])
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)))), keys, values


class PixelTransformer(nnx.Module):
    """Parameters of every pixel's distribution given the pixels before it, in the order of rows, then columns.

    Args:
        shape: (H, W, C) of the pictures.
        classes: number of labels that pictures can be asked for by; 0 for none.
    """

    window_size = 16
    """Pixels that `sampling.fixed_point` draws at once."""

    def __init__(
        self, config: PixelTransformerConfig, shape: tuple[int, int, int], classes: int = 0, *, rngs: nnx.Rngs
    ):
        self.shape, self.classes = shape, classes
        self.likelihood = make_likelihood(config.likelihood, config.values, shape[2], config.components)
        f = config.features
        self.embed = nnx.Embed(config.values, f, rngs=rngs) if config.embed else None
        self.enter = None if config.embed else nnx.Linear(shape[2], f, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.begin = nnx.Param(small(rngs.params(), (f,)))
        self.row, self.column = (nnx.Param(small(rngs.params(), (n, f))) for n in shape[:2])
        self.blocks = nnx.List([CausalBlock(f, config.heads, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(f, rngs=rngs)
        self.head = nnx.Linear(f, self.likelihood.parameters, rngs=rngs)
        self.condition = nnx.Embed(classes, f, rngs=rngs) if classes else None

    @property
    def units(self) -> tuple[int, int]:
        """Number of units, and pixels of each."""
        return self.shape[0] * self.shape[1], 1

    def __call__(self, x: Int[Array, "B H W C"], label: Int[Array, "B"] | None = None) -> Float[Array, "B H W P"]:
        examples, pixels = x.shape[0], self.units[0]
        flat = x.reshape(examples, pixels, 1, self.shape[2])
        params, _ = self.window(flat, self.start(examples, 0), jnp.zeros(examples, jnp.int32), label)
        return params.reshape(examples, *self.shape[:2], -1)

    def start(self, examples: int, window: int = 1) -> Cache:
        """The cache before the first pixel, with room for windows that reach past the last."""
        heads, features = self.blocks[0].heads, self.begin.shape[0]
        room = (examples, len(self.blocks), self.units[0] + window, heads, features // heads)
        kind = self.head.kernel.dtype
        return {
            "before": jnp.broadcast_to(self.begin[None], (examples, features)),
            "keys": jnp.zeros(room, kind),
            "values": jnp.zeros(room, kind),
        }

    def _enter(self, x: Array) -> Array:
        if self.embed is not None:
            return self.embed(x[..., 0])
        return self.enter(2 * x.astype(self.head.kernel.dtype) / (self.likelihood.values - 1) - 1)

    def window(
        self, x: Int[Array, "B R 1 C"], cache: Cache, first: Int[Array, "B"], label: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B R 1 P"], Cache]:
        """Parameters of R pixels from number `first` on, and what these would leave in a cache."""
        entered = self._enter(x[:, :, 0])
        h = jnp.concatenate([cache["before"][:, None], entered[:, :-1]], 1)
        number = jnp.minimum(first[:, None] + jnp.arange(x.shape[1])[None], self.units[0] - 1)
        h = h + self.row[...][number // self.shape[1]] + self.column[...][number % self.shape[1]]
        if self.condition is not None and label is not None:
            known = jnp.where(label[:, None] >= 0, self.condition(jnp.maximum(label, 0)), 0)
            h = h + known[:, None]
        keys, values = [], []
        for level, block in enumerate(self.blocks):
            h, k, v = block(h, cache["keys"][:, level], cache["values"][:, level], first)
            keys.append(k)
            values.append(v)
        trail = {"before": entered, "keys": jnp.stack(keys, 1), "values": jnp.stack(values, 1)}
        return self.head(self.norm(h))[:, :, None], trail

    def advance(self, cache: Cache, trail: Cache, count: Int[Array, "B"]) -> Cache:
        """`cache` after the first `count` pixels of a window, which left `trail`."""
        # Keys and values of pixels that are not final yet are written anew before anybody looks at them.
        last = jnp.maximum(count - 1, 0)
        before = jax.vmap(lambda each, k: lax.dynamic_index_in_dim(each, k, 0, keepdims=False))(trail["before"], last)
        return trail | {"before": jnp.where((count > 0)[:, None], before, cache["before"])}

    def draw_unit(
        self, cache: Cache, first: Int[Array, ""], label: Int[Array, "B"] | None, draw: Callable[[Array, Any], Array]
    ) -> tuple[Int[Array, "B 1 C"], Cache]:
        """One pixel, and the cache after it; `draw(params (B, P), place)` gives a pixel (B, C)."""
        examples = cache["before"].shape[0]
        # What stands in the pixel itself does not matter for its own parameters.
        nothing = jnp.zeros((examples, 1, 1, self.shape[2]), jnp.int32)
        params, trail = self.window(nothing, cache, jnp.full(examples, first), label)
        pixel = draw(params[:, 0, 0], jnp.int32(0))
        return pixel[:, None], trail | {"before": self._enter(pixel)}


def build(
    config: PixelTransformerConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None
) -> PixelTransformer:
    """The model of `config`; conditional on `num_classes` labels if it says so."""
    model = PixelTransformer(config, config.shape, num_classes if config.conditional else 0, rngs=rngs)
    if twin_params is not None:
        nnx.update(model, twin_params)
    return model
