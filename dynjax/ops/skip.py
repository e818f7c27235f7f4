"""Blocks that examples skip.

Letters: B examples.
"""

from collections.abc import Callable, Collection
from typing import Any

from flax import nnx

from dynjax.core.arguments import Tree, examples_of
from dynjax.core.decision import EACH
from dynjax.core.gates import SampleGate
from dynjax.core.wrapper import Wrapper


class Skip(Wrapper):
    """Run `block` for the examples that the gate keeps; the others pass unchanged, or through `otherwise`.

    SkipNet (Wang et al. 2018, arXiv:1711.09485, eq. 1) and ConvNet-AIG (Veit & Belongie 2018, arXiv:1711.11503, eq. 3),
    around any module. Deviation: both multiply the residual branch; here the block with its shortcut is skipped whole,
    so it may be any module that keeps its input's shape (or has that of `otherwise`).

    Args:
        block: what to skip, (B, ...) to (B, ...), or trees of these; it may hold dynamic modules.
        gate: gives a decision of shape (B,), for example `SampleGate(channels, rngs=rngs)`.
        otherwise: a cheap module for the examples not kept, (B, ...) alone; always run, so its cost is static.
        batched: places (1 is that after x) and names of what else the block is called with that has the examples as its
            first axis. Left out, every array is one that has as many of them as x.

    Called as the block is; what comes after x goes to the block alone.

    Raises:
        ValueError: if shapes do not agree or, compact, `block` mixes the examples of a batch.
    """

    def __init__(
        self,
        block: Callable,
        gate: Callable,
        *,
        otherwise: Callable | None = None,
        batched: Collection[int | str] | None = None,
    ):
        self.block, self.gate, self.otherwise, self.batched = block, gate, otherwise, batched

    @classmethod
    def around(cls, block: Callable, features: int, rngs: nnx.Rngs) -> "Skip":
        return cls(block, SampleGate(features, rngs=rngs))

    @property
    def nests(self) -> bool:
        return True

    def whole(self) -> Callable:
        return self.block

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        x, (block,), inputs = self.bind([self.block], args, kwargs)
        hint = "use SampleGate, or FixedGate of shape (B,)"
        decision = self.expect(self.gate(x), "example", EACH, (examples_of(x),), hint)
        self.account_blocks(decision, [block], [inputs])
        return self.samples(block, inputs, decision.keep, self.otherwise, decision.probability)
