"""Blocks that examples skip.

Letters: B examples.
"""

from collections.abc import Callable

from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import execute, wrapping


class Skip(nnx.Module):
    """Run `block` for the examples that the gate keeps; the others pass unchanged, or through `otherwise`.

    SkipNet (Wang et al. 2018, arXiv:1711.09485, eq. 1) and ConvNet-AIG (Veit & Belongie 2018, arXiv:1711.11503, eq. 3),
    around any module. Deviation: both multiply the residual branch; here the block with its shortcut is skipped whole,
    so it may be any module that keeps its input's shape (or has that of `otherwise`).

    Args:
        block: what to skip, (B, ...) to (B, ...).
        gate: gives a decision of shape (B,), for example `SampleGate(channels, rngs=rngs)`.
        otherwise: a cheap module for the examples not kept; always run, so its cost is static.

    Raises:
        ValueError: if shapes do not agree, `block` is dynamic itself, or, compact, it mixes the examples of a batch.
    """

    def __init__(self, block: Callable, gate: Callable, *, otherwise: Callable | None = None):
        wrapping.refuse_nested("Skip", block)
        self.block, self.gate, self.otherwise = block, gate, otherwise
        self.execution: execute.Execution = "masked"
        self.strategy: execute.Strategy = "auto"

    def set_view(
        self,
        execution: str | None = None,
        strategy: str | None = None,
        deterministic: bool | None = None,
        use_running_average: bool | None = None,
    ) -> None:
        # The last two are for gates and blocks; named here, since nnx.view refuses names that no module has.
        wrapping.set_ways(self, execution, strategy)

    def __call__(self, x: Float[Array, "B ..."]) -> Array:
        hint = "use SampleGate, or FixedGate of shape (B,)"
        decision = wrapping.expect(self.gate(x), "sample", (x.shape[0],), "Skip", hint)
        if wrapping.tracing(self):
            whole = (wrapping.macs_per_example(self.block, x),)
            wrapping.account(self, decision, whole, whole)
        block = wrapping.ready(self.block, self.execution)
        return execute.samples(
            block, x, decision.keep, otherwise=self.otherwise, execution=self.execution, strategy=self.strategy
        )
