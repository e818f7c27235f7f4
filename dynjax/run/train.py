"""One training loop for every task.

`fit` takes any nnx model, task and iterable of batches; `train` builds these for a row.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.core import budget, views
from dynjax.data import few
from dynjax.data.source import Source
from dynjax.models.frozen import TRAINED
from dynjax.run import checkpoint, checks, lock, log
from dynjax.run import mesh as meshes
from dynjax.run.build import build, check_memory
from dynjax.run.evaluate import Arrays, Runner, make_runner, score
from dynjax.run.step import TrainState, make_step
from dynjax.run.stop import Stop, Stopped
from dynjax.run.workdir import Run, check_workdir, other_classes, read_config, write_config
from dynjax.tasks.task import Learns, Pictures, Player, Scores, Task, Troubled, Watches

Draw = Callable[[nnx.Module], np.ndarray]
"""Pictures (N, H, W, 3) of a model, uint8."""


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did, with everything saved. Commands exit with status 130."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    model: nnx.Module
    """The averaged parameters in a model of their own, in its evaluation view."""
    scores: Scores
    """Of the last evaluation; empty without one."""
    step: int


def check(config: Config) -> None:
    """Raises UserError naming the first field whose value makes no sense, or where the devices cannot share a batch."""
    checks.check_config(config)
    accumulate, devices = config.optimizer.accumulate, jax.device_count()
    parts = accumulate * devices
    if config.batch_size % parts:
        what = f"{devices} device(s) times --optimizer.accumulate {accumulate}"
        raise UserError(f"--batch-size {config.batch_size} is not a multiple of {parts}, which is {what}")


# The loop


@runtime_checkable
class Resumes(Protocol):
    """An iterator that says where it is, in JSON types, and goes there, as grain's do."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any, /) -> None: ...


def _position(batches: Iterator, step: int) -> dict:
    """Where in the data a run is that has had `step` batches, for how many processes."""
    own = batches.get_state() if isinstance(batches, Resumes) else step
    return {"processes": jax.process_count(), "loader": own}


def _go_to(batches: Iterator, position: Any, step: int) -> None:
    """Set fresh `batches` to where they had given `step`. Raises UserError where that is known to other processes only.

    A state that is a whole number counts batches of all processes, and any number of processes can go on from there;
    any other holds for as many processes as saved it.
    """
    if not isinstance(batches, Resumes):
        for _ in range(step):
            next(batches)
    elif isinstance(batches.get_state(), int):
        batches.set_state(step)
    else:
        then, now = position["processes"], jax.process_count()
        if then != now:
            what = f"step {step} was saved by {then} process(es), this run has {now}"
            raise UserError(f"{what}, and the loader's position holds for {then} only: start as many")
        batches.set_state(position["loader"])


def _resume(
    state: TrainState, batches: Iterator, run: Run, workdir: str | Path, sharding: jax.sharding.Sharding
) -> tuple[TrainState, int, bool]:
    """State, step and whether its evaluation is still to be done (a run asked to stop saves first)."""
    config, start, behind = run.config, 0, False
    if newest := checkpoint.read_newest(workdir, sharding, _say):
        start, arrays, position = newest
        state = checkpoint.fill_model(state, arrays, workdir, start, config.row)
        with meshes.together():
            try:
                _go_to(batches, position, start)
            except Exception as error:  # whatever a loader says to a position that is none of its own
                if isinstance(error, UserError):
                    raise
                what = f"checkpoint {start} of {workdir} holds a position in the data that does not fit"
                raise UserError(f"{what}: {type(error).__name__}: {error}") from error
        behind = bool(start) and not meshes.of_first(log.evaluated(workdir, start))
        _say(f"{workdir}: going on from step {start} of {config.steps}")
    with meshes.together():
        write_config(workdir, config, run.classes, run.examples, run.labelled)
    checkpoint.tidy(workdir, start)
    return state, start, behind


def fit(
    model: nnx.Module,
    task: Learns,
    loader: Iterable,
    config: Config,
    workdir: str | Path | None = None,
    evaluate: Callable[[nnx.Module], Scores] | None = None,
    draw: Draw | None = None,
    *,
    gates: nnx.filterlib.Filter = budget.gate_filter,
    classes: tuple[str, ...] = (),
    examples: int | None = None,
    labelled: tuple[str, ...] = (),
    stop: Stop | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train `model` (left as it is) on the batches of `loader` for `config.steps` steps in all, on all devices.

    `loader`: an iterable of dicts of NumPy arrays, this process' share of the batch; where its iterator has get_state
    and set_state (grain), a run resumes at the exact batch through them, otherwise by reading past those it has had. A
    state that is a whole number is that of batches of all processes, and holds for any number of them.
    `evaluate(model) -> scores` is called with the averaged parameters; it may ask `stop` between batches and raise
    stop.Stopped. `draw(model)` gives pictures (N, H, W, 3) of them, which are kept in the workdir.
    `gates` is the nnx filter of the parameters that learn as gates. With a `workdir`, which it locks, the
    run is logged, saved and resumed there; `classes` (names) and `examples` (their number) of the training data, and
    `labelled` (which of them are), must then be those that it was made with. Nothing is written before all is checked.
    Raises UserError (bad configuration, workdir of another run or in use, full disk, a loss or gradient that is not
    finite) and, asked to stop when the first step is done, Interrupted; before that a signal acts as usual.
    """
    check(config)
    run, mesh, stop = Run(config, classes, examples, labelled), meshes.make_mesh(), stop or Stop()
    everywhere = meshes.replicated(mesh)
    with _held(workdir, run), jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        graphdef = nnx.graphdef(model)
        state, step_of = make_step(model, task, config, gates)
        state, batches, start, behind = meshes.replicate(mesh, state), iter(loader), 0, False
        if workdir is not None:
            state, start, behind = _resume(state, batches, run, workdir, everywhere)
        step_fn = jax.jit(step_of, donate_argnums=0, out_shardings=everywhere)

        def averaged() -> nnx.Module:
            params = state.params if state.ema is None else state.ema
            return views.still(nnx.merge(graphdef, params, state.rest, copy=True))

        said = log.Log(workdir, start=start, steps=config.steps, images_per_step=config.batch_size, quiet=quiet)
        with contextlib.closing(said):
            scores: Scores = {}
            reports = _Reports(said, workdir, task.players, start)
            # The order is an invariant: evaluate, checkpoint, fetch, step, log the step before.
            for step in range(start, config.steps + 1):
                last, stopping = step == config.steps, stop()
                due = (step > start or behind) and config.evaluate_every and step % config.evaluate_every == 0
                if evaluate is not None and (last or due) and not stopping:
                    reports.flush()
                    try:
                        scores = reports.evaluation(step, averaged(), evaluate, draw)
                    except Stopped:
                        stopping = True
                if workdir is not None and step > start and (last or stopping or step % config.checkpoint_every == 0):
                    reports.flush()  # what is saved is known to be finite
                    checkpoint.save(workdir, step, state, _position(batches, step), reports.good)
                    said.pause()
                if last or stopping:
                    break
                if (batch := next(batches, None)) is None:
                    raise UserError(f"the data ended after {step} of {config.steps} batches: the loader must repeat")
                batch = meshes.share(mesh, batch)
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                if step == start:
                    # Compiled by now, and from now on there is something to lose.
                    stack.enter_context(stop.signals())
                reports.add(step, metrics)
            reports.flush()
            said.flush()
        if not last or (stopping and evaluate is not None):
            how = "the same command goes on from there" if workdir else "nothing was saved: there is no workdir"
            raise Interrupted(f"{workdir or 'training'}: stopped after step {step} of {config.steps}; {how}")
        return Fitted(averaged(), scores, step)


@contextlib.contextmanager
def _held(workdir: str | Path | None, run: Run) -> Iterator[None]:
    """Inside this the workdir is this run's alone. Raises UserError where it is another's."""
    with contextlib.ExitStack() as stack:
        if workdir is not None:
            with meshes.together():
                check_workdir(workdir, run.config, run.classes, run.examples, run.labelled)
                if jax.process_index() == 0:
                    stack.enter_context(lock.hold(workdir))
        yield


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


class _Reports:
    """Metrics on their way to the log: those of a step are fetched when the next one has begun."""

    def __init__(self, said: log.Log, workdir: str | Path | None, players: tuple[Player, ...], good: int):
        self.said, self.workdir, self.players, self.good = said, workdir, players, good
        self.waiting: tuple[int, dict] | None = None

    def add(self, step: int, metrics: dict) -> None:
        """Those of the step after `step`, without those of players that rested in it."""
        self.flush()
        resting = tuple(f"{player.name}/" for player in self.players if step % player.every)
        self.waiting = step + 1, {name: each for name, each in metrics.items() if not name.startswith(resting)}

    def evaluation(
        self, step: int, model: nnx.Module, evaluate: Callable[[nnx.Module], Scores], draw: Draw | None
    ) -> Scores:
        """Scores of the model after `step` steps, logged, and what it draws. Raises Stopped, and UserError when the
        task says that training has gone wrong since the last time; what was saved since then is moved aside."""
        try:
            scores = evaluate(model)
        except Troubled as trouble:
            kept = [] if self.workdir is None else [k for k in checkpoint.steps(self.workdir) if k <= self.good]
            if self.workdir is not None and kept:
                checkpoint.tidy(self.workdir, kept[-1])
            last = f"step {kept[-1]} of {self.workdir} is the last good checkpoint" if kept else "there is none before"
            raise UserError(f"{trouble} at step {step}: training stopped; {last}") from None
        self.good = step
        self.said.evaluation(step, scores)
        if draw is not None:
            self.said.pictures(step, draw(model))
        return scores

    def flush(self) -> None:
        """Log what waits. Raises UserError when its loss or gradient is not finite."""
        if self.waiting is None:
            return
        (step, found), self.waiting = self.waiting, None
        metrics = {name: float(value) for name, value in jax.device_get(found).items()}
        for name, value in metrics.items():
            if name.rpartition("/")[2] in ("loss", "grad_norm") and not math.isfinite(value):
                kept = checkpoint.steps(self.workdir) if self.workdir is not None else []
                last = f"the last good checkpoint is step {kept[-1]} of {self.workdir}" if kept else ""
                what = f"{name} is {value} at step {step}: training stopped, {last or 'there is no checkpoint yet'}"
                raise UserError(f"{what}; a lower --optimizer.learning-rate may help")
        self.said.train(step, metrics)


# A row


def _twin(config: Config, classes: tuple[str, ...]) -> nnx.State:
    """Averaged parameters and batch statistics of the static twin in `config.init_from`."""
    other, model, _ = checkpoint.load(config.init_from)
    _, names = read_config(config.init_from)
    if not models.is_static(other.model):
        what = f"row {other.row} is {models.dynamics_of(other.model)}"
        raise UserError(f"--init-from {config.init_from}: {what}, it must be a static twin")
    if different := models.difference(other.model, config.model):
        raise UserError(f"--init-from {config.init_from}: {different}")
    # A VQ-VAE has no classes.
    if models.task_of(other.model) != "reconstruction" and (different := other_classes(names, classes)):
        raise UserError(f"--init-from {config.init_from}: trained for other classes: {different}")
    return nnx.state(model, TRAINED)


def validator(task: Task, source: Source, config: Config, stop: Stop | None = None) -> Callable[[nnx.Module], Scores]:
    """`evaluate` for `fit`: scores of `task` on all of `source`, with the gates' thresholds of the target budget.

    Raises UserError where the devices cannot share a batch equally, and Stopped between two batches when `stop` says
    so.
    """
    from dynjax.data import make_loader

    mesh = meshes.make_mesh()
    if config.batch_size % (devices := jax.device_count()):
        raise UserError(
            f"--batch-size {config.batch_size} is not a multiple of {devices}, the devices that share a batch"
        )

    def batches() -> Iterator[Arrays]:
        size, mine = config.batch_size, meshes.processes()
        for batch in make_loader(source, size, seed=0, augment=None, shuffle=False, repeat=False, **mine):
            if stop is not None and stop():
                raise Stopped
            yield meshes.share(mesh, batch)

    runners: list[Runner] = []  # one, compiled at the first evaluation
    before: list[Scores] = []

    def evaluate(model: nnx.Module) -> Scores:
        if task.budget is not None and task.budget.sampled:
            budget.set_threshold(model, budget.sampled_threshold(task.budget.target))
        if not runners:
            runners.append(make_runner(model, task, meshes.replicated(mesh)))
        found = score(runners[0], meshes.replicate(mesh, nnx.state(model)), batches(), task)
        if isinstance(task, Watches):
            if trouble := task.trouble(found.scores, before[-1] if before else None):
                raise Troubled(trouble)
            before.append(found.scores)
            for remark in task.remarks(found.scores, found.fraction):
                _say(remark)
        return found.scores | {"macs_fraction": found.fraction}

    return evaluate


def drawer(task: Task, count: int = 64) -> Draw | None:
    """`draw` for `fit`, of a task whose model draws pictures at once."""
    if not isinstance(task, Pictures):
        return None
    return lambda model: task.pictures(model, count)


def train(config: Config, workdir: str | Path, *, quiet: bool = False) -> Scores:
    """Train the row's model in `workdir`, or go on where it stopped; returns the final scores on val."""
    from dynjax.data import make_loader, make_source
    from dynjax.tasks import make_task, refuse_unused

    check(config)
    refuse_unused(config)
    with meshes.together():
        check_workdir(workdir, config)
        if jax.process_index() == 0 and (Path(workdir) / lock.FILE).exists():
            with lock.hold(workdir):  # refused before minutes of reading data; nothing is made yet
                pass
    if (base := models.base_of(config.model)) != config.model and not config.init_from:
        what = f"the workdir of a trained {base.family} (rows *_{base.family})"
        raise UserError(f"row {config.row} needs --init-from, {what}")
    from_twin = config.init_from and not checkpoint.any_finished(workdir)
    if from_twin:
        read_config(config.init_from)  # before minutes of reading data
    with meshes.together():
        source = make_source(config.data, "train", unlabelled=config.loss.consistency > 0)
        val = make_source(config.data, "val")
    for part in (source, val):
        _say(part.describe()) if not quiet else None
    classes, labelled = tuple(source.classes), few.chosen(source)
    check_workdir(workdir, config, classes, len(source), labelled)
    task = make_task(config, source)
    # Parameters, their average and the two moments of Adam.
    check_memory(config, len(classes), copies=4 if config.optimizer.ema else 3)
    if from_twin:
        twin = _twin(config, classes)
    elif checkpoint.any_finished(workdir):
        twin = None
    else:
        twin = models.beginning(config.model, len(classes), rngs=nnx.Rngs(config.seed))
    model = build(config, len(classes), twin)
    augment = config.data.augment
    loader = make_loader(source, config.batch_size, seed=config.seed, augment=augment, **meshes.processes())
    stop = Stop()
    evaluate = validator(task, val, config, stop)
    size = len(source)
    fitted = fit(
        model,
        task,
        loader,
        config,
        workdir,
        evaluate,
        drawer(task),
        classes=classes,
        examples=size,
        labelled=labelled,
        stop=stop,
        quiet=quiet,
    )
    return fitted.scores
