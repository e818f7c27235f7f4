"""Dynamic routing: one of several modules for each example or tile.

Letters: B examples, H W pixels, h w tiles, K branches.
"""

from collections.abc import Callable, Sequence

from flax import nnx
from jaxtyping import Array, Float

from dynjax import execute
from dynjax.ops import wrapping
from dynjax.ops.receptive import receptive_radius
from dynjax.ops.spatial import window_macs


class Select(nnx.Module):
    """Run one of K modules, for each example, or for each tile where the gate has a `size`: dynamic kernel selection.

    Hard selection with straight-through Gumbel softmax, as in Veit & Belongie 2018 (arXiv:1711.11503, section 3.2) for
    two branches. The modules must give one shape; per tile they must have stride 1 and SAME padding (see `Tiles`).

    Args:
        blocks: K modules, the cheapest first: a budget moves the choice towards the first.
        gate: gives a one-hot decision of shape (B, K), or (B, h, w, K), for example
            `BranchGate(channels, K, rngs=rngs)`.

    Raises:
        ValueError: if shapes do not agree or a block is dynamic itself.
    """

    def __init__(self, blocks: Sequence[Callable], gate: Callable):
        if not blocks:
            raise ValueError("Select needs at least one module; blocks is empty")
        for block in blocks:
            wrapping.refuse_nested("Select", block)
        self.blocks, self.gate = nnx.List(blocks), gate
        self.execution, self.strategy = "masked", "auto"

    def set_view(
        self,
        execution: str | None = None,
        strategy: str | None = None,
        deterministic: bool | None = None,
        use_running_average: bool | None = None,
    ) -> None:
        # The last two are for gates and blocks; named here, since nnx.view refuses names that no module has.
        self.execution, self.strategy = execution or self.execution, strategy or self.strategy

    def __call__(self, x: Float[Array, "B ..."]) -> Array:
        size = getattr(self.gate, "size", None)
        grid = () if size is None else wrapping.grid(x, size)
        shape = (x.shape[0], *grid, len(self.blocks))
        granularity = "branch" if size is None else "tile branch"
        hint = f"use BranchGate(channels, {len(self.blocks)}, size={size}, rngs=rngs)"
        decision = wrapping.expect(self.gate(x), granularity, shape, "Select", hint)
        radii = [0 if size is None else receptive_radius(block, x) for block in self.blocks]
        if wrapping.tracing(self):
            whole = tuple(wrapping.macs_per_example(block, x) for block in self.blocks)
            pairs = zip(self.blocks, radii, strict=True)
            unit = whole if size is None else tuple(window_macs(block, x, size, radius) for block, radius in pairs)
            wrapping.account(self, decision, unit, whole, wrapping.tile_of(x, size))
        blocks = [wrapping.ready(block, self.execution) for block in self.blocks]
        return execute.branches(
            blocks, x, decision.keep, size=size, radius=radii, execution=self.execution, strategy=self.strategy
        )
