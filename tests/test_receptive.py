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
from dynjax.core import receptive
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


SIDES: list = []


class Attending(nnx.Module):
    """Attention over all pixels, over a row of them, or over windows, as if these were the tokens of a sequence."""

    def __init__(self, rngs, heads=4, window=None, bias=False):
        self.attention = nnx.MultiHeadAttention(heads, CHANNELS, decode=False, rngs=rngs)
        self.window, self.bias = window, bias

    def __call__(self, x):
        SIDES.append(x.shape[1:3])
        (height, width), side = x.shape[1:3], self.window
        if side is None:
            mask = None
            if self.bias:
                at = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 1, 2)
                mask = (abs(at - at[:, 0]) < 3).all(-1)
            return x + self.attention(x.reshape(len(x), -1, CHANNELS), mask=mask).reshape(x.shape)
        y = jnp.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        shape = len(x), y.shape[1] // side, side, y.shape[2] // side, side, CHANNELS
        y = self.attention(y.reshape(shape).swapaxes(2, 3).reshape(*shape[:2], shape[3], side * side, CHANNELS))
        y = y.reshape(*shape[:2], shape[3], side, side, CHANNELS).swapaxes(2, 3)
        return x + y.reshape(len(x), shape[1] * side, shape[3] * side, CHANNELS)[:, :height, :width]


def blurred(x):
    """By a matrix that numpy makes of the map."""
    SIDES.append(x.shape[1:3])
    apart = np.subtract.outer(np.arange(x.shape[1] * x.shape[2]), np.arange(x.shape[1] * x.shape[2]))
    return jnp.einsum("pq,bqc->bpc", np.exp(-abs(apart) / 2), x.reshape(len(x), -1, CHANNELS)).reshape(x.shape)


MIXED = r"cannot be run on tiles: it mixes the whole map \({}\).*wrap the layers around it, or use Skip"
LARGE = {
    "attention": (lambda: make(Attending), MIXED.format("MultiHeadAttention at 'attention'")),
    "attention with a mask of numpy's": (
        lambda: make(lambda rngs: Attending(rngs, bias=True)),
        MIXED.format("MultiHeadAttention at 'attention'"),
    ),
    "table of pairs": (lambda: blurred, "blurred " + MIXED.format("attention, or a table of every pair of pixels")),
    "large windows": (
        lambda: make(lambda rngs: Attending(rngs, window=64)),
        r"it makes 268 MB of numbers of a map of 33x34 pixels \(MultiHeadAttention at 'attention'\)",
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_is_refused_on_a_small_map(name):
    build, message = LARGE[name]
    block = build()
    SIDES.clear()
    with (
        mock.patch.object(receptive, "_run_with_stand_ins", side_effect=AssertionError("it was run")),
        pytest.raises(ValueError, match=message),
    ):
        receptive_radius(block, image(1, 64, 64, CHANNELS))
    # Windows of one size are no pairs of the map's pixels: what they make of a large map is looked at, and not made.
    assert max(map(max, SIDES)) <= (521 if name == "large windows" else 47)


def test_attention_in_windows_is_run_on_one_map_at_a_time():
    block, sizes = make(lambda rngs: Attending(rngs, heads=1, window=40)), []

    def run(x):
        jax.debug.callback(lambda: sizes.append(len(x)))
        return block(x)

    with pytest.raises(ValueError, match="cannot be run on tiles"):
        receptive_radius(run, image(1, 64, 64, CHANNELS))
    assert 0 < max(sizes) <= 8


@mock.patch.object(receptive, "_BYTES", 2e4)
def test_what_mixes_examples_is_seen_where_they_are_run_one_by_one():
    for block in (
        lambda x: nnx.max_pool(x - x.mean(0, keepdims=True), (3, 3), padding="SAME"),
        lambda x: jnp.sort(x, -1) * len(x),
    ):
        with pytest.raises(ValueError, match="it mixes the examples of a batch"):
            receptive_radius(block, image(1, 8, 8, CHANNELS))


def test_features_as_many_as_the_maps_looked_at_have_pixels_are_no_pairs():
    for channels in (37 * 41, 43):
        assert receptive_radius(jnp.tanh, image(1, 8, 8, channels)) == 0


def test_a_table_of_the_map_is_not_made_of_a_large_one():
    sides = []

    def above_and_below(x):
        """By a table that numpy makes of the map."""
        sides.append(x.shape[1:3])
        pixels = np.arange(x.shape[1] * x.shape[2])
        at = np.stack([pixels - x.shape[2], pixels, pixels + x.shape[2]], -1)
        present = (at >= 0) & (at < pixels.size)
        found = x.reshape(len(x), -1, CHANNELS)[:, np.clip(at, 0, pixels.size - 1)]
        return jnp.where(present[..., None], found, -jnp.inf).max(2).reshape(x.shape)

    assert receptive_radius(above_and_below, image(1, 8, 8, CHANNELS)) == 1
    assert max(map(max, sides)) <= 130
