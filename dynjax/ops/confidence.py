"""How sure a prediction is, for what stops where it is: exits, and the levels of a decoder.

Letters: B examples, H W pixels, h w tiles, K classes.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynjax.core.gates import content_chance, log_entropy, logistic, max_tiles, one_hot_argmax, pool_tiles

Confidence = Literal["max_prob", "entropy", "random"]
"""The largest class probability; one minus the entropy over its maximum; or, the control at the same cost, uniform over
(0, 1), a function of the logits."""


def doubt(
    logits: Float[Array, "B *pixels K"], kind: Confidence, at: float, size: int | None = None
) -> Float[Array, " B *tiles"]:
    """The logit of one minus the mean confidence of each example, or of each tile of `size` pixels, above that logit at
    the confidence `at`."""
    logits = logits.astype(jnp.float32)
    start = jax.scipy.special.logit(1 - at)
    if kind == "random":
        return logistic(1 - content_chance(_mean(jax.lax.stop_gradient(logits).mean(-1), size))) - start
    unsure, sure = (_log_mean(each, size) for each in logarithms(logits, kind))
    return unsure - sure - start


def logarithms(logits: Float[Array, "... K"], kind: Confidence) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Logarithms of one minus a head's confidence and of the confidence, at least -500 each.

    From logits, since float32 has no number between 1 - 6e-8 and 1: heads that have learnt their data by heart would
    all be as sure.
    """
    if kind == "entropy":
        unsure = log_entropy(logits) - jnp.log(jnp.log(logits.shape[-1]))
        near = jnp.minimum(unsure, -jnp.finfo(jnp.float32).epsneg)
        sure = jnp.where(near > -0.7, jnp.log(-jnp.expm1(near)), jnp.log1p(-jnp.exp(near)))
    else:
        largest = logits.max(-1)
        rest = jax.nn.logsumexp(jnp.where(one_hot_argmax(logits) > 0, -jnp.inf, logits), -1)
        unsure, sure = rest - jnp.logaddexp(largest, rest), largest - jnp.logaddexp(largest, rest)
    return jnp.maximum(unsure, -500.0), jnp.maximum(sure, -500.0)


def _mean(x: Float[Array, " B *pixels"], size: int | None) -> Float[Array, " B *tiles"]:
    if size is None:
        return x.mean(tuple(range(1, x.ndim)))
    return pool_tiles(x[..., None], size)[..., 0]


def _log_mean(log_x: Float[Array, " B *pixels"], size: int | None) -> Float[Array, " B *tiles"]:
    """Logarithm of the mean of exp(log_x): of sure pixels it may be less than float32 tells from 0."""
    if size is None:
        most = log_x.max(tuple(range(1, log_x.ndim)), keepdims=True)
        return jnp.log(_mean(jnp.exp(log_x - most), size)) + most.reshape(-1)
    most = max_tiles(log_x[..., None], size)[..., 0]
    fine = most.repeat(size, 1).repeat(size, 2)[:, : log_x.shape[1], : log_x.shape[2]]
    return jnp.log(_mean(jnp.exp(log_x - fine), size)) + most
