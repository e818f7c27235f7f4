"""What blocks reach: equal on tiles, or refused, by every wrapper that takes blocks on tiles."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, image, make, still
from flax import nnx
from test_ops_tiles import assert_same, gated, patterns

import dynjax as dj
from dynjax import execute
from dynjax.core.receptive import receptive_radius
from dynjax.ops import filters


def median(x):
    """Of three pixels above each other; a NaN in one of them need not be seen in it."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return jnp.sort(jnp.stack([padded[:, :-2], x, padded[:, 2:]]), 0)[1]


def mirrored(x):
    return nnx.avg_pool(jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="symmetric"), (5, 5))


def repeated(x):
    return nnx.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"), (3, 3))


def near(x):
    """Reads up to two pixels to the side, as the content says."""
    column = jnp.arange(x.shape[2])[None, None] + jnp.round(2 * jnp.tanh(x.sum(-1))).astype(jnp.int32)
    return jnp.take_along_axis(x, jnp.clip(column, 0, x.shape[2] - 1)[..., None], 2)


def paired(x):
    """Channels in pairs, of which one is taken: a slice that is not along the last axis."""
    return x + jnp.tile(x.reshape(*x.shape[:3], 2, CHANNELS // 2)[..., 0, :], 2)


class Reflecting(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), padding="REFLECT", rngs=rngs)

    def __call__(self, x):
        return x + self.conv(x)


PROBED = {median: 1, mirrored: 2, repeated: 1, near: 2, paired: 0, Reflecting: 1}


@pytest.mark.parametrize("kind", PROBED, ids=lambda kind: kind.__name__)
def test_what_is_probed_is_equal_or_refused(kind):
    block, x = make(kind) if kind is Reflecting else kind, image(1, 13, 18, CHANNELS)
    assert receptive_radius(block, x) == PROBED[kind]

    def run(keep):
        model = dj.Tiles(block, dj.FixedGate(keep, size=4))
        return still(model)(x), still(model, "compact", strategy="loop")(x)

    with mock.patch.object(execute, "BREAK_EVEN_TILES", 1e9):
        run = jax.jit(run).lower(jnp.zeros((1, 4, 5))).compile()
    for keep in patterns((1, 4, 5))[1:4]:
        assert_same(*run(keep))


def test_taps_far_apart_are_seen_on_a_larger_map():
    block = make(lambda rngs: filters.Involution(CHANNELS, CHANNELS, (3, 3), kernel_dilation=20, rngs=rngs))
    assert receptive_radius(block, image(1, 6, 6, CHANNELS)) == 20


class Around(nnx.Module):
    """Padding from the opposite border, as nnx.Conv does it."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), padding="CIRCULAR", rngs=rngs)

    def __call__(self, x):
        return x + self.conv(x)


def wrapped(x):
    return nnx.avg_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"), (3, 3))


def above_the_mean(x):
    """Comparisons swallow the NaN in the mean."""
    return jnp.where(x.mean(-1, keepdims=True) > x.mean((1, 2, 3), keepdims=True), 2 * x, x)


def strongest(x):
    scores = x.mean(-1, keepdims=True)
    least = jax.lax.top_k(scores.reshape(len(x), -1), 9)[0][:, -1]
    return jnp.where(scores >= least[:, None, None, None], 2 * x, x)


def shifted_by_content(x):
    """Reads as far to the side as the content says."""
    column = jnp.arange(x.shape[2])[None, None] + jnp.round(x.sum(-1)).astype(jnp.int32)
    return jnp.take_along_axis(x, jnp.clip(column, 0, x.shape[2] - 1)[..., None], 2)


ACROSS, UNEVEN = "a change in one corner is seen far away", "it treats pixels differently by their place"
FUNCTIONS = {
    "roll": (lambda x: x + jnp.roll(x, 1, 1), ACROSS),
    "wrap": (wrapped, f"wrapped cannot be run on tiles: {ACROSS}"),
    "mirror": (lambda x: x + x[:, ::-1], ACROSS),
    "mean compared": (above_the_mean, "above_the_mean cannot be run on tiles: it mixes the whole map"),
    "maximum compared": (lambda x: x * (x >= x.max((1, 2), keepdims=True)), ACROSS),
    "strongest pixels": (strongest, "strongest cannot be run on tiles: it mixes the whole map"),
    "offsets": (shifted_by_content, "shifted_by_content cannot be run on tiles"),
    "size of the map": (lambda x: x / x.shape[1], UNEVEN),
    "noise": (lambda x: x + jax.random.normal(jax.random.key(0), (1, *x.shape[1:])), UNEVEN),
    "mean of the batch": (lambda x: x - x.mean(0, keepdims=True), "it mixes the examples of a batch"),
    "first example": (lambda x: x - x[:1], "it mixes the examples of a batch"),
    "number of examples": (lambda x: x * len(x), "it mixes the examples of a batch"),
}
MODULES = {
    "circular": (Around, f"Around cannot be run on tiles: {ACROSS}.*CIRCULAR.*use padding='SAME'"),
    "taps far apart": (
        lambda rngs: filters.Involution(CHANNELS, CHANNELS, (3, 3), kernel_dilation=40, rngs=rngs),
        "Involution cannot be run on tiles",
    ),
}


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_what_tiles_would_make_wrong_is_refused_by_name(name):
    block, message = (make(MODULES[name][0]), MODULES[name][1]) if name in MODULES else FUNCTIONS[name]
    with pytest.raises(ValueError, match=message):
        receptive_radius(block, image(1, 8, 8, CHANNELS))


def wrappers(block, x):
    """Every wrapper that can take `block` on tiles."""
    keep = np.zeros((1, 2, 2))
    one_of = np.stack([keep, 1 - keep], -1)
    yield gated(block)
    yield dj.Select([block, jnp.tanh], dj.FixedGate(one_of, size=4))
    yield dj.Exits([jnp.tanh, block], [jnp.tanh, jnp.tanh], size=4)
    yield dj.Exits([jnp.tanh, jnp.tanh], [jnp.tanh, block], size=4)
    yield dj.Halt(block, dj.TileGate(CHANNELS, size=4, rngs=nnx.Rngs(0)), 2)


def test_every_wrapper_of_tiles_asks():
    x = image(1, 8, 8, CHANNELS)
    for model in wrappers(wrapped, x):
        with pytest.raises(ValueError, match=f"wrapped cannot be run on tiles: {ACROSS}"):
            jax.eval_shape(lambda x, model=model: still(model)(x), x)
