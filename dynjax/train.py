"""One training loop for every task.

`fit` takes any nnx model, task and iterable of batches; `train` builds these for a row.

A task has `loss(model, batch, key, progress) -> (scalar, metrics)`, called with the model in its training view, a batch
(dict of arrays whose first axis is the batch), a random key of this step and the share of the training that is over.
Evaluated, `prepare(model, batch)` adds to a batch what is derived from it, `infer(model, batch)` is what a user gets
and the only thing whose MACs count, and `counts(model, output, batch)` is summed over batches for `scores`.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynjax import budget, checkpoint, models
from dynjax import mesh as meshes
from dynjax.config import Config, UserError
from dynjax.log import Log
from dynjax.step import TrainState, make_optimizer, make_step


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did, with everything saved. Commands exit with status 130."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    model: nnx.Module
    """The averaged parameters in a model of their own, in its evaluation view."""
    scores: dict[str, Any]
    """Of the last evaluation; empty without one."""
    step: int


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
        ("loss.load_balance", config.loss.load_balance, config.loss.load_balance >= 0, "0 or more"),
        ("loss.router_z", config.loss.router_z, config.loss.router_z >= 0, "0 or more"),
        ("loss.ponder", config.loss.ponder, config.loss.ponder >= 0, "0 or more"),
        ("loss.reinforce", config.loss.reinforce, config.loss.reinforce >= 0, "0 or more"),
        ("loss.wrong", config.loss.wrong, config.loss.wrong >= 0, "0 or more"),
        ("loss.label_smoothing", config.loss.label_smoothing, 0 <= config.loss.label_smoothing < 1, "in [0, 1)"),
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
    parts = o.accumulate * devices
    if config.batch_size % parts:
        what = f"{devices} device(s) times --optimizer.accumulate {o.accumulate}"
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of {parts}, which is {what}")


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


def _agree_to_stop(asked: bool, step: int, every: int = 10) -> bool:
    """Whether to stop before `step`. Several processes stop together and ask each other only now and then: it waits."""
    if jax.process_count() == 1:
        return asked
    return step % every == 0 and meshes.any_process(asked)


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

    `loader`: an iterable of dicts of NumPy arrays, this process' share of the batch; where its iterator has get_state
    and set_state (grain), a run resumes at the exact batch through them, otherwise by reading past those it has had.
    `evaluate(model) -> scores` is called with the averaged parameters. `gates` is the nnx filter of the parameters that
    learn as gates. With a `workdir` the run is logged, saved and resumed there.
    Raises UserError (bad configuration, workdir of another run, full disk, a loss or gradient that is not finite) and
    Interrupted.
    """
    check(config)
    if workdir is not None:
        checkpoint.check_workdir(workdir, config)
        checkpoint.write_config(workdir, config, classes)
    mesh = meshes.make_mesh()
    everywhere = meshes.replicated(mesh)
    with jax.set_mesh(mesh), _stop_signals() as stop:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = make_optimizer(config, params, gates)
        ema = params if config.optimizer.ema else None
        state = TrainState(jnp.int32(0), params, rest, optimizer.init(params), ema, jax.random.key(config.seed))
        state, batches, start = meshes.replicate(mesh, state), iter(loader), 0
        if workdir is not None:
            if newest := checkpoint.read_newest(workdir, everywhere, _say):
                start, arrays, position = newest
                state = checkpoint.fill(state, arrays)
                _go_to(batches, position)
                _say(f"{workdir}: going on from step {start} of {config.steps}")
            checkpoint.tidy(workdir, start)
        step_fn = jax.jit(make_step(graphdef, task, optimizer, config), donate_argnums=0, out_shardings=everywhere)

        def averaged() -> nnx.Module:
            params = state.params if state.ema is None else state.ema
            return checkpoint.evaluation_view(nnx.merge(graphdef, params, state.rest, copy=True))

        log = Log(workdir, start=start, steps=config.steps, images_per_step=config.batch_size, quiet=quiet)
        with contextlib.closing(log):
            scores, pending = {}, None
            # The order is an invariant: evaluate, checkpoint, fetch, step, log the step before.
            for step in range(start, config.steps + 1):
                last, stopping = step == config.steps, _agree_to_stop(stop.is_set(), step)
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
                if (batch := next(batches, None)) is None:
                    raise UserError(f"the data ended after {step} of {config.steps} batches: the loader must repeat")
                batch = meshes.share(mesh, batch)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                _report(log, pending, workdir)
                pending = (step + 1, metrics)
            _report(log, pending, workdir)
        if not last:
            how = "the same command goes on from there" if workdir else "nothing was saved: there is no workdir"
            raise Interrupted(f"{workdir or 'training'}: stopped after step {step} of {config.steps}; {how}")
        return Fitted(averaged(), scores, step)


def _say(text: str) -> None:
    if jax.process_index() == 0:
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
            what = f"{name} is {metrics[name]} at step {step}: training stopped, {last}"
            raise UserError(f"{what}; a lower --optimizer.learning-rate may help")
    log.train(step, metrics)


# A row


def _twin(config: Config, classes: int) -> nnx.State:
    """Averaged parameters and batch statistics of the static twin in `config.init_from`."""
    other, model, _ = checkpoint.load(config.init_from)
    _, names = checkpoint.read_config(config.init_from)
    if other.model.dynamics != "static":
        what = f"row {other.row} is {other.model.dynamics}"
        raise UserError(f"--init-from {config.init_from}: {what}, it must be a static twin")
    if different := models.difference(other.model, config.model):
        raise UserError(f"--init-from {config.init_from}: {different}")
    if len(names) != classes:
        raise UserError(f"--init-from {config.init_from}: trained for {len(names)} classes, this data has {classes}")
    return nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))


def validator(task: Any, source: Any, config: Config) -> Callable[[nnx.Module], dict]:
    """`evaluate` for `fit`: scores of `task` on all of `source`, with the gates' thresholds of the target budget."""
    import dynjax as dj
    from dynjax.data import make_loader

    mesh = meshes.make_mesh()

    def sums(graphdef: nnx.GraphDef, state: nnx.State, batch: dict) -> dict:
        model = nnx.merge(graphdef, state)
        batch = task.prepare(model, batch)
        output, trace = dj.traced(lambda model, batch: task.infer(model, batch))(model, batch)
        share = jnp.where(batch["valid"], trace.macs() / trace.full_macs, 0.0)
        return {
            # Blank examples, which fill the last batch up, have nothing to be predicted: -1 throughout.
            "counts": task.counts(model, output, batch),
            "macs_fraction": share.sum(),
            "examples": batch["valid"].sum(),
        }

    sums = jax.jit(sums, static_argnums=0, out_shardings=meshes.replicated(mesh))

    def evaluate(model: nnx.Module) -> dict:
        if task.budget is not None and task.budget.sampled:
            budget.set_threshold(model, budget.sampled_threshold(task.budget.target))
        graphdef, state = nnx.split(model)
        state = meshes.replicate(mesh, state)
        total: dict[str, Any] = {}
        once = {"augment": None, "shuffle": False, "repeat": False}
        for batch in make_loader(source, config.batch_size, seed=0, **once, **meshes.processes()):
            found = jax.device_get(sums(graphdef, state, meshes.share(mesh, batch)))
            total = {name: total.get(name, 0) + np.asarray(value, np.float64) for name, value in found.items()}
        return task.scores(total["counts"]) | {"macs_fraction": float(total["macs_fraction"] / total["examples"])}

    return evaluate


def train(config: Config, workdir: str | Path, *, quiet: bool = False) -> dict:
    """Train the row's model in `workdir`, or go on where it stopped; returns the final scores on val."""
    from dynjax.data import make_loader, make_source
    from dynjax.tasks import make_task, refuse_unused

    check(config)
    refuse_unused(config)
    checkpoint.check_workdir(workdir, config)
    if config.model.family == "codes" and not config.init_from:
        raise UserError(f"row {config.row} needs --init-from, the workdir of a trained VQ-VAE (rows *_vqvae)")
    from_twin = config.init_from and not checkpoint.any_finished(workdir)
    if from_twin:
        checkpoint.read_config(config.init_from)  # before minutes of reading data
    source, val = make_source(config.data, "train"), make_source(config.data, "val")
    for part in (source, val):
        _say(part.describe()) if not quiet else None
    classes = tuple(source.classes)
    task = make_task(config, source)
    twin = _twin(config, len(classes)) if from_twin else None
    model = checkpoint.build(config, len(classes), twin)
    augment = config.data.augment
    loader = make_loader(source, config.batch_size, seed=config.seed, augment=augment, **meshes.processes())
    return fit(model, task, loader, config, workdir, validator(task, val, config), classes=classes, quiet=quiet).scores
