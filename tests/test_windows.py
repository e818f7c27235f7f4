"""Blocks run on strips of windows against the same blocks run on the whole map."""

import functools

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, RADIUS, image, make, still
from flax import nnx

from dynjax import cost
from dynjax.core import tiles, windows

STRIPPED = [kind for kind in RADIUS if kind not in (blocks.Pooled, blocks.Even)]
SIZE = 4


def on_strip(block, x, radius, size=SIZE):
    """Every whole tile of `size` pixels of the map `x` (1, H, W, C), computed in one strip: (tiles, size, size, C')."""
    places = [(i, j) for i in range(0, x.shape[1] - size + 1, size) for j in range(0, x.shape[2] - size + 1, size)]
    top, left = (jnp.asarray(side, jnp.int32) for side in zip(*places, strict=True))

    @jax.jit
    def run(x, top, left):
        closed = windows.trace(block, x.shape, x.dtype)
        cut = functools.partial(tiles.cut, x, jnp.int32(0), size=size, radius=radius)
        strip = jnp.concatenate([cut(top[k], left[k]) for k in range(len(places))], 2)
        inside = tiles.inside_map(top, left, x.shape[1:3], size=size, radius=radius)
        return windows.run_strip(closed, strip, inside, size=size, radius=radius)

    side = size + 2 * radius
    y = run(x, top, left)
    assert y.shape[:3] == (1, size, side * len(places))
    return np.stack([y[0, :, k * side + radius : k * side + radius + size] for k in range(len(places))])


@pytest.mark.parametrize("kind", STRIPPED, ids=lambda kind: kind.__name__)
def test_a_strip_equals_the_block_on_the_whole_map(kind):
    # Three rows and columns of tiles, so that all but one lie at a border.
    block, x = still(make(kind)), image(1, 12, 12, CHANNELS)
    whole = np.asarray(jax.jit(lambda x: block(x))(x))
    tiles = whole.reshape(3, SIZE, 3, SIZE, -1).swapaxes(1, 2).reshape(9, SIZE, SIZE, -1)
    np.testing.assert_allclose(on_strip(block, x, RADIUS[kind]), tiles, rtol=1e-5, atol=1e-5)


def test_more_border_than_the_block_needs_does_no_harm():
    block, x = still(make(blocks.Residual)), image(1, 12, 12, CHANNELS)
    np.testing.assert_allclose(on_strip(block, x, 2), on_strip(block, x, 4), rtol=1e-5, atol=1e-5)


def test_too_small_a_radius_is_an_error():
    with pytest.raises(ValueError, match="radius=1 is too small"):
        on_strip(still(make(blocks.Residual)), image(1, 12, 12, CHANNELS), 1)


@pytest.mark.parametrize("kind", RADIUS, ids=lambda kind: kind.__name__)
def test_supported_and_reach(kind):
    block = still(make(kind))
    closed = windows.trace(block, (1, 9, 9, CHANNELS), jnp.float32)
    assert windows.supported(closed, size=SIZE, radius=RADIUS[kind]) == (kind in STRIPPED)
    assert windows.reach_of(block, CHANNELS, jnp.float32) == (RADIUS[kind] if kind in STRIPPED else None)


UNSUPPORTED = {
    "pooling": lambda x: nnx.avg_pool(x, (3, 3), padding="SAME"),
    "mean over the map": lambda x: x - x.mean((1, 2), keepdims=True),
    "stride": lambda x: x[:, ::2, ::2],
    "shift": lambda x: jnp.roll(x, 1, 1),
    "mirror": lambda x: x[:, ::-1],
    "transposition": lambda x: x.swapaxes(1, 2),
    "place": lambda x: x + jnp.arange(x.shape[2], dtype=x.dtype)[None, None, :, None],
    "constant": lambda x: jnp.ones(x.shape, x.dtype),
    "rows as channels": lambda x: x.reshape(*x.shape[:2], -1),
    "running sum": lambda x: jnp.cumsum(x, 1),
    "valid": lambda x: nnx.Conv(CHANNELS, CHANNELS, (3, 3), padding="VALID", rngs=nnx.Rngs(0))(x),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_mixes_pixels_in_other_ways_is_not_run_on_strips(name):
    closed = windows.trace(UNSUPPORTED[name], (1, 9, 9, CHANNELS), jnp.float32)
    assert windows.reach_of(UNSUPPORTED[name], CHANNELS, jnp.float32) is None
    assert not windows.supported(closed, size=SIZE, radius=2)


@pytest.mark.parametrize("name", ["height", "examples", "first"])
def test_what_uses_the_size_of_the_map_or_the_batch_is_not_read(name):
    block = {"height": lambda x: x / x.shape[1], "examples": lambda x: x * len(x), "first": lambda x: x - x[:1]}[name]
    assert windows.reach_of(block, CHANNELS, jnp.float32) is None
    assert windows.reach_of(still(make(blocks.Residual)), CHANNELS, jnp.float32) == 2


def test_cut_shifts_windows_at_the_border_back():
    x = jnp.arange(1.0, 37).reshape(1, 6, 6, 1)
    cut = functools.partial(tiles.cut, x, jnp.int32(0), size=2, radius=1)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for top, left in [(0, 0), (2, 2), (4, 4), (0, 4), (4, 2), (3, 1)]:
        np.testing.assert_array_equal(cut(jnp.int32(top), jnp.int32(left)), padded[:, top : top + 4, left : left + 4])
    nearest = cut(jnp.int32(0), jnp.int32(4), shift=False)
    np.testing.assert_array_equal(nearest, x[:, :4, 2:])


def test_inside_lies_beside_the_strip():
    inside = tiles.inside_map(jnp.asarray([0, 4]), jnp.asarray([0, 2]), (5, 6), size=2, radius=1)
    first = np.pad(np.ones((3, 3), bool), ((1, 0), (1, 0)))
    second = np.pad(np.ones((2, 4), bool), ((0, 2), (0, 0)))
    np.testing.assert_array_equal(inside[0, :, :, 0], np.concatenate([first, second], 1))


def test_macs_of_a_strip_agree_with_xla():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.wide = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
            self.up = nnx.Conv(16, 32, (1, 1), use_bias=False, rngs=rngs)
            self.down = nnx.Linear(32, 16, use_bias=False, rngs=rngs)
            self.last = nnx.Conv(16, 16, (3, 3), kernel_dilation=2, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.last(self.down(self.up(self.wide(x))))

    size, radius, tiles = 8, 3, 3
    closed = windows.trace(make(Net), (1, 9, 9, 16), jnp.float32)
    strip = jax.ShapeDtypeStruct((1, size + 2 * radius, tiles * (size + 2 * radius), 16), jnp.float32)
    inside = jax.ShapeDtypeStruct((*strip.shape[:3], 1), bool)

    def run(strip, inside):
        return windows.run_strip(closed, strip, inside, size=size, radius=radius)

    analysis = jax.jit(run).lower(strip, inside).compile().cost_analysis()
    flops = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    macs = cost.macs(run, strip, inside)
    # XLA also counts what masks the pixels outside the map.
    assert macs <= flops / 2 <= 1.01 * macs
    # Layer by layer rows of 12, 12, 12 and 8 pixels instead of the window's 14.
    side = tiles * (size + 2 * radius)
    most = side * (12 * (9 * 16 * 16 + 2 * 16 * 32) + 8 * 9 * 16 * 16)
    assert 0.95 * most < macs <= most
