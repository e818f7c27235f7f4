"""One training step: a pure function of the state and a batch. Axes: B batch, A parts of an accumulated batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from dynjax.config import Config
from dynjax.core import views
from dynjax.tasks import Batch, Player
from dynjax.tasks.task import Learns

Metrics: TypeAlias = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training; with the position in the data it is what a checkpoint holds."""

    step: jax.Array
    params: nnx.State
    rest: nnx.State
    """Everything of the model that is no parameter: batch statistics, thresholds, the gates' random streams."""
    optimizer: dict[str, optax.OptState]
    """By player."""
    ema: nnx.State | None
    key: jax.Array


Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def schedule(config: Config) -> Callable[[jax.Array], jax.Array]:
    """Learning rate by step: a linear rise over the share `warmup` of the steps, then a cosine to 0, if it falls."""
    rise = round(config.optimizer.warmup * config.steps)

    def rate(step: jax.Array) -> jax.Array:
        fall = (step - rise) / max(config.steps - rise, 1)
        after = 0.5 * (1 + jnp.cos(jnp.pi * fall)) if config.optimizer.falls else 1.0
        share = jnp.where(step < rise, (step + 1) / max(rise, 1), after)
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
        optax.scale_by_adam(b1=o.momentum, b2=o.decay),
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


def make_step(model: nnx.Module, task: Learns, config: Config, gates: nnx.filterlib.Filter) -> tuple[TrainState, Step]:
    """The state that training starts from, and the pure step (state, batch) -> (state, metrics).

    The task's players play one after the other; where there are several, their metrics are called player/metric, 0 at
    steps in which they rest, and `loss` is the sum of their losses.
    With accumulation, gradients and metrics are the plain mean over the parts (each normalised within itself),
    and batch statistics move once per part.

    Raises:
        ValueError: for players that do not differ in their names, or of which none plays at every step.
    """
    players = task.players
    if len({player.name for player in players}) < len(players) or min((p.every for p in players), default=0) != 1:
        told = ", ".join(f"{player.name} every {player.every}" for player in players) or "none"
        raise ValueError(f"players must have names of their own, and one of them plays at every step: {told}")
    graphdef, params, *others = nnx.split(model, nnx.Param, ...)
    (rest,) = others
    plays, optimizers = {}, {}
    for player in players:
        own, _ = nnx.split_state(params, player.parameters, ...)
        mine = dataclasses.replace(
            config, optimizer=player.optimizer or config.optimizer, steps=-(-config.steps // player.every)
        )
        optimizer = make_optimizer(mine, own, gates)
        plays[player.name] = _play(graphdef, player, optimizer, config, mine)
        optimizers[player.name] = optimizer.init(own)
    average = config.optimizer.ema
    state = TrainState(jnp.int32(0), params, rest, optimizers, params if average else None, jax.random.key(config.seed))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        params, rest, optimizers, found = state.params, state.rest, dict(state.optimizer), {}
        teacher = params if state.ema is None else state.ema
        for number, (name, play) in enumerate(plays.items()):
            its_key = key if len(plays) == 1 else jax.random.fold_in(key, number)
            before = params, rest, optimizers[name]
            (params, rest, optimizers[name]), found[name] = play(before, teacher, batch, its_key, state.step)
        if len(players) == 1:
            (metrics,) = found.values()
        else:
            metrics = {f"{name}/{metric}": value for name, each in found.items() for metric, value in each.items()}
            metrics["loss"] = sum(each["loss"] for each in found.values())
        ema = state.ema
        if ema is not None:
            # The decay rises, as in TensorFlow's moving averages: a short run would still average its start.
            decay = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        return TrainState(state.step + 1, params, rest, optimizers, ema, state.key), metrics

    return state, step


def _play(
    graphdef: nnx.GraphDef, player: Player, optimizer: optax.GradientTransformation, config: Config, mine: Config
) -> Callable:
    """What a player does in a step: ((params, rest, optimizer state), the teacher's params, batch, key, step) to the
    first afterwards, and metrics."""
    half, count = config.precision == "bfloat16", config.optimizer.accumulate

    def loss_fn(own: nnx.State, others: nnx.State, rest: nnx.State, part: Batch, key: Array, progress: Array) -> tuple:
        if half:
            own, others, part = _to_bfloat16(own), _to_bfloat16(others), _to_bfloat16(part)
        model = views.training(nnx.merge(graphdef, own, others, rest, copy=True))
        loss, metrics = player.loss(model, part, key, progress)
        return loss.astype(jnp.float32), (nnx.state(model, nnx.Not(nnx.Param)), {**metrics, "loss": loss})

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def taught(teacher: nnx.State, rest: nnx.State, part: Batch) -> Batch:
        if player.teach is None:
            return part
        params, seen = (_to_bfloat16(teacher), _to_bfloat16(part)) if half else (teacher, part)
        return {**part, **player.teach(views.still(nnx.merge(graphdef, params, rest, copy=True)), seen)}

    def play(before: tuple, teacher: nnx.State, batch: Batch, key: Array, step: Array) -> tuple[tuple, Metrics]:
        params, rest, optimizer_state = before
        own, others = nnx.split_state(params, player.parameters, ...)
        progress = step / config.steps
        if count == 1:
            batch = taught(teacher, rest, batch)
            (_, (rest, metrics)), grads = gradient(own, others, rest, batch, key, progress)
        else:

            def one(carry: tuple, inputs: tuple) -> tuple:
                (rest, total), (part, key) = carry, inputs
                part = taught(teacher, rest, part)
                (_, (rest, metrics)), grads = gradient(own, others, rest, part, key, progress)
                return (rest, jax.tree.map(jnp.add, total, grads)), metrics

            zeros = jax.tree.map(jnp.zeros_like, own)
            inputs = (_parts(batch, count), jax.random.split(key, count))
            (rest, total), metrics = jax.lax.scan(one, (rest, zeros), inputs)
            grads = jax.tree.map(lambda g: g / count, total)
            metrics = jax.tree.map(lambda m: m.mean(0), metrics)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, own)
        params = nnx.merge_state(optax.apply_updates(own, updates), others)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(mine)(step // player.every)}
        return (params, rest, optimizer_state), metrics

    def pause(before: tuple, teacher: nnx.State, batch: Batch, key: Array, step: Array) -> tuple[tuple, Metrics]:
        metrics = jax.eval_shape(play, before, teacher, batch, key, step)[1]
        return before, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)

    if player.every == 1:
        return play
    return lambda before, *rest: jax.lax.cond(rest[-1] % player.every == 0, play, pause, before, *rest)
