"""Tiles around blocks of several kinds: masked equals compact, the radius is found, what cannot be tiled is refused."""

import functools
from unittest import mock

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, RADIUS, at, image, make, still
from flax import nnx

import dynjax as dj
from dynjax import execute
from dynjax.core.receptive import _probed, receptive_radius, window_macs


def grid(shape, size):
    return (shape[0], -(-shape[1] // size), -(-shape[2] // size))


def patterns(shape):
    random = np.random.default_rng(0)
    one = np.zeros(shape)
    one[-1, -1, -1] = 1
    keeps = [np.zeros(shape), np.ones(shape), one, random.random(shape) < 0.3, random.random(shape) < 0.6]
    return [jnp.asarray(keep, jnp.float32) for keep in keeps]


def three_ways(wrap, *args):
    """Masked, loop and buckets in one compiled function of `args`; `wrap(*args)` gives the model and its input.

    The loop never falls back to the whole map, so that all keep patterns are really run on tiles.
    """

    def run(*args):
        model, x = wrap(*args)
        compact = [still(model, "compact", strategy=strategy)(x) for strategy in ("loop", "buckets")]
        return [still(model)(x), *compact]

    # Fewer buckets are compiled sooner; test_execute.py has them all.
    with mock.patch.multiple(execute, BREAK_EVEN_TILES=1e9, BREAK_EVEN_SAMPLES=2.0, CAPACITIES=(0.1, 0.7)):
        return jax.jit(run).lower(*args).compile()


def assert_same(masked, *compact):
    for y in compact:
        np.testing.assert_allclose(y, masked, rtol=0, atol=1e-5 * float(jnp.abs(masked).max()))


CASES = [
    (blocks.Residual, (2, 21, 37), 8),
    (blocks.Residual, (1, 5, 7), 8),
    (blocks.Bottleneck, (1, 16, 24), 8),
    (blocks.Dilated, (1, 21, 37), 8),
    (blocks.Grouped, (2, 13, 9), 4),
    (blocks.ConvNeXt, (1, 21, 37), 8),
    (blocks.Biased, (3, 9, 14), 4),
    (blocks.Pooled, (2, 21, 37), 8),
    (blocks.Pooled, (1, 5, 7), 8),
    (blocks.Even, (1, 11, 8), 4),
    (blocks.Parts, (1, 9, 14), 4),
    (blocks.Pointwise, (2, 10, 10), 4),
]


@pytest.mark.parametrize(("kind", "shape", "size"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_masked_equals_compact(kind, shape, size):
    block, x, tiles = make(kind), image(*shape, CHANNELS), grid(shape, size)
    run = three_ways(lambda x, keep: (dj.Tiles(block, dj.FixedGate(keep, size=size)), x), x, jnp.zeros(tiles))
    everything = run(x, jnp.ones(tiles))[0]
    for keep in patterns(tiles):
        masked, *compact = run(x, keep)
        pixels = np.kron(keep, np.ones((size, size)))[:, : shape[1], : shape[2], None]
        np.testing.assert_array_equal(masked, np.where(pixels, everything, x))
        assert_same(masked, *compact)


def test_otherwise_may_change_the_channels():
    block, plain = make(blocks.Wider), make(lambda rngs: nnx.Linear(CHANNELS, 6, rngs=rngs))
    x, tiles = image(2, 9, 14, CHANNELS), (2, 3, 4)

    def wrap(x, keep):
        return dj.Tiles(block, dj.FixedGate(keep, size=4), otherwise=plain), x

    run = three_ways(wrap, x, jnp.zeros(tiles))
    for keep in patterns(tiles):
        masked, *compact = run(x, keep)
        assert masked.shape == (2, 9, 14, 6)
        assert_same(masked, *compact)
    np.testing.assert_allclose(run(x, jnp.zeros(tiles))[0], plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["loop", "buckets"])
def test_otherwise_is_not_run_where_every_tile_is_kept(strategy):
    block, runs = make(blocks.Wider), []

    def plain(x):
        jax.debug.callback(lambda: runs.append(1))
        return jnp.tile(x, 2)[..., :6]

    @jax.jit
    def run(keep):
        return still(dj.Tiles(block, dj.FixedGate(keep, size=4), otherwise=plain), "compact", strategy=strategy)(x)

    x, tiles = image(1, 9, 14, CHANNELS), (1, 3, 4)
    most = np.ones(tiles)
    most[0, 0, 0] = 0
    for keep, expected in ((np.ones(tiles), 0), (most, 1), (np.zeros(tiles), 1)):
        runs.clear()
        jax.block_until_ready(run(jnp.asarray(keep, jnp.float32)))
        jax.effects_barrier()
        assert len(runs) == expected


def test_what_is_decided_in_otherwise_is_seen_and_it_does_not_train():
    block, x = make(blocks.Wider), image(2, 8, 8, CHANNELS)
    rest = make(lambda rngs: nnx.Sequential(dj.Skip(blocks.Residual(rngs), dj.FixedGate([1, 0])), blocks.Wider(rngs)))
    model = dj.Tiles(block, dj.FixedGate(patterns((2, 2, 2))[3], size=4), otherwise=rest)
    (masked, trace), (compact, same) = (dj.traced(still(model, way))(x) for way in ("masked", "compact"))
    assert_same(masked, compact)
    assert set(trace.decisions) == set(same.decisions) == {"", "otherwise/layers/0"}
    np.testing.assert_allclose(trace.macs(), same.macs())
    model = gated(make(blocks.Pointwise), otherwise=make(blocks.Residual))
    with pytest.raises(ValueError, match="compact execution cannot train: BatchNorm at 'norm1' still updates"):
        nnx.view(model, execution="compact")(x[:1])


def test_the_default_view_under_jit_is_exact_on_both_sides_of_the_break_even():
    block, x = make(blocks.Residual), image(1, 32, 48, CHANNELS)
    run = jax.jit(
        lambda keep: [still(dj.Tiles(block, dj.FixedGate(keep, size=8)), way)(x) for way in ("masked", "compact")]
    )
    for share in (0.0, 0.2, 0.9, 1.0):
        assert_same(*run(jnp.asarray(np.random.default_rng(0).random((1, 4, 6)) < share, jnp.float32)))


def test_a_gate_of_its_own_decides_alike_in_both_executions():
    model = make(lambda rngs: dj.Tiles(blocks.Residual(rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs)))
    x = image(2, 9, 14, CHANNELS)

    def run(threshold):
        ways = [at(threshold, still(model, way)) for way in ("masked", "compact")]
        return [dj.traced(view)(x)[1].decisions[""].keep for view in ways], [view(x) for view in ways]

    run, kept = jax.jit(run), []
    for threshold in (-30.0, 0.0, 0.3, 30.0):
        keeps, outputs = run(threshold)
        np.testing.assert_array_equal(*keeps)
        assert_same(*outputs)
        kept.append(float(keeps[0].mean()))
    assert kept[0] == 1 and kept[-1] == 0 and kept == sorted(kept, reverse=True)


def test_gradients_reach_gate_block_and_input_in_masked_training():
    model = make(lambda rngs: dj.Tiles(blocks.Residual(rngs), dj.TileGate(CHANNELS, size=4, rngs=rngs)))

    def loss(model, x):
        return (model(x) ** 2).sum()

    mean = model.block.norm1.mean[...]
    grads, slope = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(model, image(2, 9, 14, CHANNELS))
    leaves = [np.asarray(leaf) for leaf in (*jax.tree.leaves(grads), slope)]
    assert len(leaves) == 5 + 6 + 1
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)
    assert (model.block.norm1.mean[...] != mean).any()


# The receptive radius


@pytest.mark.parametrize("kind", RADIUS, ids=lambda kind: kind.__name__)
def test_the_radius_is_read_and_probed_alike(kind):
    block = make(kind)
    assert receptive_radius(block, image(1, 6, 6, CHANNELS)) == RADIUS[kind]
    if kind in (blocks.Residual, blocks.Grouped, blocks.Pooled, blocks.Parts, blocks.Pointwise):
        assert _probed(still(block), CHANNELS, jnp.dtype("float32")) == RADIUS[kind]


def test_the_radius_is_found_while_jit_traces_and_in_half_precision():
    block = make(blocks.Pooled)
    graphdef, state = nnx.split(block)

    @jax.jit
    def run(state, x):
        return jnp.full((), receptive_radius(nnx.merge(graphdef, state), x))

    assert run(state, image(1, 6, 6, CHANNELS)) == 2
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    assert run(half, image(1, 6, 6, CHANNELS).astype(jnp.bfloat16)) == 2


def test_a_large_radius_is_probed_on_a_larger_map():
    def block(x):
        return nnx.max_pool(x, (41, 3), padding="SAME")

    assert _probed(still(block), 1, jnp.dtype("float32")) == 20


def test_a_constant_reaches_nowhere():
    assert _probed(lambda x: jnp.ones_like(x), 1, jnp.dtype("float32")) == 0


def test_macs_of_a_window():
    block, x = still(make(blocks.Pooled)), image(1, 21, 37, CHANNELS)
    # A whole window of 8 + 2 * 2 pixels; the taps on its own padding are not counted.
    assert window_macs(block, x, 8, 2) == (3 * 12 - 2) ** 2 * CHANNELS**2
    linear = make(lambda rngs: nnx.Linear(CHANNELS, 5, rngs=rngs))
    assert window_macs(linear, x, 8, 0) == 8 * 8 * CHANNELS * 5


# Refusals


def gated(block, keep=None, size=4, **options):
    return dj.Tiles(block, dj.FixedGate(np.ones((1, 2, 2)) if keep is None else keep, size=size), **options)


class Squeeze(nnx.Module):
    """Squeeze and excitation: a mean over the map."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x):
        return x * nnx.sigmoid(self.linear(x.mean((1, 2), keepdims=True)))


class Grouping(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.GroupNorm(CHANNELS, num_groups=2, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


class DownUp(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Conv(CHANNELS, CHANNELS, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        y = self.down(x)
        return x + jnp.repeat(jnp.repeat(y, 2, 1), 2, 2)[:, : x.shape[1], : x.shape[2]]


class Place(nnx.Module):
    """A pattern over the map, which a NaN does not show."""

    def __call__(self, x):
        return x + jnp.linspace(0, 1, x.shape[1])[None, :, None, None]


class FixedSize(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Param(jnp.zeros((1, 8, 8, CHANNELS)))

    def __call__(self, x):
        return x + self.table[...]


REFUSED = {
    "mean over the map": (Squeeze, "Squeeze cannot be run on tiles: it mixes the whole map .*global pooling"),
    "GroupNorm": (Grouping, "Grouping cannot be run on tiles: it mixes the whole map .GroupNorm at 'norm'"),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(1, CHANNELS, decode=False, rngs=rngs),
        "MultiHeadAttention cannot be run on tiles",
    ),
    "stride": (
        lambda rngs: nnx.Conv(CHANNELS, CHANNELS, (3, 3), strides=2, rngs=rngs),
        "Conv cannot be run on tiles: it turns a map of 32x32 pixels into 16x16.*stride 1 and SAME",
    ),
    "no padding": (
        lambda rngs: nnx.Conv(CHANNELS, CHANNELS, (3, 3), padding="VALID", rngs=rngs),
        "Conv cannot be run on tiles: it turns a map of 32x32 pixels into 30x30",
    ),
    "stride inside": (DownUp, "DownUp cannot be run on tiles: it treats pixels differently by their place"),
    "pattern": (lambda rngs: Place(), "Place cannot be run on tiles: it treats pixels differently by their place"),
    "one size": (FixedSize, "FixedSize cannot be run on tiles: .*32.*8"),
    "channels": (blocks.Wider, r"Tiles: Wider turns 4 channels into 6.*otherwise=.*nnx.Linear\(4, 6"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tiles_would_make_wrong_is_refused_by_name(name):
    build, message = REFUSED[name]
    model = gated(make(build))
    for execution in ("masked", "compact"):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda x, execution=execution: still(model, execution)(x), image(1, 8, 8, CHANNELS))


def test_other_mistakes_are_refused():
    x, plain = image(1, 8, 8, CHANNELS), make(blocks.Pointwise)
    with pytest.raises(ValueError, match=r"Tiles needs a gate with a tile size.*size=16"):
        dj.Tiles(plain, dj.FixedGate([1]))
    with pytest.raises(ValueError, match="radius=-1"):
        gated(plain, radius=-1)
    with pytest.raises(ValueError, match=r"Tiles around a module that is dynamic already \(Tiles at the top\)"):
        gated(gated(plain))
    with pytest.raises(ValueError, match=r"\(Skip at 'layers/1'\)"):
        gated(nnx.Sequential(plain, dj.Skip(plain, dj.FixedGate([1]))))
    with pytest.raises(
        ValueError,
        match=r"Tiles needs a decision per tile \(rule: each\) of shape \(1, 2, 2\), its gate gave \(1, 3, 2\)",
    ):
        gated(plain, np.ones((1, 3, 2)))(x)
    for block, reach in ((blocks.Residual, 2), (blocks.Pooled, 2)):  # one that is read, one that is probed
        for execution in ("masked", "compact"):
            with pytest.raises(ValueError, match=f"radius=1 is too small: {block.__name__} reaches {reach} pixels"):
                still(gated(make(block), radius=1), execution)(x)
    with pytest.raises(ValueError, match="execution='fast' must be 'masked' or 'compact'"):
        still(gated(plain), "fast")(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(blocks.Residual, "BatchNorm at 'norm1' still updates"), (blocks.ConvNeXt, "Dropout at 'drop' still draws noise")],
)
def test_compact_execution_cannot_train(kind, message):
    model = nnx.view(gated(make(kind)), execution="compact")
    with pytest.raises(ValueError, match=f"compact execution cannot train: {message}.*use_running_average=True"):
        model(image(1, 8, 8, CHANNELS))


def test_a_view_of_a_misspelt_name_is_an_error():
    with pytest.raises(ValueError, match="exection"):
        nnx.view(gated(make(blocks.Pointwise)), exection="compact")
    # Names of what only some blocks and gates have are none.
    nnx.view(gated(make(blocks.Pointwise)), execution="compact", deterministic=True, use_running_average=True)


def test_a_function_is_a_block_too():
    x, keep = image(1, 8, 8, CHANNELS), np.asarray([[[1, 0], [0, 1]]])
    for block in (jnp.tanh, functools.partial(jnp.multiply, 2.0), lambda x: nnx.max_pool(x, (3, 3), padding="SAME")):
        model = gated(block, keep)
        assert_same(still(model)(x), still(model, "compact")(x))
