"""The executors on plain functions: the same answer from each, and only the kept work done."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import image

from dynjax import cost, execute
from dynjax.core import tiles

KERNEL = image(3, 3, 2, 2, seed=7)


def convolve(x):
    y = jax.lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x + jnp.tanh(y)


def watched(seen, block):
    """`block`, which notes the shape of what it is given whenever it runs."""

    def call(x):
        jax.debug.callback(functools.partial(seen.append, x.shape))
        return block(x)

    return call


def compiled(fn, block=lambda x: x + 1, **ways):
    """`fn(x, keep)` compiled with the strategy, and what its blocks were given while it runs."""
    seen = []
    run = jax.jit(lambda x, keep: fn(watched(seen, block), x, keep, execution="compact", **ways))

    def call(x, keep):
        seen.clear()
        y = jax.block_until_ready(run(x, keep))
        jax.effects_barrier()
        return y, list(seen)

    return call


def first(count, total):
    return jnp.asarray(np.random.default_rng(0).permutation(total) < count, jnp.float32)


# Examples


def test_samples_loop_runs_the_block_once_for_each_kept_example():
    run = compiled(execute.samples, strategy="loop")
    x = image(20, 3)
    for kept in (0, 1, 7, 18):
        keep = first(kept, 20)
        y, seen = run(x, keep)
        np.testing.assert_array_equal(y, x + keep[:, None])
        assert seen == [(1, 3)] * kept
    # Past the break-even the whole batch is faster.
    for kept in (19, 20):
        y, seen = run(x, first(kept, 20))
        assert seen == [(20, 3)]
        np.testing.assert_array_equal(y, x + first(kept, 20)[:, None])


def test_samples_buckets_run_the_smallest_capacity_that_holds_all():
    run = compiled(execute.samples, strategy="buckets")
    x = image(16, 3)
    for kept, capacity in [(0, None), (1, 2), (2, 2), (3, 4), (6, 6), (8, 8), (9, 12), (13, 16), (16, 16)]:
        keep = first(kept, 16)
        y, seen = run(x, keep)
        np.testing.assert_array_equal(y, x + keep[:, None])
        assert seen == [(capacity, 3)] * (kept > 0)


def test_one_example_is_run_or_not():
    for strategy in ("loop", "buckets"):
        run = compiled(execute.samples, strategy=strategy)
        x = image(1, 3)
        for kept in (0, 1):
            y, seen = run(x, jnp.full(1, float(kept)))
            np.testing.assert_array_equal(y, x + kept)
            assert seen == [(1, 3)] * kept


def test_auto_is_the_loop_on_a_cpu():
    _, seen = compiled(execute.samples)(image(20, 3), first(2, 20))
    assert seen == [(1, 3)] * 2


# Tiles


def test_tiles_loop_runs_whole_strips_of_kept_tiles():
    # Sorting cannot be run on strips, so the block is called as it is.
    run = compiled(functools.partial(execute.tiles, size=4, radius=1), lambda x: jnp.sort(x) + 1, strategy="loop")
    x = image(2, 16, 16, 1)
    for kept in (0, 1, 9, 32):
        keep = first(kept, 32).reshape(2, 4, 4)
        y, seen = run(x, keep)
        np.testing.assert_array_equal(y, x + execute.tile_pixels(keep, 4, (16, 16))[..., None])
        group = tiles.strip_tiles(4, 1, 32)
        assert seen == ([(2, 16, 16, 1)] if kept == 32 else [(group, 6, 6, 1)] * -(-kept // group))


def test_tiles_buckets():
    run = jax.jit(
        functools.partial(execute.tiles, convolve, size=4, radius=1, strategy="buckets"), static_argnames="execution"
    )
    x = image(1, 16, 16, 2)
    for kept in (0, 1, 2, 5, 12, 13, 16):
        keep = first(kept, 16).reshape(1, 4, 4)
        y, masked = (run(x, keep, execution=execution) for execution in ("compact", "masked"))
        np.testing.assert_allclose(y, masked, rtol=1e-5, atol=1e-6)


def test_a_trip_of_the_tile_loop_costs_what_the_accounting_says():
    x, keep = image(1, 48, 64, 2), jnp.ones((1, 6, 8))
    run = functools.partial(execute.tiles, convolve, size=8, radius=1, execution="compact", strategy="loop")
    trips = 10**6
    macs = cost.macs(run, x, keep, while_trips=trips) / trips
    unit = 8 * 8 * 9 * 2 * 2
    group = tiles.strip_tiles(8, 1, 48)
    assert group > 1
    # Rows of the tile alone, columns of the border as well.
    assert unit * group <= macs <= unit * group * (8 + 2) / 8


def test_break_evens():
    assert execute.break_even(16, 0) == execute.BREAK_EVEN_TILES
    assert execute.break_even(16, 4) < execute.break_even(16, 2) < 1


@pytest.mark.parametrize("shape", [(2, 10, 13, 2), (1, 3, 2, 2)], ids=str)
def test_tiles_that_the_border_cuts_and_maps_smaller_than_a_tile(shape):
    grid = (shape[0], -(-shape[1] // 4), -(-shape[2] // 4))
    x, size = image(*shape), 4

    def run(x, keep):
        ways = [("masked", "auto"), ("compact", "loop"), ("compact", "buckets")]
        tiles = functools.partial(execute.tiles, convolve, x, keep, size=size, radius=1)
        return [tiles(execution=execution, strategy=strategy) for execution, strategy in ways]

    with mock.patch.multiple(execute, BREAK_EVEN_TILES=1e9):
        run = jax.jit(run).lower(x, jnp.zeros(grid)).compile()
    for kept in {0, 1, np.prod(grid) // 2, np.prod(grid)}:
        keep = first(kept, np.prod(grid)).reshape(grid)
        masked, *compact = run(x, keep)
        pixels = np.kron(np.asarray(keep), np.ones((size, size)))[:, : shape[1], : shape[2], None]
        np.testing.assert_array_equal(masked, np.where(pixels, run(x, jnp.ones(grid))[0], x))
        for y in compact:
            np.testing.assert_allclose(y, masked, rtol=1e-5, atol=1e-5)


# Branches, and what all share


@pytest.mark.parametrize("strategy", ["loop", "buckets"])
def test_branches_run_each_block_on_its_own_examples(strategy):
    blocks = [lambda x: x, lambda x: 2 * x, lambda x: x**2]
    x, choice = image(5, 3), jax.nn.one_hot(jnp.asarray([2, 0, 1, 1, 0]), 3)
    expected = jnp.stack([x[0] ** 2, x[1], 2 * x[2], 2 * x[3], x[4]])
    for execution in ("masked", "compact"):
        run = jax.jit(functools.partial(execute.branches, blocks, execution=execution, strategy=strategy))
        np.testing.assert_array_equal(run(x, choice), expected)


def test_blend_passes_gradients_to_keep_and_to_the_side_that_is_taken():
    keep, kept, other = jnp.asarray([1.0, 0.0]), image(2, 3), image(2, 3, seed=1)
    pulls = jax.grad(lambda *args: execute.blend(*args).sum(), argnums=(0, 1, 2))(keep, kept, other)
    np.testing.assert_allclose(pulls[0], (kept - other).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(pulls[1], [[1] * 3, [0] * 3])
    np.testing.assert_array_equal(pulls[2], [[0] * 3, [1] * 3])


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_another_type_of_numbers(execution):
    """A block with float32 parameters on a bfloat16 map gives float32, whatever way it is run."""
    x, keep = image(3, 4, 4, 2).astype(jnp.bfloat16), jnp.asarray([1.0, 0.0, 1.0])

    def block(x):
        return x.astype(jnp.float32) * 1.001

    for strategy in ("loop", "buckets"):
        ways = dict(execution=execution, strategy=strategy)
        for y in (
            execute.samples(block, x, keep, **ways),
            execute.tiles(block, x, jnp.ones((3, 2, 2)).at[1].set(0), size=2, radius=0, **ways),
            execute.branches([lambda x: x, block], x, jax.nn.one_hot(keep.astype(int), 2), **ways),
        ):
            assert y.dtype == jnp.float32
            np.testing.assert_array_equal(y, jnp.where(keep[:, None, None, None] > 0, block(x), x))


def test_errors_name_what_was_wrong():
    x, keep = image(2, 8, 8, 2), jnp.ones(2)
    for execution in ("masked", "compact"):
        with pytest.raises(ValueError, match=r"keep has shape \(2, 2, 3\).*\(2, 2, 2\)"):
            execute.tiles(convolve, x, jnp.ones((2, 2, 3)), size=4, radius=1, execution=execution)
        with pytest.raises(ValueError, match=r"the block \(\S+\) gives shape \(2, 8, 8, 1\).*otherwise"):
            execute.samples(lambda x: x[..., :1], x, keep, execution=execution)
        with pytest.raises(ValueError, match="choice has 2 branches and there are 1 blocks"):
            execute.branches([convolve], x, jnp.ones((2, 2)), execution=execution)


def multiplies(program):
    """Computations of a compiled program that multiply, and that loop, themselves or in what they call."""
    bodies, calls = {}, {}
    for part in program.split("\n\n"):
        if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", part.strip()):
            bodies[head[1]] = part
            # Neither the branches of a conditional nor the body of a loop.
            calls[head[1]] = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", part)

    def within(name, what):
        return bool(re.search(f" ({what})\\(", bodies[name])) or any(within(each, what) for each in calls[name])

    return [{name for name in bodies if within(name, what)} for what in ("dot|convolution", "while")]


@pytest.mark.optimised
@pytest.mark.parametrize("strategy", ["loop", "buckets"])
@pytest.mark.parametrize("examples", [1, 2, 5])
def test_the_compiled_program_multiplies_only_where_something_was_decided(examples, strategy):
    """XLA moves work out of loops: at one example all of a block, once, so that it was run whatever was kept.

    It moves it to beside the loop, into the branch that is taken where little is kept, and not to the program's entry.
    """
    kernel = jnp.ones((4, 4))

    def samples(x, keep):
        return execute.samples(lambda x: jnp.tanh(x @ kernel), x, keep, execution="compact", strategy=strategy)

    def tiles(x, keep):
        return execute.tiles(
            lambda x: jnp.tanh(x @ kernel), x, keep, size=2, radius=0, execution="compact", strategy=strategy
        )

    cases = [(samples, (examples, 6, 4), (examples,)), (tiles, (examples, 2, 2, 4), (examples, 1, 1))]
    for run, shape, units in cases:
        program = jax.jit(run).lower(jnp.ones(shape), jnp.ones(units)).compile().as_text()
        found, loops = multiplies(program)
        (entry,) = re.findall(r"^ENTRY %?([\w.-]+) ", program, re.MULTILINE)
        assert found and not found & (loops | {entry}), (run.__name__, program)
