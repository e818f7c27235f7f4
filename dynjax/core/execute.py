"""Executors carry a decision out. One signature, two executions with the same answer.

`masked` computes everything and blends: differentiable, for training. `compact` computes only what was kept, under
`jit`, with static shapes. How compact skips is a `strategy`: "loop" has a trip count known at run time (a CPU pays for
exactly what is kept), "buckets" picks one of a few capacities and makes one large launch (what a GPU or TPU wants; an
overflow takes the next capacity, nothing is dropped), "auto" chooses by platform. Where nearly everything is kept, both
run the block on the whole input, past a break-even that `benchmarks/executors.py` measures.

Blocks are called as they are and must not change state (BatchNorm on running averages) when compact.
Letters: B examples, H W pixels, C channels, h w tiles, K branches.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float

from dynjax.core.arguments import Tree, first, name_of, shapes
from dynjax.core.devices import spread_over
from dynjax.core.examples import shape_apart
from dynjax.core.tiles import kept_first, kept_tiles, tile_pixels
from dynjax.core.views import fresh

Execution = Literal["masked", "compact"]
Strategy = Literal["auto", "loop", "buckets"]

CAPACITIES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Shares of all units that the buckets hold; more takes the whole input."""
BREAK_EVEN_SAMPLES = 0.9
"""Share of examples from which the whole batch is faster than the kept examples one by one."""
BREAK_EVEN_TILES = 0.8
"""Pixels computed for the kept tiles, as a share of the map, from which the whole map is faster."""


def blend(keep: Float[Array, "..."], kept: Array, other: Array) -> Array:
    """`kept` where `keep` is 1 and `other` where it is 0; the gradient to `keep` is their difference.

    `keep` has the leading axes of the others. Chosen, not multiplied: what was not taken may be infinite or no number,
    as it may when compact. Its gradient is 0, and where the difference is not finite, so is that of `keep`. What a
    block makes of the gradient 0 is its own matter: one with an infinite derivative there gives its parameters NaN.
    """
    keep = keep.reshape(keep.shape + (1,) * (kept.ndim - keep.ndim))
    dtype = jnp.result_type(kept, other)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.where(keep > 0.5, kept, other)
    return _chosen(keep.astype(dtype), kept.astype(dtype), other.astype(dtype))


@jax.custom_jvp
def _chosen(keep, kept, other):
    return jnp.where(keep > 0.5, kept, other)


@_chosen.defjvp
def _chosen_jvp(primals, tangents):
    keep, kept, other = primals
    to_keep, to_kept, to_other = tangents
    difference = finite(kept - other)
    return _chosen(*primals), jnp.where(keep > 0.5, to_kept, to_other) + to_keep * difference


def finite(x: Array, unless: Array | bool = False) -> Array:
    """`x` with 0 for what is not finite, but where `unless` is true: there it counts, and must be seen.

    For what is multiplied by a weight that is 0 where it was not chosen, since 0 times infinity is no number.
    """
    return jnp.where(unless | jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def weighted(weight: Float[Array, "..."], x: Array) -> Array:
    """`x` times a weight of its leading axes; 0 where that is 0, whatever `x` is."""
    weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim)).astype(x.dtype)
    return weight * finite(x, unless=weight != 0)


def samples(
    block: Callable[[Tree], Tree],
    x: Tree,
    keep: Float[Array, " B"],
    *,
    otherwise: Callable[[Tree], Tree] | None = None,
    execution: Execution = "masked",
    strategy: Strategy = "auto",
) -> Tree:
    """`block(x)` for the kept examples and `otherwise(x)` (default: `x` itself) for the others.

    `x`, and what `block` gives, are arrays or trees of arrays whose first axis is the examples. Of `Examples` the first
    alone passes on, or goes through `otherwise`.

    Raises:
        ValueError: if `block` and `otherwise` give different shapes, or `block`, compact, mixes the examples.
    """
    other = first(x) if otherwise is None else otherwise(first(x))
    for leaf in jax.tree.leaves(other):
        if leaf.shape[:1] != keep.shape:
            raise ValueError(
                f"{keep.shape[0]} examples are decided about, and an output has shape {leaf.shape}: all that a skipped "
                "block gives must have the examples as its first axis; leave sums over them outside of it"
            )
    if execution == "masked":
        return jax.tree.map(functools.partial(blend, keep), _like(block(x), other, block), other)
    block, types = _one_type(block, _like(shape_apart(block, x), other, block), other)
    other = jax.tree.map(lambda o, t: o.astype(t), other, types)
    return _samples_compact(block, x, keep, other, strategy)


def tiles(
    block: Callable[[Tree], Array],
    x: Tree,
    keep: Float[Array, "B h w"],
    *,
    size: int,
    radius: int,
    otherwise: Callable[[Array], Array] | None = None,
    execution: Execution = "masked",
    strategy: Strategy = "auto",
) -> Array:
    """`block(x)` on the kept tiles of `size` pixels and `otherwise(x)` (default: `x` itself) on the others.

    `block` must have stride 1, SAME padding and a receptive radius of at most `radius` pixels. The last row and column
    of tiles are cut by the border where H or W is no multiple of `size`. Of `Examples`, other maps are cut into windows
    as `x` is, and anything else goes with the tiles of its example.

    Raises:
        ValueError: if `keep` has another number of tiles, or `block` and `otherwise` give different shapes.
    """
    own = first(x)
    grid = tuple(-(-n // size) for n in own.shape[1:3])
    if keep.shape != (own.shape[0], *grid):
        raise ValueError(
            f"keep has shape {keep.shape}; "
            f"{own.shape[1]}x{own.shape[2]} pixels in tiles of {size} need {(own.shape[0], *grid)}"
        )
    rest = _same if otherwise is None else otherwise
    if execution == "masked":
        other = rest(own)
        return blend(tile_pixels(keep, size, own.shape[1:3]), _like(block(x), other, block), other)
    rest, spec = fresh(rest), shape_of(rest, own)
    block, dtype = _one_type(block, _like(shape_of(block, x), spec, block), spec)
    return _tiles_compact(block, x, keep, lambda: rest(own).astype(dtype), size, radius, strategy)


def branches(
    blocks: Sequence[Callable[[Tree], Array]],
    x: Tree,
    choice: Float[Array, "B *tiles K"],
    *,
    size: int | None = None,
    radius: int | Sequence[int] = 0,
    execution: Execution = "masked",
    strategy: Strategy = "auto",
) -> Array:
    """The block that `choice` (one-hot over K) picks, per example, or per tile of `size` pixels.

    `radius`: receptive radius of each block in pixels, or one for all; per tile only.
    """
    if choice.shape[-1] != len(blocks):
        raise ValueError(f"choice has {choice.shape[-1]} branches and there are {len(blocks)} blocks")
    radii = (radius,) * len(blocks) if isinstance(radius, int) else tuple(radius)
    if execution == "masked":
        outs = [block(x) for block in blocks]
        weights = [choice[..., k] for k in range(len(blocks))]
        weights = weights if size is None else [tile_pixels(w, size, outs[0].shape[1:3]) for w in weights]
        zero = jnp.zeros_like(outs[0])
        return sum((blend(w, _like(y, zero), zero) for w, y in zip(weights, outs, strict=True)), zero)
    specs = [(shape_apart if size is None else shape_of)(block, x) for block in blocks]
    y = jnp.zeros(specs[0].shape, jnp.result_type(*(spec.dtype for spec in specs)))
    for k, (block, spec) in enumerate(zip(blocks, specs, strict=True)):
        block, _ = _one_type(block, _like(spec, y), y)
        if size is None:
            y = _samples_compact(block, x, choice[..., k], y, strategy)
        else:
            y = _tiles_compact(block, x, choice[..., k], functools.partial(_same, y), size, radii[k], strategy)
    return y


# Examples


def _samples_compact(block, x, keep, other, strategy):
    x, keep, other = spread_over((x, keep, other))
    kept = keep > 0.5
    order, number = kept_first(kept)
    examples = keep.shape[0]

    def whole():
        # Chosen, not blended: leaves may be integers.
        choose = lambda y, o: jnp.where(kept.reshape(-1, *[1] * (o.ndim - 1)), y, o)  # noqa: E731
        return jax.tree.map(choose, block(x), other)

    def loop():
        def body(i, out):
            one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, order[i], keepdims=True), x)
            return jax.tree.map(lambda o, y: lax.dynamic_update_index_in_dim(o, y, order[i], 0), out, block(one))

        def some():
            run = lambda: lax.fori_loop(0, number, body, other)  # noqa: E731
            return none_or(number, run, functools.partial(_same, other), examples)

        if examples == 1:
            # Not a loop: XLA moves what does not depend on the trip out of it, which here is all of the block.
            return lax.cond(number > 0, whole, lambda: other)
        return lax.cond(number > BREAK_EVEN_SAMPLES * examples, whole, some)

    def buckets():
        def run(capacity):
            index = order[:capacity]
            # The places beyond the kept ones point past the end: their result is written nowhere.
            index = jnp.where(jnp.arange(capacity) < number, index, examples)
            y = block(jax.tree.map(lambda a: a.at[index].get(mode="clip"), x))
            return jax.tree.map(lambda o, y: o.at[index].set(y, mode="drop"), other, y)

        return smallest_bucket(number, examples, run, whole, functools.partial(_same, other))

    return jax.tree.map(_forward_only, by_platform(strategy, loop, buckets))


# Tiles


def _tiles_compact(block, x, keep, passing, size, radius, strategy):
    x, keep = spread_over((x, keep))

    def other():
        # Called where it is needed: outside of the switch it would cost as much when every tile is kept.
        return spread_over(passing(), over=(x, keep))

    total = keep.size
    work = kept_tiles(block, x, keep, other, size, radius)

    def blended(y):
        return blend(tile_pixels((keep > 0.5).astype(y.dtype), size, y.shape[1:3]), y, other())

    if work is None:
        return blended(block(x))

    def whole():
        y = block(x)
        return lax.cond(work.number == total, lambda: y, lambda: blended(y))

    def loop():
        if total == 1:
            return lax.cond(work.number > 0, lambda: block(x), other)
        some = functools.partial(none_or, work.number, work.few_at_a_time, other, total)
        return lax.cond(work.number > break_even(size, radius) * total, whole, some)

    def buckets():
        return smallest_bucket(work.number, total, work.at_once, whole, other)

    return _forward_only(by_platform(strategy, loop, buckets))


def break_even(size: int, radius: int) -> float:
    """Share of kept tiles from which the block is faster on the whole map."""
    return BREAK_EVEN_TILES / ((size + 2 * radius) * (size + radius) / size**2)


# Shared


def none_or(number, some, none, total):
    """`some()`; where `total` is free, `none()` for no unit at all.

    A program for any number of units may be run, and then compiled, with one. Its loop over them would make one trip at
    most, out of which XLA moves all of the block: it must not be in what is run where nothing was kept.
    """
    return lax.cond(number > 0, some, none) if export.is_symbolic_dim(total) else some()


def smallest_bucket(number, total, run, whole, none):
    """`run` the smallest capacity that holds `number` units; `none` for 0, `whole` past the largest.

    Raises:
        ValueError: if the number of all units is free, as when a program is exported for any batch.
    """
    if export.is_symbolic_dim(total):
        raise ValueError(
            f"strategy='buckets' needs to know how many units there are, and here there are {total}: export a free "
            "batch with nnx.view(model, strategy='loop'), or one batch size of your choice"
        )
    capacities = sorted({math.ceil(share * total) for share in CAPACITIES if math.ceil(share * total) < total})
    # Counted, not searched for: that has a loop of its own.
    index = (number > jnp.asarray([0, *capacities])).sum(dtype=jnp.int32)
    return one_of(index, [none, *(functools.partial(run, c) for c in capacities), whole])


def one_of(index, ways):
    """What `ways[index]` gives; as `lax.switch`, of which ONNX has none but for two."""
    if jax.default_backend() != "cpu":
        return lax.switch(index, ways)  # elsewhere the host waits for every condition
    if len(ways) == 1:
        return ways[0]()
    half = len(ways) // 2
    return lax.cond(index < half, lambda: one_of(index, ways[:half]), lambda: one_of(index - half, ways[half:]))


def by_platform(strategy: str, loop: Callable[[], Tree], buckets: Callable[[], Tree]) -> Tree:
    """What the strategy says; "auto" is the loop on a CPU and buckets elsewhere. Raises ValueError for another."""
    if strategy == "auto":
        # Not lax.platform_dependent: it traces both ways, which takes longer than all the rest. To export for another
        # platform than this process runs on, name the strategy.
        strategy = "loop" if jax.default_backend() == "cpu" else "buckets"
    if strategy not in ("loop", "buckets"):
        raise ValueError(f"strategy={strategy!r} must be 'auto', 'loop' or 'buckets'")
    return loop() if strategy == "loop" else buckets()


@jax.custom_jvp
def _forward_only(x):
    return x


@_forward_only.defjvp
def _no_derivative(primals, tangents):
    raise ValueError(
        "compact execution has no derivative, since what is not computed has none to give to the gates: take gradients "
        "of the masked execution, nnx.view(model, execution='masked')"
    )


def _same(x):
    return x


def shape_of(block: Callable, x: Tree) -> Tree:
    """Shapes and types of `block(x)`, an array or a tree of arrays."""
    return jax.eval_shape(fresh(block), shapes(x))


def _one_type(block, spec, other):
    """`block`, whose output is like `spec`, giving the types that blending it with `other` gives; and these types."""
    types = jax.tree.map(lambda s, o: jnp.promote_types(s.dtype, o.dtype), spec, other)
    if all(s.dtype == t for s, t in zip(jax.tree.leaves(spec), jax.tree.leaves(types), strict=True)):
        return block, types
    return (lambda x: jax.tree.map(lambda y, t: y.astype(t), block(x), types)), types


def _like(y, other, block=None):
    """`y`, once its shape is known to be that of what it is put together with."""
    shapes = [jax.tree.map(lambda a: a.shape, tree) for tree in (y, other)]
    if shapes[0] != shapes[1]:
        name = "the block" if block is None else f"the block ({name_of(block)})"
        raise ValueError(
            f"{name} gives shape {shapes[0]} and what it is put together with has {shapes[1]}; "
            "give an `otherwise`, or branches, of one shape"
        )
    return y
