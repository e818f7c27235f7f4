import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standin
from flax import nnx
from PIL import Image

from dynjax.config import BudgetConfig, OptimizerConfig, UserError
from dynjax.ops import Experts
from dynjax.ops.kernels import CondConv
from dynjax.run import checkpoint, lock, log, step, train
from dynjax.run.arrays import named_arrays
from dynjax.run.stop import Stop, Stopped
from dynjax.tasks.task import Troubled

HERE = Path(__file__).parent


class SignalAt(standin.Batches):
    """Sends this process a signal while batch number `at` is fetched."""

    def __init__(self, at, number=signal.SIGINT):
        super().__init__()
        self.at, self.number = at, number

    def __iter__(self):
        return type(self)(self.at, self.number)

    def __next__(self):
        if self.next == self.at:
            os.kill(os.getpid(), self.number)
        return super().__next__()


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole():
    """The arrays of an uninterrupted run."""
    return standin.arrays(standin.fit(standin.config()))


# Resuming


@pytest.mark.parametrize(("at", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGINT)])
def test_interrupted_and_resumed_ends_with_the_same_bits(tmp_path, whole, at, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(train.Interrupted, match=f"stopped after step {at + 1} of 6; the same command goes on"):
        standin.fit(standin.config(), tmp_path, loader=SignalAt(at, number))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert checkpoint.steps(tmp_path)[-1] == at + 1
    same(standin.arrays(standin.fit(standin.config(), tmp_path)), whole)
    steps = [record["step"] for record in log.read_metrics(tmp_path)]
    assert steps == list(range(1, 7))


def test_resumed_after_falling_back_ends_with_the_same_bits(tmp_path, whole, capsys):
    standin.fit(standin.config(), tmp_path)
    newest = tmp_path / "checkpoints" / "6"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    same(standin.arrays(standin.fit(standin.config(), tmp_path)), whole)
    said = capsys.readouterr().err
    assert "checkpoint 6" in said and "falling back to checkpoint 4" in said and "going on from step 4 of 6" in said
    assert checkpoint.steps(tmp_path) == [2, 4, 6]


def test_a_loader_without_a_position_is_read_past_what_it_gave(tmp_path, whole):
    batches = standin.Batches()
    batches = [next(batches) for _ in range(6)]
    with pytest.raises(train.Interrupted):
        standin.fit(standin.config(), tmp_path, loader=SignalAt(2))
    sidecar = tmp_path / "checkpoints" / "3" / "sidecar" / "process_0.json"
    sidecar.write_text(sidecar.read_text().replace('{"next": 3}', "3"))
    checkpoint._seal(sidecar.parents[1])
    same(standin.arrays(standin.fit(standin.config(), tmp_path, loader=batches)), whole)


def test_a_finished_run_is_only_evaluated(tmp_path):
    count = []

    def evaluate(model):
        count.append(1)
        return {"miou": 0.25}

    standin.fit(standin.config(), tmp_path)
    again = standin.fit(standin.config(), tmp_path, evaluate=evaluate, loader=[])
    assert (again.scores, len(count), again.step) == ({"miou": 0.25}, 1, 6)


def test_data_that_ends_early():
    with pytest.raises(UserError, match="ended after 1 of 6 batches"):
        standin.fit(standin.config(), loader=[next(standin.Batches())])


# The loop


def test_the_order_of_the_loop(tmp_path, monkeypatch):
    """Evaluate, checkpoint, fetch, step, log the step before."""
    events = []

    class Watched(standin.Batches):
        def __next__(self):
            events.append(f"fetch {self.next + 1}")
            return super().__next__()

    monkeypatch.setattr(checkpoint, "save", lambda workdir, step, *rest: events.append(f"save {step}"))
    monkeypatch.setattr(log.Log, "train", lambda self, step, metrics: events.append(f"log {step}"))
    config = standin.config(steps=5, checkpoint_every=2, evaluate_every=4)
    standin.fit(config, tmp_path, loader=Watched(), evaluate=lambda model: events.append("evaluate") or {})
    wanted = "fetch 1, fetch 2, log 1, log 2, save 2, fetch 3, fetch 4, log 3, log 4, evaluate, save 4, fetch 5"
    assert ", ".join(events) == wanted + ", log 5, evaluate, save 5"


def test_the_model_is_left_as_it_is_and_another_comes_back():
    model = standin.Net(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    fitted = standin.fit(standin.config(steps=2), model=model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert fitted.model.norm.use_running_average and fitted.model.drop.deterministic
    assert np.abs(standin.arrays(fitted)["conv.kernel"] - np.asarray(model.conv.kernel[...])).max() > 0


def test_it_learns():
    scores = []
    task = standin.Task(noise=0.0)
    batch = next(standin.Batches())

    def evaluate(model):
        scores.append(float(task.loss(model, batch, jax.random.key(0), 0.0)[0]))
        return {}

    config = standin.config(steps=40, evaluate_every=20, learning_rate=0.02, ema=0.5)
    standin.fit(config, model=standin.Net(nnx.Rngs(0), noise=False), task=task, evaluate=evaluate)
    assert scores[-1] < 1.25 < math.log(4)


class Broken(standin.Task):
    """The loss, or only its gradient, is not finite at one step."""

    def __init__(self, at: int, steps: int, gradient: bool):
        super().__init__()
        self.at, self.steps, self.gradient = at, steps, gradient

    def loss(self, model, batch, key, progress):
        loss, metrics = super().loss(model, batch, key, progress)
        now = jnp.round(progress * self.steps) == self.at
        zero = loss - jax.lax.stop_gradient(loss)
        # The square root has value 0 and gradient inf at 0.
        broken = jnp.sqrt(jnp.where(now, zero, 1.0)) if self.gradient else jnp.nan
        return loss + jnp.where(now, broken, 0.0), metrics


@pytest.mark.parametrize(("gradient", "name"), [(False, "loss"), (True, "grad_norm")])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, gradient, name):
    """Step 4 breaks: checkpoint 4 would hold the damage and is not written."""
    with pytest.raises(UserError, match=rf"{name} is (nan|inf) at step 4: .* last good checkpoint is step 2 of "):
        standin.fit(standin.config(), tmp_path, task=Broken(3, 6, gradient))
    assert checkpoint.steps(tmp_path) == [2]
    arrays, _ = checkpoint.read(tmp_path, 2)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in arrays.values())


def test_nan_before_any_checkpoint():
    with pytest.raises(UserError, match="loss is nan at step 1: training stopped, there is no checkpoint yet"):
        standin.fit(standin.config(), task=Broken(0, 6, False))


def test_a_training_that_goes_wrong_ends_at_its_last_good_checkpoint(tmp_path):
    """Good at step 6, bad at 9: what was saved between is moved aside."""

    def evaluate(model):
        times.append(1)
        if len(times) == 3:
            raise Troubled("pictures are all alike")
        return {}

    times = []
    config = standin.config(steps=12, evaluate_every=3, checkpoint_every=2)
    with pytest.raises(UserError, match=r"alike at step 9: training stopped; step 6 of .* is the last good checkpoint"):
        standin.fit(config, tmp_path, evaluate=evaluate)
    assert checkpoint.steps(tmp_path) == [4, 6]


def test_trouble_before_any_checkpoint():
    def evaluate(model):
        raise Troubled("pictures are all alike")

    with pytest.raises(UserError, match="alike at step 3: training stopped; there is none before"):
        standin.fit(standin.config(evaluate_every=3), evaluate=evaluate)


def test_what_is_drawn_at_an_evaluation_is_kept(tmp_path):
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    model, task, config = standin.Net(nnx.Rngs(0)), standin.Task(), standin.config(evaluate_every=3)
    batches = standin.Batches(config.batch_size)
    gates = dict(gates=standin.is_gate, quiet=True)
    train.fit(model, task, batches, config, tmp_path, lambda model: {}, lambda model: images, **gates)
    found = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert found == ["0000003.png", "0000006.png"]
    with Image.open(tmp_path / "samples" / found[0]) as picture:
        assert picture.size == (2 * (2 * 6 + 2), 2 * (2 * 6 + 2))
    (board,) = (tmp_path / "tensorboard").iterdir()
    assert board.read_bytes().count(b"\x89PNG") == 2


def test_everything_is_logged(tmp_path):
    standin.fit(standin.config(evaluate_every=3), tmp_path, evaluate=lambda model: {"miou": 0.5, "iou": [0.25, 0.75]})
    records = log.read_metrics(tmp_path)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "learning_rate", "macs_fraction", "images_per_second", "time"} <= steps[0].keys()
    assert [(r["step"], r["val/miou"], r["val/iou"]) for r in records if "val/miou" in r] == [
        (3, 0.5, [0.25, 0.75]),
        (6, 0.5, [0.25, 0.75]),
    ]
    assert [record["progress"] for record in steps] == pytest.approx([n / 6 for n in range(6)])
    assert list((tmp_path / "tensorboard").iterdir())


# The step


def test_accumulation_is_the_step_on_the_whole_batch():
    """Without batch statistics and noise the mean over equal parts is the mean over the batch."""
    runs = []
    for parts in (1, 2):
        model, task = standin.Net(nnx.Rngs(0), noise=False, norm=False), standin.Task(noise=0.0)
        config = standin.config(steps=3, batch_size=16, accumulate=parts)
        runs.append(standin.arrays(standin.fit(config, model=model, task=task)))
    for name in runs[0]:
        np.testing.assert_allclose(runs[1][name], runs[0][name], rtol=2e-4, atol=2e-6, err_msg=name)


def test_accumulated_parts_take_from_every_device():
    parts = step._parts({"x": jnp.arange(12)}, 3)["x"]
    np.testing.assert_array_equal(parts, [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])


def test_batch_statistics_and_random_streams_move_on(whole):
    assert np.abs(whole["norm.mean"]).max() > 0
    assert whole["drop.rngs.count"] == 6


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32(whole):
    seen = []

    class Watched(standin.Task):
        def loss(self, model, batch, key, progress):
            seen.append((model.conv.kernel.dtype, model.conv(jnp.ones((1, 8, 8, 3), jnp.bfloat16)).dtype))
            return super().loss(model, batch, key, progress)

    half = standin.arrays(standin.fit(standin.config(precision="bfloat16"), task=Watched()))
    assert seen[0] == (jnp.bfloat16, jnp.bfloat16)
    for name, array in whole.items():
        assert half[name].dtype == array.dtype
        np.testing.assert_allclose(half[name], array, atol=0.05, err_msg=name)


def optimized(grads: float, **optimizer) -> tuple[dict, dict]:
    """Parameters before and after one update with all gradients equal to `grads`."""
    params = nnx.state(standin.Net(nnx.Rngs(0)), nnx.Param)
    tx = step.make_optimizer(standin.config(warmup=0.0, **optimizer), params, standin.is_gate)

    @jax.jit
    def after(params):
        updates, _ = tx.update(jax.tree.map(lambda p: jnp.full_like(p, grads), params), tx.init(params), params)
        return jax.tree.map(jnp.add, params, updates)

    return named_arrays(params), named_arrays(after(params))


def test_what_decays():
    before, after = optimized(0.0, learning_rate=0.1, weight_decay=0.5)
    for name, array in before.items():
        decays = name.endswith("kernel") and "gate" not in name
        np.testing.assert_allclose(after[name], array * (1 - 0.1 * 0.5 * decays), rtol=1e-6, err_msg=name)


def test_biases_with_an_axis_more_do_not_decay():
    """One for each expert, mixed kernel, or head."""
    rngs = nnx.Rngs(0)
    model = nnx.List(
        [Experts(2, 3, 4, rngs=rngs), CondConv(2, 3, (1, 1), rngs=rngs), nnx.MultiHeadAttention(2, 4, rngs=rngs)]
    )
    params = nnx.state(model, nnx.Param)
    tx = step.make_optimizer(standin.config(warmup=0.0, learning_rate=0.1, weight_decay=0.5), params, standin.is_gate)
    zeros, ones = (jax.tree.map(make, params) for make in (jnp.zeros_like, jnp.ones_like))
    updates = jax.jit(lambda zeros, ones: tx.update(zeros, tx.init(ones), ones)[0])(zeros, ones)
    moved = {name for name, array in named_arrays(updates).items() if np.abs(array).max() > 0}
    assert not any("bias" in name for name in moved)
    assert sum("gate" not in name and "attention" not in name for name in moved) == 2 + 1 + 4


def test_gates_have_their_own_rate():
    before, after = optimized(1.0, learning_rate=0.1, weight_decay=0.0, gate_learning_rate=0.25)
    for name, array in before.items():
        wanted = 0.1 * (0.25 if "gate" in name else 1.0)  # Adam's first step has the size of the rate
        np.testing.assert_allclose(array - after[name], wanted, rtol=1e-3, err_msg=name)


def test_schedule_rises_and_falls():
    rate = step.schedule(standin.config(steps=100, learning_rate=2.0, warmup=0.1))
    got = [float(rate(jnp.int32(n))) for n in (0, 4, 9, 10, 55, 99)]
    np.testing.assert_allclose(got, [0.2, 1.0, 2.0, 2.0, 1.0, 1 - math.cos(math.pi / 90)], rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_schedule_of_a_short_run_is_positive(steps):
    for warmup in (0.0, 0.05, 1.0):
        rate = step.schedule(standin.config(steps=steps, warmup=warmup))
        assert all(float(rate(jnp.int32(n))) > 0 for n in range(steps))


def test_average_of_the_parameters():
    """The decay of step n is min(ema, (1 + n) / (10 + n)): 0.1, 2 / 11, then 0.2."""
    config = standin.config(ema=0.2, warmup=0.0)
    state, one = step.make_step(standin.Net(nnx.Rngs(0)), standin.Task(), config, standin.is_gate)
    one = jax.jit(one)
    wanted = np.asarray(state.params["conv"]["kernel"][...])
    for decay in (0.1, 2 / 11, 0.2):
        state, _ = one(state, next(standin.Batches()))
        wanted = decay * wanted + (1 - decay) * np.asarray(state.params["conv"]["kernel"][...])
        np.testing.assert_allclose(state.ema["conv"]["kernel"][...], wanted, rtol=1e-5, atol=1e-7)


# Devices and processes


def start(out: Path, workdir: Path | str, changes: dict, **environment: str) -> subprocess.Popen:
    arguments = [sys.executable, str(HERE / "standin.py"), str(out), str(workdir), json.dumps(changes)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)} | environment
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]


def close(found: dict, wanted: dict) -> None:
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_same_numbers_on_one_and_on_eight_devices(tmp_path):
    """Here there are eight simulated devices; a process of its own has one. Noise included."""
    assert jax.device_count() == 8
    changes = {"accumulate": 2, "batch_size": 16, "steps": 4}
    finish(start(tmp_path / "one.npz", "", changes, XLA_FLAGS="--xla_force_host_platform_device_count=1"))
    one = dict(np.load(tmp_path / "one.npz"))
    assert one.pop("devices") == 1 and one.pop("processes") == 1
    close(standin.arrays(standin.fit(standin.config(**changes))), one)


def run_two(out: Path, workdir: Path) -> dict:
    """Two processes of one device each, joined over TCP, each with half of every batch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    common["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    finish(*(start(out, workdir, {}, **common, JAX_PROCESS_ID=str(index)) for index in (0, 1)))
    found = dict(np.load(out))
    assert found.pop("devices") == 2 and found.pop("processes") == 2
    return found


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in log.read_metrics(workdir)]


def test_two_processes_agree_with_one(tmp_path):
    """Saved, and resumed by as many and by one. The loader is the real one; net, loss and pictures have noise."""
    workdir, alone = tmp_path / "w", tmp_path / "alone"
    whole = standin.arrays(standin.fit(standin.config(), tmp_path / "whole", loader=standin.loader()))
    two = run_two(tmp_path / "two.npz", workdir)
    close(two, whole)
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "whole"), rtol=1e-5)
    assert checkpoint.steps(workdir) == [2, 4, 6]
    names = sorted(path.name for path in (workdir / "checkpoints" / "4" / "sidecar").glob("process*"))
    assert names == ["process_0.json", "process_1.json"]
    (workdir / "checkpoints" / "6").rename(tmp_path / "6")
    shutil.copytree(workdir, alone)
    close(standin.arrays(standin.fit(standin.config(), alone, loader=standin.loader())), whole)
    np.testing.assert_allclose(losses(alone), losses(tmp_path / "whole"), rtol=1e-5)
    same(run_two(tmp_path / "again.npz", workdir), two)


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(tmp_path):
    whole = standin.arrays(standin.fit(standin.config(), tmp_path / "w", loader=standin.loader()))
    before = losses(tmp_path / "w")
    (tmp_path / "w" / "checkpoints" / "6").rename(tmp_path / "6")
    close(run_two(tmp_path / "two.npz", tmp_path / "w"), whole)
    np.testing.assert_allclose(losses(tmp_path / "w"), before, rtol=1e-5)


def test_a_position_of_other_processes_is_refused(tmp_path, monkeypatch):
    """A loader whose state is no number of batches, saved by one process and taken up by two."""
    standin.fit(standin.config(steps=1), tmp_path)
    _, _, position = checkpoint.read_newest(tmp_path)
    assert position == {"processes": 1, "loader": {"next": 1}}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"step 1 was saved by 1 process\(es\), this run has 2, .* start as many"):
        train._go_to(iter(standin.Batches()), position, 1)
    ours = iter(standin.loader())
    train._go_to(ours, {"processes": 5, "loader": 1}, 1)
    assert ours.get_state() == 1


# Signals and folders


class SignalWhile(standin.Task):
    """An `evaluate` of four batches that is sent a signal after the second of its first call."""

    def __init__(self):
        super().__init__()
        self.stop, self.batches, self.scores = Stop(), 0, []

    def evaluate(self, model):
        for _ in range(4):
            if self.stop():
                raise Stopped
            self.batches += 1
            if self.batches == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        self.scores.append(float(standin.arrays(train.Fitted(model, {}, 0))["conv.kernel"].sum()))
        return {"miou": self.scores[-1]}

    def fit(self, workdir, **changes):
        config = standin.config(checkpoint_every=100, **changes)
        loader = standin.Batches()
        options = dict(gates=standin.is_gate, stop=self.stop, quiet=True)
        return train.fit(standin.Net(nnx.Rngs(0)), self, loader, config, workdir, self.evaluate, **options)


@pytest.mark.parametrize("at", [4, 6])
def test_a_signal_during_evaluation_saves_first_and_evaluates_when_it_goes_on(tmp_path, whole, at):
    """Also during the last one, after the last step."""
    task = SignalWhile()
    with pytest.raises(train.Interrupted, match=f"stopped after step {at} of 6; the same command goes on"):
        task.fit(tmp_path, evaluate_every=at)
    assert (task.batches, task.scores, checkpoint.steps(tmp_path)) == (2, [], [at])
    again = SignalWhile()
    again.batches = 2  # no further signal
    same(standin.arrays(again.fit(tmp_path, evaluate_every=at)), whole)
    evaluated = [record["step"] for record in log.read_metrics(tmp_path) if "val/miou" in record]
    assert evaluated == ([4, 6] if at == 4 else [6]) and len(again.scores) == len(evaluated)


def test_before_the_first_step_a_signal_acts_as_usual(tmp_path, whole):
    """There is nothing to save, and a handler of ours would only be heard when all is compiled."""
    with pytest.raises(KeyboardInterrupt):
        standin.fit(standin.config(), tmp_path, loader=SignalAt(0))
    assert checkpoint.steps(tmp_path) == []
    with lock.hold(tmp_path):
        pass


def test_a_workdir_in_use_is_left_alone(tmp_path):
    standin.fit(standin.config(steps=1), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    with lock.hold(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        standin.fit(standin.config(steps=1), tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_workdir_removed_while_training_is_not_made_again(tmp_path):
    class Removes(standin.Batches):
        def __iter__(self):
            return type(self)()

        def __next__(self):
            if self.next == 3:
                shutil.rmtree(tmp_path / "w")
            return super().__next__()

    with pytest.raises(UserError, match="removed while training"):
        standin.fit(standin.config(), tmp_path / "w", loader=Removes())
    assert list(tmp_path.iterdir()) == []


# Bad configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "--steps is 0: it must be at least 1"),
        (dict(batch_size=0), "--batch-size is 0"),
        (dict(batch_size=12), r"--batch-size 12 is not a multiple of 8, which is 8 device\(s\) times"),
        (dict(accumulate=2), r"--batch-size 8 is not a multiple of 16"),
        (dict(seed=-1), "--seed is -1"),
        (dict(checkpoint_every=0), "--checkpoint-every is 0"),
        (dict(evaluate_every=-1), "--evaluate-every is -1"),
        (dict(budget=BudgetConfig(target=0.0)), r"--budget.target is 0.0: it must be a share of the MACs in \(0, 1\]"),
        (dict(budget=BudgetConfig(target=1.5)), r"--budget.target is 1.5"),
        (dict(budget=BudgetConfig(target=math.nan)), r"--budget.target is nan"),
        (dict(learning_rate=0.0), "--optimizer.learning-rate is 0.0"),
        (dict(clip=-1.0), "--optimizer.clip is -1.0"),
        (dict(ema=1.0), "--optimizer.ema is 1.0"),
        (dict(warmup=1.5), "--optimizer.warmup is 1.5"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        train.check(standin.config(**changes))


def test_a_workdir_of_another_configuration(tmp_path):
    standin.fit(standin.config(steps=1), tmp_path)
    with pytest.raises(UserError, match="steps is 1 there and 6 here"):
        standin.fit(standin.config(), tmp_path)
    other = dataclasses.replace(standin.config(steps=1), optimizer=OptimizerConfig(learning_rate=0.5))
    with pytest.raises(UserError, match=r"optimizer.learning_rate is 0.002 there and 0.5 here"):
        standin.fit(other, tmp_path)


def test_one_signal_is_not_answered_twice():
    """The handler of a command ends it at once: it must not be back while the first signal is still on its way."""
    hit = []
    before = signal.signal(signal.SIGINT, lambda number, frame: hit.append(number))
    try:
        stop = Stop()
        with stop.signals():
            signal.raise_signal(signal.SIGINT)
            assert stop() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
        assert hit == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
