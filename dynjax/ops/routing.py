"""Dynamic routing: one of several modules for each example or tile, and any of the paths out of a cell.

Letters: B examples, H W pixels, C D channels, h w tiles, K branches, P paths.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import execute, views, wrapper
from dynjax.core.arguments import Tree, examples_of
from dynjax.core.decision import EACH, ONE, Decision
from dynjax.core.receptive import receptive_radius
from dynjax.core.wrapper import Wrapper


class Select(Wrapper):
    """Run one of K modules, for each example, or for each tile where the gate has a `size`: dynamic kernel selection.

    Hard selection with straight-through Gumbel softmax, as in Veit & Belongie 2018 (arXiv:1711.11503, section 3.2) for
    two branches. The modules must give one shape; per tile they must have stride 1 and SAME padding (see `Tiles`).

    Args:
        blocks: K modules, the cheapest first: a budget moves the choice towards the first. Per example they may hold
            dynamic modules.
        gate: gives a one-hot decision of shape (B, K), or (B, h, w, K), for example
            `BranchGate(channels, K, rngs=rngs)`.
        batched: as in `Skip`; all blocks are called with the same.

    Raises:
        ValueError: if shapes do not agree or, per tile, a block is dynamic itself.
    """

    by_hand = (
        "it needs several blocks: lambda block, features, rngs: "
        "dj.Select([cheap(features, rngs), block], dj.BranchGate(features, 2, rngs=rngs))"
    )

    def __init__(self, blocks: Sequence[Callable], gate: Callable, *, batched: Collection[int | str] | None = None):
        if not blocks:
            raise ValueError("Select needs at least one module; blocks is empty")
        for block in blocks if wrapper.tile_size(gate) is not None else ():
            wrapper.refuse_nested("Select per tile", block)
        self.blocks, self.gate, self.batched = nnx.List(blocks), gate, batched

    @property
    def nests(self) -> bool:
        return wrapper.tile_size(self.gate) is None

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        x, blocks, inputs = self.bind(self.blocks, args, kwargs)
        size = wrapper.tile_size(self.gate)
        shape = (examples_of(x), *(() if size is None else wrapper.grid(x, size)), len(blocks))
        hint = f"use BranchGate(channels, {len(blocks)}, size={size}, rngs=rngs)"
        decision = self.expect(self.gate(x), "example" if size is None else "tile", ONE, shape, hint)
        if size is None:
            self.account_blocks(decision, blocks, [inputs] * len(blocks))
            return self.branches(blocks, inputs, decision.keep, decision.probability)
        radii = [receptive_radius(block, inputs) for block in blocks]
        self.account_tiles(decision, blocks, inputs, size, radii)
        blocks = [wrapper.ready(block, self.execution) for block in blocks]
        return execute.branches(
            blocks, inputs, decision.keep, size=size, radius=radii, execution=self.execution, strategy=self.strategy
        )


class Flow(NamedTuple):
    """What comes along a path: features, and for which examples (1; else 0, and the features are zeros)."""

    features: Float[Array, "B H W C"]
    arrived: Float[Array, " B"]


class Cell(Wrapper):
    """A cell of a multi-scale supernet: an operation, and the paths up (finer), keep and down (coarser) out of it.

    Dynamic routing (Li et al. 2020, arXiv:2003.10401, section 3.2): the sum x of what comes in goes through the
    operation, h = operation(x), and along each path that the gate leaves open, weighted: weight * path(h). A cell whose
    paths are all closed is dropped, and x passes on at its own scale, so there always is a path from input to output.
    Each example has paths of its own, and compact execution runs nothing for a closed path or a dropped cell.

    The threshold is taken off the gate's logits, so weights fall to 0 as it rises and rise to 1 as it falls. Deviation:
    a cell where nothing arrives is dropped as well. BatchNorm inside sees such examples as zeros while training, as it
    does in the published code.

    Args:
        operation: keeps the shape (B, H, W, C). Paths have no activation of their own: end it with one.
        gate: gives a decision of shape (B, P) over the paths that there are, in the order up, keep, down, for example
            `PathGate(channels, P, rngs=rngs)`; its `probability` is the weight. None opens all paths, with weight 1,
            and decides nothing: the static twin.
        up: from C channels to those of the finer scale, at its resolution (or more: the surplus is cut off).
        down: from C channels to those of the coarser scale, at its resolution.

    Raises:
        ValueError: if shapes do not agree or a part is dynamic itself.
    """

    by_hand = (
        "it is a part of a supernet: dj.Cell(operation, dj.PathGate(features, paths, rngs=rngs), up=up, down=down)"
    )

    def __init__(
        self,
        operation: Callable,
        gate: Callable | None = None,
        *,
        up: Callable | None = None,
        down: Callable | None = None,
    ):
        for part in (operation, up, down):
            if part is not None:
                wrapper.refuse_nested("Cell", part)
        self.operation, self.gate, self.up, self.down = operation, gate, up, down

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that there are, in the order of the gate's decisions."""
        return tuple(self._ways())

    def _ways(self) -> dict[str, Callable]:
        ways = {"up": self.up, "keep": _same, "down": self.down}
        return {path: way for path, way in ways.items() if way is not None}

    def __call__(self, *inputs: Flow | Float[Array, "B H W C"]) -> dict[str, Flow]:
        """What goes out along each path; the inputs, of one shape, are summed."""
        x, arrived = _sum(inputs)
        ways = self._ways()
        if self.gate is None:
            h = self.operation(x)
            return {path: Flow(way(h), arrived) for path, way in ways.items()}

        shape = (x.shape[0], len(self.paths))
        hint = f"use PathGate(channels, {len(self.paths)}, rngs=rngs) for the paths {', '.join(self.paths)}"
        decision = self.expect(self.gate(x), "example", EACH, shape, hint)
        decision = _of_cell(decision, arrived)
        if self.tracing:
            h = jax.ShapeDtypeStruct(x.shape, x.dtype)
            paths = (wrapper.macs_per_example(way, h) for way in ways.values())
            macs = (wrapper.macs_per_example(self.operation, x), *paths)
            self.account(decision, macs, macs)

        # The task's gradient reaches the gate through the weights alone, as in the paper.
        keep = jax.lax.stop_gradient(decision.keep)
        runs, opens = keep[:, 0], dict(zip(self.paths, keep[:, 1:].T, strict=True))
        weights = dict(zip(self.paths, decision.probability[:, 1:].T, strict=True))
        samples = functools.partial(execute.samples, execution=self.execution, strategy=self.strategy)
        h = samples(wrapper.ready(self.operation, self.execution), x, runs)
        out = {}
        for path in self.paths:
            if path == "keep":  # h is x where the cell is dropped
                weight = opens[path] * weights[path] + (1 - runs)
                out[path] = Flow(execute.weighted(weight, h), arrived * jnp.maximum(opens[path], 1 - runs))
            else:
                y = _along(wrapper.ready(ways[path], self.execution), h, opens[path], weights[path], samples)
                out[path] = Flow(y, opens[path])
        return out


def _sum(inputs: Sequence[Flow | jax.Array]) -> Flow:
    flows = [each if isinstance(each, Flow) else Flow(each, jnp.ones(each.shape[:1], jnp.float32)) for each in inputs]
    shapes = [flow.features.shape for flow in flows]
    if len(set(shapes)) != 1:
        raise ValueError(f"a cell's inputs have shapes {shapes}; it sums them, so all must have one")
    features, arrived = flows[0]
    for flow in flows[1:]:
        features, arrived = features + flow.features, jnp.maximum(arrived, flow.arrived)
    return Flow(features, arrived)


def _of_cell(decision: Decision, arrived: jax.Array) -> Decision:
    """The decision about the operation, which runs if any path is open, and then about the paths."""
    keep, weight = decision.keep * arrived[:, None], decision.probability * arrived[:, None]
    # Open paths first, then those of large weight: the operation is as open as the most open path, with its gradient.
    most = jnp.argmax(jax.lax.stop_gradient(keep + weight), -1, keepdims=True)
    first = [jnp.take_along_axis(each, most, 1) for each in (keep, weight)]
    keep, weight = (jnp.concatenate(pair, 1) for pair in ((first[0], keep), (first[1], weight)))
    return dataclasses.replace(decision, keep=keep, probability=weight)


def _along(path: Callable, h: jax.Array, opens: jax.Array, weight: jax.Array, samples: Callable) -> jax.Array:
    spec = execute.shape_of(views.still(path), h)

    def weighted(args):
        h, weight = args
        return execute.weighted(weight, path(h))

    return samples(weighted, (h, weight), opens, otherwise=lambda _: jnp.zeros(spec.shape, spec.dtype))


def _same(x: jax.Array) -> jax.Array:
    return x
