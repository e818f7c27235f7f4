"""Accounting: the decisions that a model took in one call, and the MACs that they spent.

Letters: B examples, H W pixels, h w tiles.
"""

import dataclasses
import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float

from dynjax.core import cost, views
from dynjax.core.arguments import is_array
from dynjax.core.decision import INSIDE, Decision, Linear, seen
from dynjax.core.modules import outermost
from dynjax.core.wrapper import Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What one call of a model decided and spent; a pytree, so it passes through `jit` and `grad`.

    `decisions` maps the path of each wrapper to its decision. `static_macs` is what every example costs whatever is
    decided (the gates included), `full_macs` what it costs with everything kept; both in MACs per example.
    """

    decisions: dict[str, Decision]
    static_macs: float = dataclasses.field(metadata=dict(static=True))
    full_macs: float = dataclasses.field(metadata=dict(static=True))
    examples: int = dataclasses.field(metadata=dict(static=True))

    def macs(self) -> Float[Array, " B"]:
        """MACs spent per example, the static part included; straight-through gradient to the gates."""
        start = jnp.full((self.examples,), self.static_macs, jnp.float32)
        return sum((decision.macs() for decision in self.decisions.values()), start)

    def fraction(self) -> Float[Array, " B"]:
        """`macs` as a share of `full_macs`."""
        return self.macs() / self.full_macs

    def heatmap(self, size: tuple[int, int]) -> Float[Array, "B H W"]:
        """Where the MACs went: MACs per pixel of a picture of `size` (H, W), which sum to that example's `macs`.

        A tile's MACs lie on its pixels, those of a tile that overhangs as thin as of any other. What has no place is
        spread evenly: the rest of these, the static part, decisions per example.
        """
        height, width = size
        even = jnp.full((self.examples,), self.static_macs, jnp.float32)
        total = jnp.zeros((self.examples, height, width), jnp.float32)
        for decision in self.decisions.values():
            spent = decision.macs()
            if decision.place != "tile":
                even = even + spent
                continue
            unit = decision.cost.unit if isinstance(decision.cost, Linear) else (1.0,)
            units = (decision.units(decision.keep) * jnp.asarray(unit, jnp.float32)[None, None]).sum(-1)
            units = units.reshape(decision.keep.shape[:3])
            fine, whole = (decision.of_model(each) for each in (_pixels(units, decision.tile, size), units.sum((1, 2))))
            placed = fine * (spent / jnp.where(whole > 0, whole, 1))[:, None, None]
            total, even = total + placed, even + spent - placed.sum((1, 2))
        return total + even[:, None, None] / (height * width)

    def shares(self) -> dict[str, dict[str, Float[Array, ""]]]:
        """Per wrapper `kept`, the share of its units kept, and `macs`, its share of all MACs; means over the batch."""
        total = self.macs().mean()
        return {path: {"kept": d.kept(), "macs": d.macs().mean() / total} for path, d in self.decisions.items()}


def _pixels(units: jax.Array, tile: tuple[float, float] | None, size: tuple[int, int]) -> jax.Array:
    """Values of tiles (B, h, w) shared out evenly to the pixels (B, H, W) whose centres lie in them, and to those that
    they would have where they overhang."""
    tile = tile or (1 / units.shape[1], 1 / units.shape[2])
    rows, columns = (
        np.minimum((np.arange(pixels) + 0.5) / pixels / side, tiles - 1).astype(int)
        for pixels, side, tiles in zip(size, tile, units.shape[1:], strict=True)
    )
    tall, wide = (
        np.maximum(np.bincount(places)[places], pixels * side)
        for places, pixels, side in zip((rows, columns), size, tile, strict=True)
    )
    return units[:, rows[:, None], columns[None]] / jnp.asarray((tall[:, None] * wide)[None], jnp.float32)


def traced(fn: Callable, *, examples: int | None = None) -> Callable:
    """`traced(model)(x)` gives `(model(x), trace)`; also for a method, or a function whose first argument is the model.

    Works under `jit` and `grad`; gates that train change the model, which must then be an argument of `nnx.jit`, or be
    merged inside of `jax.jit`. Decisions inside functions that the model itself transforms (`lax.scan`, `vmap`, ...)
    cannot be seen and are refused; `nnx.remat` and `nnx.jit` of a module that is their argument are seen into.

    Args:
        fn: what to call.
        examples: their number. By default the first axis of the other arguments' arrays, if they agree, else that of
            the decisions. A decision about a multiple of them, as about frames folded into the batch one clip after
            another, counts for its example as a sum.

    Raises:
        ValueError: if there is no model, the number of examples is not clear, or a decision cannot be seen.
    """
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, nnx.Module):
        return functools.partial(traced(fn.__func__, examples=examples), fn.__self__)

    def call(*args, **kwargs):
        is_module = isinstance(fn, nnx.Module)
        if not is_module and not (args and isinstance(args[0], nnx.Module)):
            raise ValueError("traced: give it a model, a method of one, or a function whose first argument is one")
        model: Any
        model, rest = (fn, args) if is_module else (args[0], args[1:])
        try:
            output, decisions = seen(operator.call if is_module else fn, model, *rest, **kwargs)
        except (TypeError, ValueError) as error:
            if "__captures__" in str(error):  # where a transformation of nnx wants what it is given back as it was
                paths = ", ".join(map(repr, outermost(model, Wrapper)))
                raise ValueError(f"traced: a module{' among those at ' * bool(paths)}{paths} {INSIDE}") from error
            raise
        except TraceContextError as error:
            raise TraceContextError(
                "traced: this call changes the model (the noise of gates, BatchNorm statistics), and a function under "
                "jax.jit (or grad, scan) closes over it: pass the model as an argument to nnx.jit, or nnx.merge it "
                "inside, or use nnx.view(model, deterministic=True, use_running_average=True)"
            ) from error
        number = _examples(decisions, rest, kwargs, examples)
        decisions = {path: decision.fold(number) for path, decision in decisions.items()}
        still = views.still(model)
        whole = cost.macs(*((still, *rest) if is_module else (fn, still, *rest)), **kwargs) / number
        static = whole - sum(d.masked_macs for d in decisions.values())
        full = static + sum(d.full_macs - d.excluded for d in decisions.values())
        return output, Trace(decisions, static, full, number)

    return call


def _examples(decisions: dict[str, Decision], args, kwargs, given: int | None) -> int:
    """The number of examples: the first axis of all arrays, or of what is decided about where these do not agree."""
    leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf) and leaf.ndim]
    axes = sorted({leaf.shape[0] for leaf in leaves})
    decided = {path: decision.keep.shape[0] for path, decision in decisions.items()}
    numbers = sorted({*decided.values()})
    if given is not None:
        candidates = [given]
    elif len(axes) == 1:
        # A picture alone has its height as first axis, and the model adds that of the examples.
        candidates = axes + [1] * (numbers == [1])
    else:
        candidates = numbers if len(numbers) == 1 else []
    for candidate in candidates:
        if not any(number % candidate for number in numbers):
            return candidate
    if not decisions:
        what = f"nothing decides, and the arguments have first axes of {', '.join(map(str, axes))}"
        what = what if leaves else "no argument is an array"
        raise ValueError(f"traced: the number of examples is not clear: {what}; say traced(fn, examples=B)")
    raise ValueError(
        f"traced: the number of examples is not clear: decisions are about {', '.join(map(str, numbers))} ({decided}), "
        f"{'examples=' if given is not None else 'and the arguments have first axes of '}"
        f"{given if given is not None else ', '.join(map(str, axes)) or 'nothing'}. What is decided about must be a "
        "multiple of the examples (frames of a clip folded into the batch); say traced(fn, examples=B)"
    )
