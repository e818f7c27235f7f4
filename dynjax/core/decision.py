"""A decision is data: what a gate chose for one input, and what one unit of the choice costs.

Letters: B examples, h w tiles, K kinds of work on one unit (branches, stages, groups, steps, experts).
"""

import contextlib
import contextvars
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

Block = TypeVar("Block")

Granularity = Literal[
    "sample",  # (B,)
    "tile",  # (B, h, w)
    "token",  # (B, T)
    "branch",  # (B, K), one of K
    "branches",  # (B, K), up to a fixed number of the K
    "tile branch",  # (B, h, w, K), one of K
    "token branch",  # (B, T, K), a fixed number of the K
    "exit",  # (B, K), the stages run, from the first to the last
    "tile exit",  # (B, h, w, K)
    "channel",  # (B, K), groups of channels
    "path",  # (B, K), any of the K ways out of a cell
    "kernel",  # (B, K) or (B, h, w, K), how much each of K kernels counts; always all kept, at no cost of their own
]
"""What a decision is about: the place it is made for, and the rule of the choice. A wrapper takes its own alone.

With one kind of work on a unit there is no last axis for it."""

AXES: dict[str, int] = {
    "sample": 1,
    "tile": 3,
    "token": 2,
    "branch": 2,
    "branches": 2,
    "tile branch": 4,
    "token branch": 3,
    "exit": 2,
    "tile exit": 4,
    "channel": 2,
    "path": 2,
}
"""Number of axes of a decision; not of a "kernel", which has 2 or 4."""
ONE_KIND = ("sample", "tile", "token")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decision:
    """What was kept, how probable that was, and what it costs.

    `keep` is exactly 0 or 1; when training its gradient is that of the relaxed choice (straight through).
    `probability` is the relaxed choice in [0, 1], differentiable, without noise. Branches are one-hot over the last
    axis; exits say for each stage, on the last axis, whether it is run. Steps of a recurrence are stages too.

    A gate fills the two arrays and `granularity`; the wrapper that executes the decision adds the costs, in MACs per
    example, one value or one per branch, stage or group: `unit_macs` for one kept unit, the border that a tile's window
    needs included, and `whole_macs` for the whole input, which is the most that an executor spends and what the masked
    execution always computes. `most` is how many of the kinds one unit can take at once (None: of branches one, else
    all). Where there are tiles, `tile` has their sides as shares of the map's height and width.
    """

    # Any: in trees of shapes, or while JAX maps over one, the leaves are no arrays.
    keep: Float[Array, "..."] | Any
    probability: Float[Array, "..."] | Any
    granularity: Granularity = dataclasses.field(metadata=dict(static=True))
    unit_macs: tuple[float, ...] = dataclasses.field(default=(0.0,), metadata=dict(static=True))
    whole_macs: tuple[float, ...] = dataclasses.field(default=(0.0,), metadata=dict(static=True))
    most: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    tile: tuple[float, float] | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def masked_macs(self) -> float:
        """MACs per example that the masked execution computes, whatever is kept."""
        return sum(self.whole_macs)

    @property
    def full_macs(self) -> float:
        """MACs per example with everything kept; of kinds that exclude each other, the dearest."""
        most = self.most or (1 if "branch" in self.granularity else len(self.whole_macs))
        return sum(sorted(self.whole_macs, reverse=True)[:most])

    def macs(self) -> Float[Array, " B"]:
        """MACs spent per example; the gradient reaches the gate through `keep`."""
        return self._macs(self.keep)

    def expected_macs(self) -> Float[Array, " B"]:
        """Expected MACs per example under `probability`; of experts, as many as a token can take."""
        return self._macs(self.probability * self.most if self.most else self.probability)

    def unit_keep(self) -> Float[Array, "B units kinds"]:
        """`keep` with every place of one example on one axis and the branches, stages or groups (or 1) on the last."""
        return self._units(self.keep)

    def _units(self, chosen: jax.Array) -> jax.Array:
        kinds = 1 if self.granularity in ONE_KIND else chosen.shape[-1]
        return chosen.astype(jnp.float32).reshape(chosen.shape[0], -1, kinds)

    def _macs(self, chosen: jax.Array) -> jax.Array:
        spent = self._units(chosen).sum(1) * jnp.asarray([self.unit_macs], jnp.float32)
        # The executor takes the whole input rather than spend more; open gates must still feel a pull, so the cap has
        # no gradient.
        capped = jnp.minimum(spent, jnp.asarray([self.whole_macs], jnp.float32))
        return (spent + jax.lax.stop_gradient(capped - spent)).sum(1)

    def kept(self) -> Float[Array, ""]:
        """Share of the units kept; of branches, the share that did not take the first."""
        keep = self.unit_keep()
        return 1 - keep[..., 0].mean() if "branch" in self.granularity else keep.mean()


class Decisions(nnx.Variable):
    """The nnx collection in which wrappers sow their decisions; `traced` captures it."""


INSIDE = (
    "decides inside a function that JAX transforms (scan, fori_loop, while_loop, vmap, cond, switch, checkpoint, jit, "
    "grad), and its decision does not come out of it, so the trace would call it static: write the loop in Python, or "
    "give the module to nnx.remat or nnx.jit as an argument, which carry decisions out"
)

_made: contextvars.ContextVar[list[tuple[str, Any]] | None] = contextvars.ContextVar("made", default=None)
"""What was recorded while the innermost trace is taken: the module's name, and the decision's likeness."""


@contextlib.contextmanager
def watched() -> Iterator[Callable[[Iterable[Decision]], None]]:
    """Notes what is recorded inside, and gives a function that raises ValueError unless all of it has come out."""
    made: list[tuple[str, Any]] = []

    def check(found: Iterable[Decision]) -> None:
        # nnx.scan and the like merge copies of modules, on which decisions are recorded and lost.
        lost = Counter(likeness for _, likeness in made) - Counter(map(_likeness, found))
        for name, likeness in made:
            if likeness in lost:
                jax.clear_caches()  # a second call must not find the loop compiled, and pass
                raise ValueError(f"{name} {INSIDE}")

    token = _made.set(made)
    try:
        yield check
    finally:
        _made.reset(token)


def record(module: nnx.Module, decision: Decision) -> None:
    """Sow `decision` under `module`'s path; does nothing unless a trace is being taken.

    Raises:
        ValueError: inside a function that JAX transforms, which the decision cannot leave.
    """
    if not hasattr(module, "__captures__"):
        return
    name = type(module).__name__
    try:
        for captured in module.__captures__:
            captured.set_value(captured.get_value())
    except TraceContextError as error:
        raise ValueError(f"{name} {INSIDE}") from error
    made = _made.get()
    if made is not None:
        made.append((name, _likeness(decision)))
    module.sow(Decisions, "decision", decision)


def unseen(block: Block) -> Block:
    """`block` as an executor's loop runs it, or as it is only looked at: no trace is taken inside."""
    if not isinstance(block, nnx.Module) or not hasattr(block, "__captures__"):
        return block
    block = nnx.view(block, raise_if_not_found=False)
    for _, module in nnx.iter_modules(block):
        if hasattr(module, "__captures__"):
            del module.__captures__
    return block


def _likeness(decision: Decision) -> tuple:
    """What tells decisions apart without a look at their values."""
    return decision.granularity, decision.keep.shape, decision.unit_macs, decision.whole_macs
