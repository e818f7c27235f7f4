"""Blocks that examples skip.

Letters: B examples.
"""

from collections.abc import Callable

from jaxtyping import Array, Float

from dynjax.core.decision import EACH
from dynjax.core.wrapper import Wrapper


class Skip(Wrapper):
    """Run `block` for the examples that the gate keeps; the others pass unchanged, or through `otherwise`.

    SkipNet (Wang et al. 2018, arXiv:1711.09485, eq. 1) and ConvNet-AIG (Veit & Belongie 2018, arXiv:1711.11503, eq. 3),
    around any module. Deviation: both multiply the residual branch; here the block with its shortcut is skipped whole,
    so it may be any module that keeps its input's shape (or has that of `otherwise`).

    Args:
        block: what to skip, (B, ...) to (B, ...); it may hold dynamic modules.
        gate: gives a decision of shape (B,), for example `SampleGate(channels, rngs=rngs)`.
        otherwise: a cheap module for the examples not kept; always run, so its cost is static.

    Raises:
        ValueError: if shapes do not agree or, compact, `block` mixes the examples of a batch.
    """

    def __init__(self, block: Callable, gate: Callable, *, otherwise: Callable | None = None):
        self.block, self.gate, self.otherwise = block, gate, otherwise

    def __call__(self, x: Float[Array, "B ..."]) -> Array:
        hint = "use SampleGate, or FixedGate of shape (B,)"
        decision = self.expect(self.gate(x), "example", EACH, (x.shape[0],), hint)
        self.account_blocks(decision, [self.block], [x])
        return self.samples(self.block, x, decision.keep, self.otherwise, decision.probability)
