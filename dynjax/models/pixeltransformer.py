"""A causal transformer over pixels (Parmar et al. 2018, arXiv:1802.05751; Chen et al. 2020, "iGPT"), or over codes.

A unit, which samplers advance by, is one pixel; the cache holds the keys and values of all pixels before it. See
`dynjax.models.pixelcnn` for what samplers need.

With exits a pixel takes no further block once its prediction is sure (CALM, Schuster et al. 2022, arXiv:2207.07061):
one more autoregressive model for every threshold, whose bits per dimension and samples are as exact as without.

Letters: B examples, H W pixels, C channels, R pixels of a window, S of a cache, F features, N heads, D features of a
head, P parameters of a pixel, L blocks.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dynjax.core.decision import Decision
from dynjax.models import rules
from dynjax.models.likelihoods import DrawnConfig, make_likelihood
from dynjax.models.registry import Family, built_by, register
from dynjax.models.rules import Depth, Rule, Width
from dynjax.ops.doubt import PixelExits


@dataclasses.dataclass(frozen=True)
class PixelTransformerConfig(DrawnConfig):
    """A causal transformer over pixels, which draws a picture pixel after pixel."""

    family: Literal["pixeltransformer"] = "pixeltransformer"
    features: Width = 64
    layers: Depth = 4
    heads: Depth = 4
    embed: bool = False
    """Values are names (codes), not brightness."""
    dynamics: Literal["static", "exits"] = "static"
    """static: dynamics are in how it is sampled; exits: a pixel takes no further block once its prediction is sure."""
    gate: Literal["learned", "random"] = "learned"
    """learned: by the entropy of the prediction; random: the control."""


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

    def remember(self, x: Array, keys: Array, values: Array, first: Array) -> tuple[Array, Array]:
        """Keys and values (B, S, N, D) with those of pixels from number `first` (B,) on, of features `x` (B, R, F), in
        place."""
        features = x.shape[-1]
        both = self.norm1(x) @ self.qkv.kernel[:, features:]
        k, v = (a.reshape(*x.shape[:2], self.heads, -1) for a in jnp.split(both, 2, -1))
        put = jax.vmap(lambda a, new, at: lax.dynamic_update_slice_in_dim(a, new, at, 0))
        return put(keys, k, first), put(values, v, first)

    def look(self, x: Array, keys: Array, values: Array, first: Array) -> Array:
        """Features (B, R, F) of pixels from number `first` (B,) on, after the block; keys and values of later pixels
        may be anything."""
        features = x.shape[-1]
        q = (self.norm1(x) @ self.qkv.kernel[:, :features]).reshape(*x.shape[:2], self.heads, -1)
        number = first[:, None] + jnp.arange(x.shape[1])[None]
        seen = jnp.arange(keys.shape[1])[None, None] <= number[..., None]
        y = jax.nn.dot_product_attention(q, keys, values, mask=seen[:, None])
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class PixelTransformer(nnx.Module):
    """Parameters of every pixel's distribution given the pixels before it, in the order of rows, then columns.

    Args:
        classes: number of labels that pictures can be asked for by, where they are conditional.
    """

    window_size = 16
    """Pixels that `sampling.fixed_point` draws at once."""

    def __init__(self, config: PixelTransformerConfig, classes: int = 0, *, rngs: nnx.Rngs):
        shape, classes = config.shape, classes if config.conditional else 0
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
        random = config.gate == "random"
        exits = config.dynamics == "exits"
        self.exits = PixelExits(config.layers, self.likelihood, random=random) if exits else None

    @property
    def units(self) -> tuple[int, int]:
        """Number of units, and pixels of each."""
        return self.shape[0] * self.shape[1], 1

    def __call__(self, x: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None) -> Float[Array, "B H W P"]:
        examples, pixels = x.shape[0], self.units[0]
        flat = x.reshape(examples, pixels, 1, self.shape[2])
        params, _ = self.window(flat, self.start(examples, 0), jnp.zeros(examples, jnp.int32), label)
        return params.reshape(examples, *self.shape[:2], -1)

    def predictions(
        self, x: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None
    ) -> list[Float[Array, "B H W P"]]:
        """What the head gives after every block: with exits all of them are trained. Without, the last alone."""
        if self.exits is None:
            return [self(x, label)]
        first, cache = jnp.zeros(x.shape[0], jnp.int32), self.start(x.shape[0], 0)
        h, _ = self._begin(x.reshape(x.shape[0], self.units[0], 1, self.shape[2]), cache, first, label)
        found = []
        for level, block in enumerate(self.blocks):
            h = block.look(h, *block.remember(h, cache["keys"][:, level], cache["values"][:, level], first), first)
            found.append(self._params(h).reshape(*x.shape[:3], -1))
        return found

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
        assert self.enter is not None
        return self.enter(2 * x.astype(self.head.kernel.dtype) / (self.likelihood.values - 1) - 1)

    def _begin(self, x: Array, cache: Cache, first: Array, label: Array | None) -> tuple[Array, Array]:
        """Features (B, R, F) that the first block takes, and those that the pixels themselves enter with."""
        entered = self._enter(x[:, :, 0])
        h = jnp.concatenate([cache["before"][:, None], entered[:, :-1]], 1)
        number = jnp.minimum(first[:, None] + jnp.arange(x.shape[1])[None], self.units[0] - 1)
        h = h + self.row[...][number // self.shape[1]] + self.column[...][number % self.shape[1]]
        if self.condition is not None and label is not None:
            known = jnp.where(label[:, None] >= 0, self.condition(jnp.maximum(label, 0)), 0)
            h = h + known[:, None]
        return h, entered

    def _params(self, h: Float[Array, "B R F"]) -> Float[Array, "B R P"]:
        return self.head(self.norm(h))

    def window(
        self, x: Int[Array, "B R 1 C"], cache: Cache, first: Int[Array, " B"], label: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B R 1 P"], Cache]:
        """Parameters of R pixels from number `first` on, and what these would leave in a cache."""
        h, entered = self._begin(x, cache, first, label)
        exits, keys, values, keeps = self.exits, [], [], [jnp.ones(h.shape[:2])]
        decisions: list[Decision] = []
        for level, block in enumerate(self.blocks):
            # Who has left is remembered as they were, for those who come after them.
            k, v = block.remember(h, cache["keys"][:, level], cache["values"][:, level], first)
            keys.append(k)
            values.append(v)
            if exits is None or level == 0:
                h = block.look(h, k, v, first)
                continue
            decisions.append(exits(level - 1, self._params(h)))
            keeps.append(keeps[-1] * decisions[-1].keep[..., 0])
            h = exits.go_on(block.look, (h, k, v, first), keeps[-1])
        if exits is not None and exits.tracing and x.shape[1] == self.units[0]:
            looks = [block.look for block in self.blocks]
            exits.account_pixels(decisions, keeps, looks, (h, keys[0], values[0], first), self.shape[:2])
        trail = {"before": entered, "keys": jnp.stack(keys, 1), "values": jnp.stack(values, 1)}
        return self._params(h)[:, :, None], trail

    def advance(self, cache: Cache, trail: Cache, count: Int[Array, " B"]) -> Cache:
        """`cache` after the first `count` pixels of a window, which left `trail`."""
        # Keys and values of pixels that are not final yet are written anew before anybody looks at them.
        last = jnp.maximum(count - 1, 0)
        before = jax.vmap(lambda each, k: lax.dynamic_index_in_dim(each, k, 0, keepdims=False))(trail["before"], last)
        return trail | {"before": jnp.where((count > 0)[:, None], before, cache["before"])}

    def draw_unit(
        self, cache: Cache, first: Int[Array, ""], label: Int[Array, " B"] | None, draw: Callable[[Array, Any], Array]
    ) -> tuple[Int[Array, "B 1 C"], Cache]:
        """One pixel, and the cache after it; `draw(params (B, P), place)` gives a pixel (B, C)."""
        examples = cache["before"].shape[0]
        # What stands in the pixel itself does not matter for its own parameters.
        nothing = jnp.zeros((examples, 1, 1, self.shape[2]), jnp.int32)
        params, trail = self.window(nothing, cache, jnp.full(examples, first), label)
        pixel = draw(params[:, 0, 0], jnp.int32(0))
        return pixel[:, None], trail | {"before": self._enter(pixel)}


def _rules(config: PixelTransformerConfig) -> Iterator[Rule]:
    yield from rules.drawn(config.shape, config.likelihood, config.embed)
    yield from rules.heads_share("features", config.features, config.heads)
    if config.dynamics == "exits":
        yield Rule("layers", config.layers, config.layers >= 2, "at least 2: exits are between them")


FAMILY = register(
    Family(
        PixelTransformerConfig,
        built_by(PixelTransformer),
        task="autoregressive",
        tiny=lambda config: dict(shape=(8, 8, config.shape[2]), features=8, layers=2, heads=2),
        rules=_rules,
    )
)
