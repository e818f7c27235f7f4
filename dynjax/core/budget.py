"""Budgets steer: losses on the MACs spent while training, and one threshold for all gates once trained.

A budget is a share of the model's `full_macs`, in (0, 1].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core.decision import Decision
from dynjax.core.gates import HIGHEST, LOWEST, GateParam, Threshold
from dynjax.core.trace import Trace

gate_filter = nnx.OfType(GateParam)
"""Selects the parameters of gates: `nnx.split(model, gate_filter, ...)`."""


def check(budget: float | int, name: str = "budget") -> float | int:
    """`budget` if it is a share in (0, 1], else ValueError."""
    if not 0 < budget <= 1:
        raise ValueError(f"{name}={budget} must be in (0, 1]: it is the share of the full MACs that may be spent")
    return budget


def budget_loss(
    trace: Trace, target: Float[Array, ""] | float | int, released: Float[Array, ""] | float | int = 1.0
) -> Float[Array, ""]:
    """How far the MACs spent are from `target`, and each gate's share from bounds that open with `released`, squared.

    After DynConv (Verelst & Tuytelaars 2020, section 3.3): (spent / full - target)^2 plus the mean over gates of the
    squared violation of [lower, upper]. With `released` = 0 the bounds close on the target, with 1 they allow
    everything, so that no gate dies or saturates before its layer is trained. Deviation: the target for the gates is
    what is left of it after the static part, which no gate can save.
    """
    if isinstance(target, int | float):
        check(target, "target")
    network = (trace.fraction().mean() - target) ** 2
    decisions = _that_cost(trace)
    if not decisions:
        return network
    own = (target * trace.full_macs - trace.static_macs) / (trace.full_macs - trace.static_macs)
    own = jnp.clip(own, 0.0, 1.0)
    lower, upper = (1 - released) * own, own + released * (1 - own)
    shares = jnp.stack([d.macs().mean() / d.full_macs for d in decisions])
    violation = jax.nn.relu(lower - shares) ** 2 + jax.nn.relu(shares - upper) ** 2
    return network + violation.mean()


def _that_cost(trace: Trace) -> list[Decision]:
    """The decisions that spend something: a pooling layer under a gate, or a mixture of kernels, has no share."""
    return [d for d in trace.decisions.values() if d.full_macs]


def release(progress: Float[Array, ""] | float | int, until: float = 1 / 3) -> Float[Array, ""]:
    """How far the bounds are open at `progress` of the training, both in [0, 1].

    0 at its start and 1 from `until` on, with a squared cosine between.
    """
    return 1 - jnp.cos(jnp.pi / 2 * jnp.clip(jnp.asarray(progress) / until, 0.0, 1.0)) ** 2


def load_balance(trace: Trace) -> Float[Array, ""]:
    """Mean over decisions among K kinds, not all at once, of K * sum_k f_k p_k, which is 1 when all are used alike.

    Fedus et al. 2022 (arXiv:2101.03961, eq. 4). f_k is kind k's share of all that was taken, p_k its mean
    probability; 0 where there are no such decisions.
    """
    losses = []
    for d in trace.decisions.values():
        if d.rule.most is not None:
            taken = jax.lax.stop_gradient(d.keep).reshape(-1, d.keep.shape[-1]).mean(0)
            taken = taken / jnp.where(taken.sum() > 0, taken.sum(), 1)
            probable = d.probability.reshape(-1, d.probability.shape[-1]).mean(0)
            losses.append(d.keep.shape[-1] * (taken * probable).sum())
    return jnp.stack(losses).mean() if losses else jnp.zeros(())


def statistics(trace: Trace) -> dict[str, Float[Array, ""]]:
    """What to watch while gates train: scalars by name.

    `macs_fraction` is the share of the MACs really spent, `gate_entropy` is in bits (0: the gates no longer explore),
    `dead` and `always` are the shares of gates that keep fewer than 1% and more than 99% of their units in this batch.
    """
    result = {"macs_fraction": trace.fraction().mean()}
    decisions = _that_cost(trace)
    if not decisions:
        return result
    entropies, kept = [], jnp.stack([d.kept() for d in decisions])
    for d in decisions:
        p = jnp.clip(d.probability, 1e-7, 1 - 1e-7)
        binary = -(p * jnp.log2(p) + (1 - p) * jnp.log2(1 - p))
        entropies.append(binary.mean() if d.rule.most is None else (-p * jnp.log2(p)).sum(-1).mean())
    return result | {
        "gate_entropy": jnp.stack(entropies).mean(),
        "dead": (kept < 0.01).mean(),
        "always": (kept > 0.99).mean(),
    }


# Thresholds: one number moves every gate of a model


def set_threshold(model: nnx.Module, value: Float[Array, ""] | float | int) -> None:
    """Set the threshold of all gates, a logit: higher keeps less. `value` may be traced."""
    for _, threshold in nnx.iter_graph(model):
        if isinstance(threshold, Threshold):
            threshold.set_value(jnp.asarray(value, jnp.float32))


def sampled_threshold(target: Float[Array, ""] | float | int) -> Float[Array, ""]:
    """The threshold under which gates that know nothing keep a share `target`: its logit, negated.

    Training under a target drawn anew at every step, with the threshold moved to match, leaves gates whose logits order
    the units for every budget at once.
    """
    target = jnp.clip(jnp.asarray(target, jnp.float32), 0.02, 0.98)
    return jnp.log1p(-target) - jnp.log(target)


def solve_threshold(
    spent: Callable[[float], float], budget: float | int, *, tolerance: float = 0.005, trials: int = 20
) -> float:
    """The lowest threshold found under which `spent(threshold)`, the mean share of the full MACs, is at most `budget`.

    Bisection, in steps that are finest around 0: spending falls as the threshold rises, up to what earlier decisions
    change for later ones. Stops when spending is within `tolerance` below the budget. Where even the highest threshold
    spends more, that one is returned: see the report of `deploy`.
    """
    check(budget)
    if spent(LOWEST) <= budget:
        return LOWEST
    if spent(HIGHEST) > budget:
        return HIGHEST
    low, high, found = math.asinh(LOWEST), math.asinh(HIGHEST), HIGHEST
    for _ in range(trials):
        middle = (low + high) / 2
        share = spent(math.sinh(middle))
        low, high, found = (middle, high, found) if share > budget else (low, middle, math.sinh(middle))
        if budget - tolerance <= share <= budget:
            break
    return found
