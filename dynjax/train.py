"""One training loop for every task.

`fit` takes any nnx model, task and iterable of batches; `train` builds these for a segmentation row. Axes: B batch, A parts of an accumulated batch.

A task has `loss(model, batch, key, progress) -> (scalar, metrics)`, called with the model in its training view, a batch (dict of
arrays with leading axis B), a random key of this step and the share of the training that is over.
"""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dynjax import budget, checkpoint
from dynjax import mesh as meshes
from dynjax.config import Config, UserError
from dynjax.log import Log


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did, with everything saved. Commands exit with status 130."""


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


@dataclasses.dataclass(frozen=True)
class Fitted:
    model: nnx.Module
    """The averaged parameters in a model of their own, in its evaluation view."""
    scores: dict[str, Any]
    """Of the last evaluation; empty without one."""
    step: int


def training_view(model: nnx.Module) -> nnx.Module:
    return nnx.view(model, deterministic=False, use_running_average=False, execution="masked", raise_if_not_found=False)


def check(config: Config) -> None:
    """Raises UserError naming the first field whose value makes no sense."""
    o, devices = config.optimizer, jax.device_count()
    rules = (
        ("steps", config.steps, config.steps >= 1, "at least 1"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "at least 1"),
        ("seed", config.seed, config.seed >= 0, "0 or more"),
        ("checkpoint_every", config.checkpoint_every, config.checkpoint_every >= 1, "at least 1"),
        ("evaluate_every", config.evaluate_every, config.evaluate_every >= 0, "0 (only at the end) or more"),
        ("budget.target", config.budget.target, 0 < config.budget.target <= 1, "a share of the MACs in (0, 1]"),
        ("budget.weight", config.budget.weight, config.budget.weight >= 0, "0 or more"),
        ("loss.cross_entropy", config.loss.cross_entropy, config.loss.cross_entropy >= 0, "0 or more"),
        ("loss.dice", config.loss.dice, config.loss.dice >= 0, "0 or more"),
        ("optimizer.learning_rate", o.learning_rate, 0 < o.learning_rate < math.inf, "more than 0"),
        ("optimizer.gate_learning_rate", o.gate_learning_rate, 0 <= o.gate_learning_rate < math.inf, "0 or more"),
        ("optimizer.warmup", o.warmup, 0 <= o.warmup <= 1, "a share of the steps in [0, 1]"),
        ("optimizer.weight_decay", o.weight_decay, 0 <= o.weight_decay < math.inf, "0 or more"),
        ("optimizer.clip", o.clip, o.clip > 0, "more than 0 (inf turns it off)"),
        ("optimizer.ema", o.ema, 0 <= o.ema < 1, "in [0, 1)"),
        ("optimizer.accumulate", o.accumulate, o.accumulate >= 1, "at least 1"),
    )
    for name, value, good, wanted in rules:
        if not good:  # also for nan
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {wanted}")
    if config.batch_size % (o.accumulate * devices):
        what = f"{devices} devices" + (f" times --optimizer.accumulate {o.accumulate}" if o.accumulate > 1 else "")
        raise UserError(
            f"--batch-size {config.batch_size} does not divide into {what}: make it a multiple of {o.accumulate * devices}"
        )


# The step


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
    rates = nnx.map_state(lambda path, p: p.replace(o.gate_learning_rate if is_gate(path, p) else 1.0), params)
    decays = nnx.map_state(
        lambda path, p: p.replace(o.weight_decay * (p[...].ndim > 1 and not is_gate(path, p))), params
    )
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.scale_by_adam(),
        optax.stateless(lambda updates, params: jax.tree.map(lambda u, p, d: u + d * p, updates, params, decays)),
        optax.stateless(lambda updates, params: jax.tree.map(lambda u, r: u * r, updates, rates)),
        optax.scale_by_learning_rate(schedule(config)),
    )


def _to_bfloat16(tree: Any) -> Any:
    """Floats and uint8 pictures (0 to 255 are exact) as bfloat16; labels stay as they are."""
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.uint8 else x, tree
    )


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
        model = training_view(nnx.merge(graphdef, params, rest, copy=True))
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
            # Short runs: a long average would still hold the initial values (the decay rises as in TensorFlow's moving averages).
            decay = jnp.minimum(config.optimizer.ema, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        metrics |= {"grad_norm": optax.global_norm(grads), "learning_rate": schedule(config)(state.step)}
        return TrainState(state.step + 1, params, rest, optimizer_state, ema, state.key), metrics

    return step


# The loop


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one acts as usual, at once. Outside the main thread: never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        event.set()
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        restore()


def _position(batches: Iterator, step: int) -> Any:
    return batches.get_state() if hasattr(batches, "get_state") else step


def _go_to(batches: Iterator, position: Any) -> None:
    if hasattr(batches, "set_state"):
        batches.set_state(position)
    else:
        for _ in range(position):
            next(batches)


def fit(
    model: nnx.Module,
    task: Any,
    loader: Iterable,
    config: Config,
    workdir: str | Path | None = None,
    evaluate: Callable[[nnx.Module], dict] | None = None,
    *,
    gates: nnx.filterlib.Filter = budget.gate_filter,
    classes: tuple[str, ...] = (),
    quiet: bool = False,
) -> Fitted:
    """Train `model` (left as it is) on the batches of `loader` for `config.steps` steps in all, on all devices.

    `loader`: an iterable of dicts of NumPy arrays, this process' share of the batch; where its iterator has get_state and set_state
    (grain), a run resumes at the exact batch through them, otherwise by reading past the batches it has had.
    `evaluate(model) -> scores` is called with the averaged parameters. With a `workdir` the run is logged, saved and resumed there.
    Raises UserError (bad configuration, other run's workdir, full disk, a loss or gradient that is not finite), Interrupted.
    """
    check(config)
    if workdir is not None:
        checkpoint.check_workdir(workdir, config)
        checkpoint.write_config(workdir, config, classes)
    mesh = meshes.make_mesh()
    with jax.set_mesh(mesh), _stop_signals() as stop:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = make_optimizer(config, params, gates)
        ema = params if config.optimizer.ema else None
        state = TrainState(jnp.int32(0), params, rest, optimizer.init(params), ema, jax.random.key(config.seed))
        state, batches, start = meshes.replicate(mesh, state), iter(loader), 0
        say = _say
        if workdir is not None and (newest := checkpoint.read_newest(workdir, meshes.replicated(mesh), say)):
            start, arrays, position = newest
            state = checkpoint.fill(state, arrays)
            _go_to(batches, position)
            say(f"{workdir}: going on from step {start} of {config.steps}")
        if workdir is not None:
            checkpoint.tidy(workdir, start)
        step_fn = jax.jit(
            make_step(graphdef, task, optimizer, config), donate_argnums=0, out_shardings=meshes.replicated(mesh)
        )

        def averaged() -> nnx.Module:
            params = state.params if state.ema is None else state.ema
            return checkpoint.evaluation_view(nnx.merge(graphdef, params, state.rest, copy=True))

        log = Log(workdir, start=start, steps=config.steps, images_per_step=config.batch_size, quiet=quiet)
        with contextlib.closing(log):
            scores, pending = {}, None
            # The order is an invariant: evaluate, checkpoint, fetch, step, log the step before.
            for step in range(start, config.steps + 1):
                last, stopping = step == config.steps, meshes.any_process(stop.is_set())
                due = step > start and config.evaluate_every and step % config.evaluate_every == 0
                if evaluate is not None and (last or due) and not (stopping and not last):
                    pending = _report(log, pending, workdir)
                    scores = evaluate(averaged())
                    log.evaluation(step, scores)
                if workdir is not None and step > start and (last or stopping or step % config.checkpoint_every == 0):
                    pending = _report(log, pending, workdir)  # what is saved is known to be finite
                    checkpoint.save(workdir, step, state, _position(batches, step))
                    log.pause()
                if last or stopping:
                    break
                try:
                    batch = meshes.share(mesh, next(batches))
                except StopIteration:
                    raise UserError(
                        f"the loader ended after {step} batches, --steps is {config.steps}: it must repeat"
                    ) from None
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                _report(log, pending, workdir)
                pending = (step + 1, metrics)
            _report(log, pending, workdir)
        if not last:
            where = (
                "nothing was saved (no workdir)"
                if workdir is None
                else f"{workdir} is saved: the same command goes on from there"
            )
            raise Interrupted(f"stopped after step {step} of {config.steps}; {where}")
        return Fitted(averaged(), scores, step)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        import sys

        print(text, file=sys.stderr)


def _report(log: Log, pending: tuple[int, dict] | None, workdir: str | Path | None) -> None:
    """Fetch and log the metrics of one step. Raises UserError when its loss or gradient is not finite."""
    if pending is None:
        return
    step, metrics = pending
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            kept = checkpoint.steps(workdir) if workdir is not None else []
            last = f"the last good checkpoint is step {kept[-1]} of {workdir}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"{name} is {metrics[name]} at step {step}: training stopped, {last}; a lower --optimizer.learning-rate may help"
            )
    log.train(step, metrics)


# A segmentation row


def _twin(config: Config, classes: int) -> nnx.State:
    """Averaged parameters and batch statistics of the static twin in `config.init_from`."""
    other, model, _ = checkpoint.load(config.init_from)
    _, names = checkpoint.read_config(config.init_from)
    if other.model.dynamics != "static":
        raise UserError(
            f"--init-from {config.init_from}: row {other.row} is {other.model.dynamics}, it must be a static twin"
        )
    for name in ("widths", "blocks", "stem_stride"):
        theirs, ours = getattr(other.model, name), getattr(config.model, name)
        if theirs != ours:
            raise UserError(f"--init-from {config.init_from}: model.{name} is {theirs} there and {ours} here")
    if len(names) != classes:
        raise UserError(f"--init-from {config.init_from}: trained for {len(names)} classes, this data has {classes}")
    return nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))


def validator(task: Any, source: Any, config: Config) -> Callable[[nnx.Module], dict]:
    """`evaluate` for `fit`: scores of `task` on all of `source`, at the thresholds that training used for the target budget."""
    import dynjax as dj
    from dynjax.data import make_loader

    mesh = meshes.make_mesh()

    def sums(graphdef: nnx.GraphDef, state: nnx.State, batch: dict) -> dict:
        logits, trace = dj.traced(nnx.merge(graphdef, state))(batch["image"])
        mask = jnp.where(batch["valid"][:, None, None], batch["mask"], -1)
        share = jnp.where(batch["valid"], trace.macs() / trace.full_macs, 0.0)
        return {
            "confusion": task.confusion(logits, mask),
            "macs_fraction": share.sum(),
            "examples": batch["valid"].sum(),
        }

    sums = jax.jit(sums, static_argnums=0, out_shardings=meshes.replicated(mesh))

    def evaluate(model: nnx.Module) -> dict:
        if task.budget is not None:
            budget.set_threshold(model, budget.sampled_threshold(task.budget.target))
        graphdef, state = nnx.split(model)
        state = meshes.replicate(mesh, state)
        total: dict[str, Any] = {}
        once = {"augment": None, "shuffle": False, "repeat": False}
        for batch in make_loader(source, config.batch_size, seed=0, **once, **meshes.processes()):
            found = jax.device_get(sums(graphdef, state, meshes.share(mesh, batch)))
            total = {name: total.get(name, 0) + np.asarray(value, np.float64) for name, value in found.items()}
        return task.scores(total["confusion"]) | {"macs_fraction": float(total["macs_fraction"] / total["examples"])}

    return evaluate


def train(config: Config, workdir: str | Path, *, quiet: bool = False) -> dict:
    """Train the row's segmentation model in `workdir`, or go on where it stopped; returns the final scores on val."""
    from dynjax.data import make_loader, make_source
    from dynjax.tasks import segmentation

    check(config)
    checkpoint.check_workdir(workdir, config)
    source, val = make_source(config.data, "train"), make_source(config.data, "val")
    for part in (source, val):
        _say(part.describe()) if not quiet else None
    classes = tuple(source.classes)
    weights = None
    if config.loss.class_weights != "none":
        weights = segmentation.class_weights(config.loss.class_weights, segmentation.class_frequencies(source))
    spends = None if config.model.dynamics == "static" else config.budget
    task = segmentation.SegmentationTask(len(classes), classes, config.loss, weights, spends)
    fresh = not checkpoint.steps(workdir)
    twin = _twin(config, len(classes)) if config.init_from and fresh else None
    model = checkpoint.build(config, len(classes), twin)
    augment = config.data.augment
    loader = make_loader(source, config.batch_size, seed=config.seed, augment=augment, **meshes.processes())
    return fit(model, task, loader, config, workdir, validator(task, val, config), classes=classes, quiet=quiet).scores
