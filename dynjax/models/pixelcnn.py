"""A gated PixelCNN (van den Oord et al. 2016, arXiv:1606.05328): every pixel given all those before it.

What a sampler needs is the same for every autoregressive family. A picture is a row of *units* (here rows of pixels);
`start` gives the cache that stands for "no unit yet", `window` evaluates some units after those of a cache, `advance`
moves the cache on over those of them that are final, and `draw_unit` draws one unit pixel by pixel.

Letters: B examples, H W pixels, C channels, R rows of a window, E features of an input, F of a layer, L layers,
P parameters of a pixel.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from dynjax.models import rules
from dynjax.models.likelihoods import DrawnConfig, make_likelihood
from dynjax.models.registry import Family, built_by, register
from dynjax.models.rules import Depth, Rule, Width


@dataclasses.dataclass(frozen=True)
class PixelCNNConfig(DrawnConfig):
    """A gated PixelCNN, which draws a picture pixel after pixel."""

    family: Literal["pixelcnn"] = "pixelcnn"
    features: Width = 32
    layers: Depth = 8
    embed: bool = False
    """Values are names (codes), not brightness."""


Cache = dict[str, Array]


def _gate(x: Array, condition: Array | None) -> Array:
    """tanh of one half of the features times sigmoid of the other (eq. 2; with a condition, eq. 4)."""
    a, b = jnp.split(x if condition is None else x + condition, 2, -1)
    return jnp.tanh(a) * jax.nn.sigmoid(b)


def _across(x: Array, kernel: Array) -> Array:
    """A convolution over rows and columns, SAME in columns; in rows only where the whole kernel fits."""
    side = kernel.shape[1] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), ((0, 0), (side, side)), dimension_numbers=numbers)


class GatedLayer(nnx.Module):
    """One layer of both stacks, each around a shortcut (figure 2 of the paper).

    The vertical stack at a row knows the rows before it, so it may look at its own row and the one before; the
    horizontal stack looks at its pixel, the one to the left, and the vertical stack.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        f, init = features, nnx.initializers.lecun_normal()
        self.down = nnx.Param(init(rngs.params(), (2, 3, f, 2 * f)))
        self.down_bias = nnx.Param(jnp.zeros((2 * f,)))
        self.down_out = nnx.Param(init(rngs.params(), (f, f)))
        self.across = nnx.Param(init(rngs.params(), (f, 2 * f)))
        self.left = nnx.Param(init(rngs.params(), (2, f, 2 * f)))
        self.left_bias = nnx.Param(jnp.zeros((2 * f,)))
        self.left_out = nnx.Param(init(rngs.params(), (f, f)))

    def vertical(self, v: Array, above: Array, condition: Array | None) -> tuple[Array, Array]:
        """Vertical features (B, R, W, F) after `v`, whose row before is `above` (B, 1, W, F); and what they give to the
        horizontal stack (B, R, W, 2 F)."""
        x = _across(jnp.concatenate([above, v], 1), self.down[...]) + self.down_bias[None, None, None]
        v = v + _gate(x, condition) @ self.down_out[...]
        return v, v @ self.across[...] + self.left_bias[None, None, None]

    def horizontal(self, h: Array, left: Array, given: Array, condition: Array | None) -> Array:
        """Horizontal features after `h`, where `left` are those of the pixels to the left; any axes before the last."""
        x = left @ self.left[0] + h @ self.left[1] + given
        return h + _gate(x, condition) @ self.left_out[...]


class PixelCNN(nnx.Module):
    """Parameters of every pixel's distribution given the pixels before it, in the order of rows, then columns.

    Deviations from the paper: the first layer sees five pixels of the row before and one to the left, and further
    layers 2x3 and 1x2 pixels; both stacks have shortcuts; the channels of a pixel are left to the likelihood;
    every row and column has features of its own, since the layers alone do not see how far down the picture they are.

    Args:
        classes: number of labels that pictures can be asked for by, where they are conditional.
    """

    def __init__(self, config: PixelCNNConfig, classes: int = 0, *, rngs: nnx.Rngs):
        shape, classes = config.shape, classes if config.conditional else 0
        self.shape, self.classes, self.features = shape, classes, config.features
        self.likelihood = make_likelihood(config.likelihood, config.values, shape[2], config.components)
        f, init = config.features, nnx.initializers.lecun_normal()
        self.embed = nnx.Embed(config.values, f, rngs=rngs) if config.embed else None
        entered = f if config.embed else shape[2] + 1
        self.enter_down = nnx.Param(init(rngs.params(), (1, 5, entered, f)))
        self.enter_across = nnx.Param(init(rngs.params(), (f, f)))
        self.enter_left = nnx.Param(init(rngs.params(), (entered, f)))
        small = nnx.initializers.normal(0.02)
        self.row, self.column = (nnx.Param(small(rngs.params(), (n, f))) for n in shape[:2])
        self.layers = nnx.List([GatedLayer(f, rngs=rngs) for _ in range(config.layers)])
        self.hidden = nnx.Linear(f, f, rngs=rngs)
        self.head = nnx.Linear(f, self.likelihood.parameters, rngs=rngs)
        self.condition = nnx.Embed(classes, 2 * f, rngs=rngs) if classes else None

    window_size = 1
    """Rows that `sampling.fixed_point` draws at once. More rows take fewer calls, which costs more than it saves on a
    CPU (`benchmarks/sampling.py`)."""

    @property
    def units(self) -> tuple[int, int]:
        """Number of units, and pixels of each."""
        return self.shape[0], self.shape[1]

    def __call__(self, x: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None) -> Float[Array, "B H W P"]:
        return self.window(x, self.start(x.shape[0], x.shape[1]), jnp.zeros(x.shape[0], jnp.int32), label)[0]

    def _enter(self, x: Array) -> Array:
        """Features (..., E) of pixels (..., C); outside the picture they are 0."""
        if self.embed is not None:
            return self.embed(x[..., 0])
        scaled = 2 * x.astype(self.head.kernel.dtype) / (self.likelihood.values - 1) - 1
        return jnp.concatenate([scaled, jnp.ones_like(scaled[..., :1])], -1)

    def _conditions(self, label: Array | None) -> Array | None:
        if self.condition is None or label is None:
            return None
        # -1 asks for no class in particular: the mean of all.
        known = self.condition(jnp.maximum(label, 0))
        return jnp.where(label[:, None] >= 0, known, self.condition.embedding[...].mean(0)[None])[:, None, None]

    def start(self, examples: int, window: int = 1) -> Cache:
        """The cache before the first row: per example the row before, at the input and at every layer."""
        width, layers, entered = self.shape[1], len(self.layers), self.enter_left.shape[0]
        kind = self.head.kernel.dtype
        return {
            "input": jnp.zeros((examples, width, entered), kind),
            "layers": jnp.zeros((examples, layers, width, self.features), kind),
        }

    def _vertical(
        self, before: Array, cache: Cache, first: Array, condition: Array | None
    ) -> tuple[Array, Array, list[Array]]:
        """The vertical stack of rows from number `first` (B,) on, whose rows before are `before` (B, R, W, E): what the
        horizontal stack starts from (B, R, W, F), the features at every layer (B, L, R, W, F), and what each gives
        (B, R, W, 2 F)."""
        number = jnp.minimum(first[:, None] + jnp.arange(before.shape[1])[None], self.shape[0] - 1)
        place = self.row[...][number][:, :, None] + self.column[None, None]
        v = _across(before, self.enter_down[...]) + place
        start, seen, gives = v @ self.enter_across[...], [], []
        for level, layer in enumerate(self.layers):
            seen.append(v)
            v, given = layer.vertical(v, cache["layers"][:, level, None], condition)
            gives.append(given)
        return start, jnp.stack(seen, 1), gives

    def _finish(self, h: Array) -> Array:
        return self.head(nnx.relu(self.hidden(nnx.relu(h))))

    def window(
        self, x: Int[Array, "B R W C"], cache: Cache, first: Int[Array, " B"], label: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B R W P"], Cache]:
        """Parameters of R rows after those that `cache` stands for, and what these rows would leave in a cache."""
        condition, entered = self._conditions(label), self._enter(x)
        before = jnp.concatenate([cache["input"][:, None], entered[:, :-1]], 1)
        start, seen, gives = self._vertical(before, cache, first, condition)
        left = jnp.pad(entered[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        h = start + left @ self.enter_left[...]
        for layer, given in zip(self.layers, gives, strict=True):
            left = jnp.pad(h[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
            h = layer.horizontal(h, left, given, condition)
        return self._finish(h), {"input": entered, "layers": seen}

    def advance(self, cache: Cache, trail: Cache, count: Int[Array, " B"]) -> Cache:
        """`cache` after the first `count` rows of a window, which left `trail`."""
        last = jnp.maximum(count - 1, 0)

        def pick(rows: Array, axis: int) -> Array:
            return jax.vmap(lambda each, k: lax.dynamic_index_in_dim(each, k, axis - 1, keepdims=False))(rows, last)

        new = {"input": pick(trail["input"], 1), "layers": pick(trail["layers"], 2)}
        moved = count > 0
        return jax.tree.map(lambda n, o: jnp.where(moved.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, cache)

    def draw_unit(
        self, cache: Cache, first: Int[Array, ""], label: Int[Array, " B"] | None, draw: Callable[[Array, Any], Array]
    ) -> tuple[Int[Array, "B W C"], Cache]:
        """One row, pixel by pixel, and the cache after it; `draw(params (B, P), column)` gives a pixel (B, C)."""
        condition = self._conditions(label)
        flat = None if condition is None else condition[:, 0, 0]
        before = cache["input"][:, None]
        starts, seen, given_by = self._vertical(before, cache, jnp.full(before.shape[0], first), condition)
        start, gives = starts[:, 0], jnp.stack([given[:, 0] for given in given_by], 1)
        examples, width = start.shape[:2]

        def body(column: Array, carry: tuple) -> tuple:
            entered, lefts, row = carry
            at = lambda a: lax.dynamic_index_in_dim(a, column, -2, keepdims=False)  # noqa: E731
            h = at(start) + entered @ self.enter_left[...]
            given, kept = at(gives), []
            for number, layer in enumerate(self.layers):
                kept.append(h)
                h = layer.horizontal(h, lefts[number], given[:, number], flat)
            pixel = draw(self._finish(h), column)
            return self._enter(pixel), kept, lax.dynamic_update_index_in_dim(row, pixel, column, 1)

        nothing = jnp.zeros((examples, self.features), start.dtype)
        carry = (
            jnp.zeros((examples, self.enter_left.shape[0]), start.dtype),
            [nothing for _ in self.layers],
            jnp.zeros((examples, width, self.shape[2]), jnp.int32),
        )
        row = lax.fori_loop(0, width, body, carry)[2]
        return row, {"input": self._enter(row), "layers": seen[:, :, 0]}


def _rules(config: PixelCNNConfig) -> Iterator[Rule]:
    yield from rules.drawn(config.shape, config.likelihood, config.embed)


FAMILY = register(
    Family(
        PixelCNNConfig,
        built_by(PixelCNN),
        task="autoregressive",
        tiny=lambda config: dict(shape=(8, 8, config.shape[2]), features=4, layers=1),
        rules=_rules,
    )
)
