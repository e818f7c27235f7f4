"""Blocks of several kinds for tests of the wrappers, made without compiling anything."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynjax import budget
from dynjax.core.modules import view
from dynjax.core.trace import Trace
from dynjax.core.training import Call

CHANNELS = 4


def make(build: Callable[[nnx.Rngs], nnx.Module], seed: int = 0) -> nnx.Module:
    """What `build` makes, with NumPy's random numbers: JAX would compile an initialiser for every shape."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def fill(path, variable):
        spec = variable.get_value()
        if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
            return variable.replace(jax.random.key(seed))
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            return variable.replace(jnp.zeros(spec.shape, spec.dtype))
        low, high = (0.5, 1.5) if path[-1] in ("var", "scale") else (-0.5, 0.5)
        low, high = (0.0, 0.0) if path[-1] == "threshold" else (low, high)
        return variable.replace(jnp.asarray(random.uniform(low, high, spec.shape), spec.dtype))

    return nnx.merge(graphdef, nnx.map_state(fill, state))


def still(model: nnx.Module, execution: str = "masked", **ways) -> nnx.Module:
    """`model` as it is evaluated."""
    ways |= dict(execution=execution, deterministic=True, use_running_average=True)
    return view(model, **ways) if isinstance(model, nnx.Module) else model


def at(threshold: jax.Array | float, model: nnx.Module) -> nnx.Module:
    """A copy of `model` whose gates have this threshold."""
    model = nnx.clone(model)
    budget.set_threshold(model, threshold)
    return model


@nnx.jit
def train(gate, x):
    """The decision of a gate that trains, the gate being an argument of the compiled function."""
    return gate(x)


@nnx.jit
def _evaluated(gate, x, threshold):
    return at(threshold, nnx.view(gate, deterministic=True, raise_if_not_found=False))(x)


def evaluate(gate, x, threshold=0.0):
    """The decision of a gate that does not train."""
    return _evaluated(gate, x, jnp.float32(threshold))


def call(trace: Trace, **known) -> Call:
    """What a step knows, as far as it matters."""
    usual = dict(outputs=[], valid=jnp.ones(trace.examples, bool), target=0.5, weights={})
    return Call(trace, **usual | dict.fromkeys(("losses", "correct", "again"), jnp.shape) | known)


def image(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Tokens(nnx.Module):
    """A block of tokens (B, T, C) that a mask (B, T) says it may look at."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x, mask):
        return x + self.dense(x) * mask[..., None]


class Residual(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, channels: int = CHANNELS):
        self.conv1 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(channels, rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(channels, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(x + self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x))))))


class Bottleneck(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.down = nnx.Conv(CHANNELS, 2, (1, 1), rngs=rngs)
        self.mix = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.up = nnx.Conv(2, CHANNELS, (1, 1), rngs=rngs)

    def __call__(self, x):
        return x + self.up(nnx.silu(self.mix(nnx.silu(self.down(x)))))


class Dilated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.near = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.far = nnx.Conv(CHANNELS, CHANNELS, (3, 3), kernel_dilation=2, rngs=rngs)

    def __call__(self, x):
        return self.far(jnp.tanh(self.near(x)))


class Grouped(nnx.Module):
    """Depthwise and grouped convolutions, of sides that differ."""

    def __init__(self, rngs: nnx.Rngs):
        self.depth = nnx.Conv(CHANNELS, CHANNELS, (5, 1), feature_group_count=CHANNELS, rngs=rngs)
        self.group = nnx.Conv(CHANNELS, CHANNELS, (1, 3), feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return x + self.group(nnx.relu(self.depth(x)))


class ConvNeXt(nnx.Module):
    """Liu et al. 2022: a wide depthwise convolution, then layers over the channels alone."""

    def __init__(self, rngs: nnx.Rngs):
        self.zone = nnx.Conv(CHANNELS, CHANNELS, (7, 7), feature_group_count=CHANNELS, rngs=rngs)
        self.norm = nnx.LayerNorm(CHANNELS, rngs=rngs)
        self.expand = nnx.Linear(CHANNELS, 2 * CHANNELS, rngs=rngs)
        self.contract = nnx.Linear(2 * CHANNELS, CHANNELS, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.contract(nnx.gelu(self.expand(self.norm(self.zone(x))))))


class Biased(nnx.Module):
    """Zeros outside the map become biases in a window that reaches over the border."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs = nnx.List([nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for conv in self.convs:
            x = nnx.sigmoid(conv(x)) + 1
        return x


class Pooled(nnx.Module):
    """Max pooling of stride 1 is run on whole windows."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x - nnx.max_pool(self.conv(x), (3, 3), padding="SAME")


class Even(nnx.Module):
    """A kernel of even side reaches further down than up."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (2, 2), rngs=rngs)

    def __call__(self, x):
        return x + self.conv(x)


class Parts(nnx.Module):
    """Channels split, treated apart and put together, with softmax over them."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        left, right = jnp.split(x, 2, -1)
        return x + nnx.softmax(jnp.concatenate([self.conv(left), right[..., ::1] * left.mean(-1, keepdims=True)], -1))


class Pointwise(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.linear(x))


class Wider(nnx.Module):
    """Gives more channels than it takes."""

    def __init__(self, rngs: nnx.Rngs, after: int = 6):
        self.conv = nnx.Conv(CHANNELS, after, (3, 3), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.conv(x))


RADIUS = {
    Residual: 2,
    Bottleneck: 1,
    Dilated: 3,
    Grouped: 2,
    ConvNeXt: 3,
    Biased: 3,
    Pooled: 2,
    Even: 1,
    Parts: 1,
    Pointwise: 0,
    Wider: 1,
}
"""The receptive radius of every kind."""
