"""Gates decide: small functions of arrays, and small modules that hold their parameters and call them.

A gate is any callable `x -> Decision`. The modules here draw noise and pass gradients straight through when training,
and compare their logit with an adjustable threshold when `deterministic` (`nnx.view(model, deterministic=True)`). Their
logits start open.

Letters: B examples, H W pixels, C features, h w tiles, K branches, G channel groups.
"""

import functools
from collections.abc import Callable
from typing import TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from dynjax.core.decision import ONE, Decision, Place

OPEN = 2.0
"""Logit that gates start from: about 0.88 of the units are kept."""

LOWEST, HIGHEST = -1000.0, 1000.0
"""Thresholds under which everything is kept, and nothing: beyond the logits of nets that have grown sure."""


class GateParam(nnx.Param):
    """A parameter of a gate; optimizers give it a lower learning rate and no decay."""


class Threshold(nnx.Variable):
    """The logit from which a gate keeps. A variable, so that one compiled function serves every budget."""


# Pure functions


def straight_through(hard: Float[Array, "..."], soft: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exactly `hard` forward, the gradient of `soft` backward (Bengio et al. 2013, arXiv:1308.3432)."""
    return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def threshold(logits: Float[Array, "..."], at: Float[Array, ""] | float = 0.0) -> Float[Array, "..."]:
    """1 where the logit is at least `at`, else 0; no gradient."""
    return (logits >= at).astype(logits.dtype)


def gumbel_sigmoid(logits: Float[Array, "..."], key: jax.Array, temperature: float = 2 / 3) -> Float[Array, "..."]:
    """Binary straight-through Gumbel choice: 1 with probability sigmoid(logits) (Maddison et al. 2017,
    arXiv:1611.00712, eq. 13).

    The difference of two Gumbel variables is logistic, so one logistic sample is drawn. `temperature` at most 1.
    """
    noisy = logits + jax.random.logistic(key, logits.shape, logits.dtype)
    return straight_through(threshold(noisy), jax.nn.sigmoid(noisy / temperature))


def gumbel_softmax(logits: Float[Array, "... K"], key: jax.Array, temperature: float = 2 / 3) -> Float[Array, "... K"]:
    """Categorical straight-through Gumbel choice, one-hot (Jang et al. 2017, arXiv:1611.01144, section 2.2)."""
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return straight_through(one_hot_argmax(noisy), jax.nn.softmax(noisy / temperature))


def one_hot_argmax(logits: Float[Array, "... K"]) -> Float[Array, "... K"]:
    """One-hot of the largest logit; the first of equals."""
    return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=logits.dtype)


def content_chance(
    content: Float[Array, "..."], start: Float[Array, "..."] | float = 0.0, turns: float | int = 97
) -> Float[Array, "..."]:
    """Looks drawn from [0, 1) by chance, and is a function of the content, so that every execution agrees.

    A continuous one: rounding in an earlier layer must not draw the whole choice anew.
    """
    return jnp.mod(start + turns * content, 1)


def logistic(uniform: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logistic noise from uniform."""
    return jax.scipy.special.logit(jnp.clip(uniform, 1e-6, 1 - 1e-6))


def top_k(logits: Float[Array, "... N"], k: int) -> Float[Array, "... N"]:
    """1 for exactly the `k` largest logits of the last axis, the gradient of the sigmoid backward.

    Raises:
        ValueError: if `k` is not in [0, N].
    """
    if not 0 <= k <= logits.shape[-1]:
        raise ValueError(f"k={k} must be between 0 and the {logits.shape[-1]} units there are")
    order = jnp.argsort(-logits, axis=-1, stable=True)
    hard = (jnp.argsort(order, axis=-1) < k).astype(logits.dtype)
    return straight_through(hard, jax.nn.sigmoid(logits))


def pool_tiles(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """Mean over each tile of `size` pixels; a tile cut by the border counts only the pixels it has."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    rows, columns = (np.minimum(size, n - np.arange(0, n, size)) for n in x.shape[1:3])
    pixels = np.outer(rows, columns)[None, :, :, None].astype(wide.dtype)
    return (_sum_tiles(wide, size) / pixels).astype(x.dtype)


def max_tiles(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """Maximum over each tile of `size` pixels."""
    return _over_tiles(jnp.maximum, x, size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_tiles(x: jax.Array, size: int) -> jax.Array:
    return _over_tiles(jnp.add, x, size)


@_sum_tiles.defjvp
def _sum_tiles_jvp(size, primals, tangents):
    # Of a sum the gradient is one broadcast; of halves that are added it would be a padded map for each.
    (x,), (dx,) = primals, tangents
    dx = jnp.pad(dx, ((0, 0), (0, -x.shape[1] % size), (0, -x.shape[2] % size), (0, 0)))
    tiles = dx.reshape(x.shape[0], dx.shape[1] // size, size, dx.shape[2] // size, size, x.shape[3])
    return _sum_tiles(x, size), tiles.sum((2, 4))


def _over_tiles(f: Callable, x: jax.Array, size: int) -> jax.Array:
    """`f` over the pixels of each tile, (B, H, W, C) to (B, h, w, C).

    Rows first: what is put together lies in long rows, of which a CPU takes many numbers at a time. XLA's own reduction
    over both axes may take one at a time, and ten times as long.
    """
    for axis in (1, 2):
        number = x.shape[axis]
        whole = number // size * size
        ends = ((0, whole, size), (whole, number, number - whole))
        parts = [(jax.lax.slice_in_dim(x, a, b, axis=axis), pixels) for a, b, pixels in ends if a < b]
        x = jnp.concatenate([_folded(f, part, axis, pixels) for part, pixels in parts], axis)
    return x


def _folded(f: Callable, x: jax.Array, axis: int, number: int) -> jax.Array:
    """`f` over so many at a time along an axis: by halves, which are few operations, and the last eight in one pass."""

    def every(step):
        # Strides and no reshape: XLA would make the map once more for each shape that it is wanted in.
        return (jax.lax.slice_in_dim(x, start, None, step, axis) for start in range(step))

    while number > 8 and number % 2 == 0:
        x, number = f(*every(2)), number // 2
    return functools.reduce(f, every(number))


def log_entropy(logits: Float[Array, "... K"]) -> Float[Array, "..."]:
    """Logarithm of the entropy of softmax(logits) in nats, exact where it is far below what float32 tells from 0."""
    largest = logits.max(-1)
    top = one_hot_argmax(logits) > 0
    rest = jax.nn.logsumexp(jnp.where(top, -jnp.inf, logits), -1)
    total = jnp.logaddexp(largest, rest)
    # -log p of the largest is log(1 + e^gap), and of the others the difference of logits.
    gap = rest - largest
    own = jnp.where(gap < -15, gap, jnp.log(jax.nn.softplus(jnp.maximum(gap, -15)))) + largest - total
    below = jnp.where(top, 1.0, total[..., None] - logits)
    others = jax.nn.logsumexp(jnp.where(top, -jnp.inf, jnp.log(below) - below), -1)
    return jnp.logaddexp(own, others)


# Modules


class Gate(nnx.Module):
    """A gate that draws noise unless it is `deterministic`: the abstract base of those that do."""

    deterministic: bool = False

    def set_view(self, deterministic: bool | None = None) -> None:
        if deterministic is not None:
            self.deterministic = deterministic


class Options(TypedDict, total=False):
    """Options of learned gates: units of the hidden layer, what logits start from, and that of the relaxed choice."""

    hidden: int
    bias: float | np.ndarray
    temperature: float


class _Logits(Gate):
    """Logits from pooled features: normalise, a hidden layer, a linear layer. The state that every learned gate has."""

    def __init__(
        self, features: int, units: int, *, hidden: int = 16, bias=OPEN, temperature: float = 2 / 3, rngs: nnx.Rngs
    ):
        if not 0 < temperature <= 1:
            raise ValueError(
                f"temperature={temperature} must be in (0, 1]: above 1 straight-through gradients are badly biased"
            )
        init = nnx.initializers.lecun_normal()
        self.scale = GateParam(jnp.ones((features,)))
        self.hidden = GateParam(init(rngs.params(), (features, hidden)))
        self.hidden_bias = GateParam(jnp.zeros((hidden,)))
        self.out = GateParam(init(rngs.params(), (hidden, units)) * 0.1)
        self.bias = GateParam(jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (units,)))
        self.threshold = Threshold(jnp.zeros(()))
        self.rngs = nnx.Rngs(gate=rngs.params())
        self.features, self.temperature = features, temperature

    def __call__(self, pooled: jax.Array) -> jax.Array:
        pooled = pooled.astype(jnp.float32)
        # The pooled features' scale drifts while the trunk trains; without this gates saturate and stop learning.
        pooled = pooled * jax.lax.rsqrt(jnp.square(pooled).mean(-1, keepdims=True) + 1e-6) * _row(self.scale, pooled)
        hidden = jax.nn.relu(pooled @ self.hidden[...] + _row(self.hidden_bias, pooled))
        return hidden @ self.out[...] + _row(self.bias, pooled)

    def binary(self, logits: jax.Array, place: Place = "example") -> Decision:
        logits = logits - self.threshold[...]
        if self.deterministic:
            keep = threshold(logits)
        else:
            keep = gumbel_sigmoid(logits, next_key(self.rngs), self.temperature)
        return Decision(keep, jax.nn.sigmoid(logits), place)

    def categorical(self, logits: jax.Array, place: Place) -> Decision:
        # Branches are ordered from the cheapest: a higher threshold makes every dearer branch less likely.
        logits = logits - self.threshold[...] * jax.lax.broadcasted_iota(logits.dtype, logits.shape, logits.ndim - 1)
        if self.deterministic:
            keep = one_hot_argmax(logits)
        else:
            keep = gumbel_softmax(logits, next_key(self.rngs), self.temperature)
        return Decision(keep, jax.nn.softmax(logits), place, ONE)


class SampleGate(nnx.Module):
    """One decision per example, from the mean over the map.

    `x` (B, ..., features) gives a decision of shape (B,). After SkipNet (Wang et al. 2018, arXiv:1711.09485) and
    ConvNet-AIG (Veit & Belongie 2018, arXiv:1711.11503).
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs, **options: Unpack[Options]):
        self.logits = _Logits(features, 1, rngs=rngs, **options)

    def __call__(self, x: Float[Array, "B *axes C"]) -> Decision:
        return self.logits.binary(_of_map(x, self)[:, 0])


class TileGate(nnx.Module):
    """One decision per tile of `size` pixels, from the tile's mean and maximum and the map's mean.

    `x` (B, H, W, features) gives a decision of shape (B, ceil(H / size), ceil(W / size)). After DynConv (Verelst &
    Tuytelaars 2020, arXiv:1912.03203), which decides per pixel; per tile the skipped work is contiguous, which is what
    makes it save time.
    """

    def __init__(self, features: int, *, size: int = 16, rngs: nnx.Rngs, **options: Unpack[Options]):
        self.logits = _Logits(3 * features, 1, rngs=rngs, **options)
        self.size = positive(size, "size")

    def __call__(self, x: Float[Array, "B H W C"]) -> Decision:
        return self.logits.binary(_of_tiles(x, self, self.size)[..., 0], "tile")


class BranchGate(nnx.Module):
    """Which of `branches` modules to run: one-hot, per example (B, K), or per tile (B, h, w, K) with `size`.

    Order the branches from the cheapest: `threshold` moves the choice towards the first. Starts open: the logits of the
    branches rise from 0 to `bias`, so that the last is taken most.
    """

    def __init__(
        self, features: int, branches: int, *, size: int | None = None, rngs: nnx.Rngs, **options: Unpack[Options]
    ):
        # One bias for all would change nothing under a softmax: open means that the dearest branch leads.
        options["bias"] = options.get("bias", OPEN) * np.linspace(0, 1, positive(branches, "branches"))
        width = features if size is None else 3 * features
        self.logits = _Logits(width, branches, rngs=rngs, **options)
        self.branches, self.size = branches, positive(size, "size")

    def __call__(self, x: Float[Array, "B *axes C"]) -> Decision:
        if self.size is None:
            return self.logits.categorical(_of_map(x, self), "example")
        return self.logits.categorical(_of_tiles(x, self, self.size), "tile")


class ChannelGate(nnx.Module):
    """One decision per example and group of channels, from the mean over the map.

    `x` (B, ..., features) gives a decision of shape (B, groups). After Gao et al. 2019 (arXiv:1810.05331).
    """

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs, **options: Unpack[Options]):
        self.logits = _Logits(features, positive(groups, "groups"), rngs=rngs, **options)
        self.groups = groups

    def __call__(self, x: Float[Array, "B *axes C"]) -> Decision:
        return self.logits.binary(_of_map(x, self))


class EntropyGate(nnx.Module):
    """One decision per tile of `size` pixels: keeps those that are uncertain, and learns nothing.

    `x` (B, H, W, 1) is a prediction's entropy as a share of the most there can be, in [0, 1]. Its mean over a tile is
    compared with the threshold, both as logits; starts open. The same when training.
    """

    def __init__(self, size: int = 1):
        self.size = positive(size, "size")
        self.threshold = Threshold(jnp.float32(LOWEST))

    def __call__(self, x: Float[Array, "B H W C"]) -> Decision:
        check_features(x, 1, self)
        mean = pool_tiles(x.astype(jnp.float32), self.size)[..., 0]
        mean = jnp.clip(mean, jnp.finfo(jnp.float32).tiny, 1 - jnp.finfo(jnp.float32).epsneg)
        logits = jax.scipy.special.logit(mean) - self.threshold[...]
        return Decision(threshold(logits), jax.nn.sigmoid(logits), "tile")


class PathGate(nnx.Module):
    """Which of the `paths` out of a cell an example takes, and how much each counts: relu(tanh(logits)), 0 is closed.

    `x` (B, ..., features) gives a decision of shape (B, paths), whose `probability` is that weight and whose `keep`
    says where it is not 0. The soft conditional gate of dynamic routing (Li et al. 2020, arXiv:2003.10401, section
    3.2), without noise, and as open at the start as theirs. Deviations: features are pooled before the hidden layer
    rather than after it, which costs less; and `keep` has the gradient of a sigmoid, because relu has none where a path
    is closed, and a budget could then never open it again.
    """

    def __init__(self, features: int, paths: int, *, hidden: int = 16, bias: float = 1.5, rngs: nnx.Rngs):
        self.logits = _Logits(features, positive(paths, "paths"), hidden=hidden, bias=bias, temperature=1.0, rngs=rngs)
        self.paths = paths

    def __call__(self, x: Float[Array, "B *axes C"]) -> Decision:
        logits = _of_map(x, self) - self.logits.threshold[...]
        weight = jax.nn.relu(jnp.tanh(logits))
        return Decision(straight_through((weight > 0).astype(weight.dtype), jax.nn.sigmoid(logits)), weight, "example")


def _of_map(x: jax.Array, gate: SampleGate | BranchGate | ChannelGate | PathGate) -> jax.Array:
    """A gate's logits of the mean over all axes but the first and the last."""
    check_features(x, gate.logits.features, gate)
    return gate.logits(x.mean(tuple(range(1, x.ndim - 1))))


def _of_tiles(x: jax.Array, gate: TileGate | BranchGate, size: int) -> jax.Array:
    """A gate's logits of a tile's mean and maximum beside the map's mean: what is here, also if thin, and where."""
    check_features(x, gate.logits.features // 3, gate)
    here = pool_tiles(x, size)
    # The block is not trained through the maxima: their gradient is slow on a CPU.
    most = max_tiles(jax.lax.stop_gradient(x), size)
    whole = jnp.broadcast_to(here.mean((1, 2), keepdims=True), here.shape)
    return gate.logits(jnp.concatenate([here, most, whole], -1))


def next_key(rngs: nnx.Rngs) -> jax.Array:
    """The next key of a gate's stream."""
    try:
        return rngs.gate()
    except TraceContextError as error:
        raise TraceContextError(
            "a gate that trains draws noise, which changes the model, and a function under jax.jit (or grad, scan) "
            "closes over the model: pass it as an argument to nnx.jit, or nnx.merge it inside, or use "
            "nnx.view(model, deterministic=True)"
        ) from error


def _row(vector: GateParam, like: jax.Array) -> jax.Array:
    """A vector over the last axis, with the rank of `like`."""
    return vector[...].reshape((1,) * (like.ndim - 1) + (-1,))


def check_features(x: jax.Array, features: int, gate: nnx.Module) -> None:
    """Raise ValueError unless `x` has so many features."""
    if x.shape[-1] != features:
        raise ValueError(
            f"{type(gate).__name__} was made for features={features}, but its input has shape {x.shape}: "
            f"give it features={x.shape[-1]}"
        )


Number = TypeVar("Number", int, int | None)


def positive(value: Number, name: str) -> Number:
    """`value`, None or at least 1, else ValueError."""
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
