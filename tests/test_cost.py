"""The MACs read from a jaxpr against XLA's own figures on CPU, and against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from dynjax import cost

MATRIX = jax.ShapeDtypeStruct((7, 7), jnp.float32)
SQUARE = 7**3
LAYOUT = ("NHWC", "HWIO", "NHWC")


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def xla_macs(fn, *args):
    """Half of the floating point operations that XLA counts in the compiled program."""
    analysis = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"] / 2


CONVOLUTIONS = {
    "same": ((3, 3, 8, 6), {}),
    "valid": ((3, 3, 8, 6), {"padding": "VALID"}),
    "even_kernel": ((4, 2, 8, 6), {}),
    "pointwise": ((1, 1, 8, 6), {}),
    "strided": ((3, 3, 8, 6), {"window_strides": (2, 3)}),
    "dilated": ((3, 3, 8, 6), {"rhs_dilation": (2, 4)}),
    "grouped": ((3, 3, 2, 12), {"feature_group_count": 4}),
    "depthwise": ((5, 5, 1, 8), {"feature_group_count": 8}),
    "transposed": ((3, 3, 8, 6), {"lhs_dilation": (2, 3), "padding": ((1, 1), (2, 0))}),
    "batch_grouped": ((3, 3, 8, 6), {"batch_group_count": 2}),
    "all_at_once": (
        (3, 2, 2, 12),
        {
            "padding": ((-1, 3), (2, -2)),
            "window_strides": (3, 2),
            "lhs_dilation": (2, 1),
            "rhs_dilation": (1, 3),
            "feature_group_count": 4,
        },
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_xla(name):
    kernel, options = CONVOLUTIONS[name]
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT} | options

    def convolve(image, kernel):
        return lax.conv_general_dilated(image, kernel, **options)

    args = spec(2, 9, 11, 8), spec(*kernel)
    assert cost.macs(convolve, *args) == xla_macs(convolve, *args)


def test_transposed_convolution_layer_equals_xla():
    image, kernel = spec(2, 5, 6, 8), spec(3, 3, 8, 4)

    def upsample(image, kernel):
        return lax.conv_transpose(image, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT)

    assert cost.macs(upsample, image, kernel) == xla_macs(upsample, image, kernel)


def test_taps_on_the_padding_count_only_when_asked():
    # One axis of 5 and a kernel of 3: 13 of the 15 taps lie on the image.
    image, kernel = spec(1, 5, 5, 2), spec(3, 3, 2, 4)

    def convolve(image, kernel):
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)

    assert cost.macs(convolve, image, kernel) == 13 * 13 * 2 * 4
    assert cost.macs(convolve, image, kernel, padding=True) == 15 * 15 * 2 * 4


def test_products_equal_xla():
    def attention(q, k, v):
        return jnp.einsum("bhqk,bkhd->bqhd", jnp.einsum("bqhd,bkhd->bhqk", q, k), v)

    assert cost.macs(jnp.matmul, spec(5, 7), spec(7, 9)) == xla_macs(jnp.matmul, spec(5, 7), spec(7, 9)) == 5 * 7 * 9
    heads = spec(2, 10, 4, 8), spec(2, 12, 4, 8), spec(2, 12, 4, 8)
    assert cost.macs(attention, *heads) == xla_macs(attention, *heads) == 2 * 4 * 10 * 12 * 8 * 2


def test_gradient_of_a_convolution_equals_xla():
    def loss(image, kernel):
        return (lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT) ** 2).sum()

    def gradients(image, kernel):
        return jax.grad(loss, (0, 1))(image, kernel)

    args = spec(2, 9, 11, 8), spec(3, 3, 8, 6)
    # Forward and two gradients: three times the forward. XLA counts the squares and their sum as well, 2% of it here.
    assert cost.macs(gradients, *args) == 3 * cost.macs(loss, *args)
    assert cost.macs(gradients, *args) == pytest.approx(xla_macs(gradients, *args), rel=0.02)


def test_upsampling_is_counted():
    def upsample(image):
        return jax.image.resize(image, (1, 8, 12, 64), "bilinear")

    # Rows first or columns first; XLA also counts how the weights of the two matrices come about.
    assert cost.macs(upsample, spec(1, 4, 6, 64)) in ((8 * 4 * 6 + 12 * 6 * 8) * 64, (12 * 6 * 4 + 8 * 4 * 12) * 64)
    assert cost.macs(upsample, spec(1, 4, 6, 64)) == pytest.approx(xla_macs(upsample, spec(1, 4, 6, 64)), rel=0.05)


def test_what_is_not_counted():
    def cheap(x):
        x = nnx.max_pool(jnp.tanh(x), (2, 2), (2, 2))
        return jnp.sort(x.mean(-1))[0]

    assert cost.count(cheap, spec(1, 8, 8, 3)) == cost.Cost(0.0)


def test_ragged_product_counts_each_row_once():
    rows, experts, sizes = spec(10, 4), spec(3, 4, 5), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert cost.macs(lax.ragged_dot, rows, experts, sizes) == 10 * 4 * 5


def test_scan_counts_its_length():
    def steps(matrix, unroll):
        return lax.scan(lambda carry, _: (carry @ matrix, None), matrix, None, length=5, unroll=unroll)[0]

    assert cost.macs(steps, MATRIX, 1) == 5 * SQUARE
    # XLA counts a loop's body once, whatever its length, so it is held to the unrolled loop.
    assert cost.macs(steps, MATRIX, 1) == pytest.approx(xla_macs(lambda m: steps(m, True), MATRIX), rel=0.01)
    assert cost.macs(lambda m: lax.map(lambda row: row @ m, m), MATRIX) == SQUARE


@pytest.mark.parametrize("jitted", [False, True])
def test_loops_of_known_bounds(jitted):
    def from_one_to_five(matrix, end):
        return lax.fori_loop(jnp.int32(1), end, lambda i, x: x @ matrix, matrix)

    def by_twos(matrix):
        return lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 2, c[1] @ matrix), (2, matrix))[1]

    inner = jax.jit(from_one_to_five) if jitted else from_one_to_five
    assert cost.macs(lambda m: inner(m, jnp.int32(5)), MATRIX) == 4 * SQUARE
    assert cost.macs(jax.jit(by_twos) if jitted else by_twos, MATRIX) == 3 * SQUARE
    assert cost.macs(lambda m: inner(m, jnp.int32(0)), MATRIX) == 0


def test_loops_of_unknown_length_are_named_or_bounded():
    def loop(matrix, n):
        return lax.fori_loop(0, n, lambda i, x: x @ matrix, matrix) @ matrix

    def called(matrix, n):
        return jax.jit(loop)(matrix, n)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    found = cost.count(called, MATRIX, n)
    assert found.macs == 2 * SQUARE
    assert len(found.unknown) == 1 and found.unknown[0].startswith("loop/while at ") and __file__ in found.unknown[0]
    with pytest.raises(ValueError, match=r"loop/while at .*while_trips"):
        cost.macs(called, MATRIX, n)
    assert cost.count(called, MATRIX, n, while_trips=10) == cost.Cost(11.0 * SQUARE)
    assert cost.macs(called, MATRIX, n, while_trips=0) == SQUARE


def test_loops_whose_counter_does_not_simply_count():
    def countdown(matrix):
        return lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] @ matrix), (3, matrix))[1]

    def halving(matrix):
        return lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] * 2, c[1] @ matrix), (1, matrix))[1]

    def moving_bound(matrix):
        body = lambda c: (c[0] + 1, c[1] - 1, c[2] @ matrix)  # noqa: E731
        return lax.while_loop(lambda c: c[0] < c[1], body, (0, 8, matrix))[2]

    def until_large(matrix):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ matrix, matrix)

    for loop in (countdown, halving, moving_bound, until_large):
        assert len(cost.count(loop, MATRIX).unknown) == 1, loop.__name__
    # A loop without products costs nothing however long it runs.
    assert cost.macs(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x), MATRIX) == 0


def test_a_known_loop_inside_an_unknown_one():
    def nested(matrix, n):
        inner = lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ matrix), (0, x))[1]  # noqa: E731
        return lax.fori_loop(0, n, lambda i, x: inner(x), matrix)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    assert cost.count(nested, MATRIX, n).macs == 3 * SQUARE
    assert cost.macs(nested, MATRIX, n, while_trips=4) == 12 * SQUARE


def test_branches_count_as_the_dearest():
    def branch(matrix, i):
        return lax.switch(i, [lambda m: m, lambda m: m @ m @ m, lambda m: m @ m], matrix)

    assert cost.macs(branch, MATRIX, jax.ShapeDtypeStruct((), jnp.int32)) == 2 * SQUARE
    by_platform = lambda m: lax.platform_dependent(m, cpu=lambda m: m, default=lambda m: m @ m)  # noqa: E731
    assert cost.macs(by_platform, MATRIX) in (0, SQUARE)  # a JAX that knows the platform while tracing keeps one branch


def test_calls_count_as_what_they_hold():
    @jax.custom_vjp
    def vjp(m):
        return m @ m

    vjp.defvjp(lambda m: (vjp(m), m), lambda m, g: (2 * g @ m.T,))

    @jax.custom_jvp
    def jvp(m):
        return m @ m

    jvp.defjvp(lambda primals, tangents: (jvp(*primals), tangents[0] @ primals[0]))

    for call in (jax.jit(jax.jit(jnp.dot)), nnx.jit(jnp.dot)):
        assert cost.macs(call, MATRIX, MATRIX) == SQUARE
    for call in (vjp, jvp, jax.checkpoint(lambda m: jnp.sin(m @ m))):
        assert cost.macs(call, MATRIX) == SQUARE
        assert cost.macs(jax.grad(lambda m, call=call: call(m).sum()), MATRIX) >= 2 * SQUARE
    assert cost.macs(vjp, MATRIX) == xla_macs(vjp, MATRIX)
    solve = lambda m: lax.custom_linear_solve(lambda x: m @ x, m[0], lambda _, b: m @ (m @ b))  # noqa: E731
    assert cost.macs(solve, MATRIX) == 2 * 7 * 7


def test_a_mapped_shard_counts_for_every_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data", None)
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert cost.macs(product, spec(8, 7), MATRIX) == 8 * 7 * 7


def test_a_pallas_kernel_counts_its_grid():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(rows, matrix, out):
        out[...] = rows[...] @ matrix[...]

    def product(rows, matrix):
        strip = pallas.BlockSpec((2, 7), lambda i: (i, 0))
        whole = pallas.BlockSpec((7, 7), lambda i: (0, 0))
        shape = jax.ShapeDtypeStruct((8, 7), jnp.float32)
        call = pallas.pallas_call(kernel, shape, grid=(4,), in_specs=[strip, whole], out_specs=strip, interpret=True)
        return call(rows, matrix)

    assert cost.macs(product, spec(8, 7), MATRIX) == 8 * 7 * 7


class Block(nnx.Module):
    """A convolution, BatchNorm and dropout: statistics and random counts that a call changes."""

    def __init__(self, rngs):
        self.convolution = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, twice=False):
        x = self.dropout(self.norm(self.convolution(x)))
        return x @ jnp.ones((4, 4)) if twice else x

    def only_convolve(self, x):
        return self.convolution(x)


def snapshot(module):
    leaves = jax.tree.leaves(nnx.state(module))
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.array(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, keys, strict=True)]


BLOCK_MACS = 2 * 6 * 6 * 9 * 3 * 4


def test_modules_are_counted_and_left_as_they_are():
    block, image = Block(nnx.Rngs(0)), spec(2, 8, 8, 3)
    before = snapshot(block)
    assert cost.macs(block, image) == BLOCK_MACS
    assert cost.macs(block, jnp.ones((2, 8, 8, 3), jnp.bfloat16), twice=True) == BLOCK_MACS + 2 * 6 * 6 * 4 * 4
    assert cost.macs(block.only_convolve, image) == BLOCK_MACS
    assert cost.macs(lambda blocks, x: blocks[0](x) + blocks[1](x), [block, block], image) == 2 * BLOCK_MACS
    for old, new in zip(before, snapshot(block), strict=True):
        np.testing.assert_array_equal(old, new)


def test_counting_inside_jit_and_grad():
    block = Block(nnx.Rngs(0))

    @nnx.jit
    def step(block, x):
        def loss(block):
            return block(x).sum() * cost.macs(block, x)

        return nnx.value_and_grad(loss)(block)

    value, _ = step(block, jnp.ones((2, 8, 8, 3)))
    assert cost.macs(block, spec(2, 8, 8, 3)) == BLOCK_MACS
    assert jnp.isfinite(value)


def test_modules_that_share_weights_stay_one():
    shared = nnx.Linear(7, 7, rngs=nnx.Rngs(0))
    seen = []

    def same(first, second, x):
        seen.append(first is second)
        return first(x) + second(x)

    assert cost.macs(same, shared, shared, MATRIX) == 2 * SQUARE
    assert seen == [True]
