"""One training step: a pure function of the state and a batch. Axes: B batch, A parts of an accumulated batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dynjax.config import Config
from dynjax.core import views


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training; with the position in the data it is what a checkpoint holds."""

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    """Everything of the model that is no parameter: batch statistics, thresholds, the gates' random streams."""
    optimizer: optax.OptState
    ema: nnx.State | None
    key: jax.Array


def schedule(config: Config) -> Callable[[jax.Array], jax.Array]:
    """Learning rate by step: a linear rise over the share `warmup` of the steps, then a cosine to 0."""
    rise = round(config.optimizer.warmup * config.steps)

    def rate(step: jax.Array) -> jax.Array:
        fall = (step - rise) / max(config.steps - rise, 1)
        share = jnp.where(step < rise, (step + 1) / max(rise, 1), 0.5 * (1 + jnp.cos(jnp.pi * fall)))
        return config.optimizer.learning_rate * share

    return rate


def make_optimizer(config: Config, params: nnx.State, gates: nnx.filterlib.Filter) -> optax.GradientTransformation:
    """AdamW under a clip of the whole gradient. Biases, norms and gates do not decay; gates have their own rate."""
    o = config.optimizer
    is_gate = nnx.filterlib.to_predicate(gates)
    rates = _by_path(lambda path, p: o.gate_learning_rate if is_gate(path, p) else 1.0, params)
    decays = _by_path(lambda path, p: o.weight_decay if _decays(path, p) and not is_gate(path, p) else 0.0, params)
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.scale_by_adam(),
        optax.stateless(lambda updates, params: jax.tree.map(lambda u, p, d: u + d * p, updates, params, decays)),
        optax.stateless(lambda updates, params: jax.tree.map(lambda u, r: u * r, updates, rates)),
        optax.scale_by_learning_rate(schedule(config)),
    )


def _decays(path: tuple, variable: nnx.Variable) -> bool:
    """Whether it is a weight, and not a bias or a norm's scale: these are vectors, and matrices where experts, mixed
    kernels or heads have one each."""
    name = str(path[-1])
    return variable[...].ndim > 1 and not (name in ("bias", "scale") or name.endswith("_bias"))


def _by_path(fn: Callable[[tuple, nnx.Variable], Any], state: nnx.State) -> nnx.State:
    """A state like `state` that holds fn(path, variable) in the place of each array."""
    return nnx.map_state(lambda path, variable: variable.replace(fn(path, variable)), state)


def _to_bfloat16(tree: Any) -> Any:
    """Floats as bfloat16. Bytes and labels stay as they are: a model reads pictures in the type of its parameters."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _parts(batch: Any, count: int) -> Any:
    """(B, ...) to (A, B / A, ...), every part with examples of every device, so that nothing moves between devices."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)


def make_step(graphdef: nnx.GraphDef, task: Any, optimizer: optax.GradientTransformation, config: Config) -> Callable:
    """The pure step (state, batch) -> (state, metrics).

    With accumulation, gradients and metrics are the plain mean over the parts (each normalised within itself),
    and batch statistics move once per part.
    """
    half = config.precision == "bfloat16"

    def loss_fn(params: nnx.State, rest: nnx.State, part: Any, key: jax.Array, progress: jax.Array) -> tuple:
        if half:
            params, part = _to_bfloat16(params), _to_bfloat16(part)
        model = views.training(nnx.merge(graphdef, params, rest, copy=True))
        loss, metrics = task.loss(model, part, key, progress)
        return loss.astype(jnp.float32), (nnx.state(model, nnx.Not(nnx.Param)), {**metrics, "loss": loss})

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        progress = state.step / config.steps
        count = config.optimizer.accumulate
        if count == 1:
            (_, (rest, metrics)), grads = gradient(state.params, state.rest, batch, key, progress)
        else:

            def one(carry: tuple, inputs: tuple) -> tuple:
                rest, total = carry
                (_, (rest, metrics)), grads = gradient(state.params, rest, *inputs, progress)
                return (rest, jax.tree.map(jnp.add, total, grads)), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            inputs = (_parts(batch, count), jax.random.split(key, count))
            (rest, total), metrics = jax.lax.scan(one, (state.rest, zeros), inputs)
            grads = jax.tree.map(lambda g: g / count, total)
            metrics = jax.tree.map(lambda m: m.mean(0), metrics)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # The decay rises, as in TensorFlow's moving averages: a short run would still average its start.
            decay = jnp.minimum(config.optimizer.ema, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(config)(state.step)}
        return TrainState(state.step + 1, params, rest, optimizer_state, ema, state.key), metrics

    return step
