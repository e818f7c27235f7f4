"""The train command from end to end, on a row made tiny by its own arguments."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dynjax import budget
from dynjax.core import views
from dynjax.run import checkpoint, log, train
from experiments import cli, rows
from experiments import train as command

ROOT = Path(__file__).parents[1]
TINY = "--model.widths 8 12 --model.blocks 1 0 --model.tiles 4 --data.size 48 48 --data.examples 20".split()
TINY += ["--batch-size", "8"]
SMALL = "--model.widths 4 8 --model.blocks 1 1 --data.size 8 8 --data.examples 20 --batch-size 8".split()


def start(workdir: Path, steps: int) -> subprocess.Popen:
    """The command in a process of its own, with the devices that it finds; the smallest row, four times."""
    arguments = [sys.executable, "-m", "experiments.train", "digits_resnet_skip", "--workdir", str(workdir), *SMALL]
    arguments += ["--steps", str(steps), "--checkpoint-every", "7", "--evaluate-every", "20"]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signal_after(process: subprocess.Popen, workdir: Path, steps: int, number: int) -> tuple[str, str]:
    """Send a signal once that many steps are logged; returns what the process said."""
    end = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < end:
        if any(record["step"] >= steps for record in log.read_metrics(workdir)):
            process.send_signal(number)
            return process.communicate(timeout=600)
        time.sleep(0.005)
    raise AssertionError(f"ended with {process.returncode} before step {steps}: {process.communicate()[1]}")


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out)


def test_killed_and_interrupted_at_random_steps_ends_with_the_same_bits(tmp_path):
    # Stopped past what the first has logged, and well before the end.
    steps, kill, stop = 100, random.randint(1, 13), random.randint(40, 60)
    whole = finish(start(tmp_path / "whole", steps))

    workdir = tmp_path / "broken"
    process = start(workdir, steps)
    signal_after(process, workdir, kill, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, (kill, stop)

    process = start(workdir, steps)
    _, said = signal_after(process, workdir, stop, signal.SIGINT)
    assert process.returncode == 130, said
    saved = checkpoint.steps(workdir)[-1]
    assert said.splitlines()[-1] == (
        f"{workdir}: stopped after step {saved} of {steps}; the same command goes on from there"
    )

    assert finish(start(workdir, steps)) == whole
    one, other = (checkpoint.read(folder, steps) for folder in (tmp_path / "whole", workdir))
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, array in one[0].items():
        np.testing.assert_array_equal(array, other[0][name], err_msg=f"{name}, killed at {kill}, stopped at {stop}")
    logged = [record["step"] for record in log.read_metrics(workdir) if "loss" in record]
    assert logged == list(range(1, steps + 1))


# Bad input: one line and exit status 2


def run(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(command.main)
    return stop.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A workdir of two steps of the static row."""
    workdir = tmp_path_factory.mktemp("static") / "w"
    command.main(["digits_unet_static", "--workdir", str(workdir), *TINY, "--steps", "2"])
    return workdir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the first argument must be a row"),
        ("--workdir W", "the first argument must be a row"),
        ("digit_unet_tiles --workdir W", "unknown row 'digit_unet_tiles': did you mean digits_unet_tiles"),
        ("nothing --workdir W", "unknown row 'nothing': the rows are digits_unet_static"),
        ("digits_unet_tiles", "missing: --workdir"),
        ("digits_unet_tiles --workdir", "Missing value for argument '--workdir'"),
        ("digits_unet_tiles --workdir W --step 3", "Unrecognized options: --step, 3; perhaps you meant --steps"),
        ("digits_unet_tiles --workdir W --budget.aim 1", "Unrecognized options: --budget.aim, 1"),
        ("digits_unet_tiles --workdir W extra", "Unrecognized options: extra"),
        ("digits_unet_tiles --workdir W --steps many", "Error parsing --steps: invalid literal for int()"),
        (
            "digits_unet_tiles --workdir W --model.dynamics none",
            "invalid choice 'none' for argument",
        ),
        ("digits_unet_tiles --workdir W --data.size 96", "Error parsing --data.size: no type matching"),
        ("digits_unet_tiles --workdir W --row other", "--row cannot be changed (to other)"),
        ("digits_unet_tiles --workdir W --steps 0", "--steps is 0: it must be at least 1"),
        ("digits_unet_tiles --workdir W --budget.target 0", "--budget.target is 0.0: it must be a share of the MACs"),
        ("digits_unet_tiles --workdir W --budget.target 1.01", "--budget.target is 1.01: it must be a share"),
        ("digits_unet_tiles --workdir W --batch-size 12", "--batch-size 12 is not a multiple of 8"),
        ("digits_unet_tiles --workdir W --data.name digit", "data.name='digit'"),
        ("camvid_small_tiles --workdir W --data.path MISSING", "MISSING"),
        ("digits_unet_tiles --workdir FILE/w", "cannot write in workdir"),
        ("digits_unet_tiles --workdir W --data.examples 20 --init-from MISSING", "is no workdir of a training run"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    places = {"W": tmp_path / "w", "FILE/w": tmp_path / "file" / "w", "MISSING": tmp_path / "MISSING"}
    status, out, err = run(capsys, monkeypatch, *(places.get(word, word) for word in arguments.split()))
    lines = [line for line in err.splitlines() if not line.startswith("digits ")]  # says first what data there is
    assert (status, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("error: ") and message in lines[0]


def test_a_workdir_of_another_row_or_configuration(capsys, monkeypatch, static):
    status, _, err = run(capsys, monkeypatch, "digits_unet_tiles", "--workdir", static, *TINY, "--steps", 2)
    assert status == 2
    assert err == (
        f"error: workdir {static} was made by row digits_unet_static, this is row digits_unet_tiles: "
        "give another --workdir\n"
    )
    status, _, err = run(capsys, monkeypatch, "digits_unet_static", "--workdir", static, *TINY, "--steps", 3)
    assert status == 2 and "steps is 2 there and 3 here" in err and err.count("\n") == 1


def test_no_number_stops_with_one_line(capsys, monkeypatch, tmp_path):
    workdir = tmp_path / "w"
    rate = ["--optimizer.learning-rate", "1e30", "--optimizer.warmup", "0"]
    arguments = ["digits_unet_static", "--workdir", workdir, *TINY, *rate, "--steps", 9, "--checkpoint-every", 1]
    status, _, err = run(capsys, monkeypatch, *arguments)
    assert status == 2
    assert "at step" in err.splitlines()[-1] and "training stopped" in err.splitlines()[-1]
    for step in checkpoint.steps(workdir):
        arrays, _ = checkpoint.read(workdir, step)
        assert all(np.isfinite(array).all() for name, array in arrays.items() if name.startswith("params"))


def test_list_and_help(capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "--list")
    assert status == 0
    assert [line.split(" - ")[0] for line in out.splitlines()] == list(rows.ROWS)
    status, out, _ = run(capsys, monkeypatch, "--help")
    assert status == 0 and "digits_unet_tiles" in out
    status, out, _ = run(capsys, monkeypatch, "digits_unet_tiles", "--help")
    assert status == 0 and "--budget.target" in out and "--workdir" in out


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda arguments: 1 // 0)


def test_the_compilation_cache_goes_where_the_environment_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "here"))
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here") and (tmp_path / "here").is_dir()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "sub"))
        cli.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Two stages: a static twin's weights under the wrappers


def parse(row: str, *more: str):
    return command.parse([row, "--workdir", "w", *TINY, *more])[0]


@pytest.mark.parametrize("row", ["digits_unet_tiles", "digits_unet_skip", "digits_unet_select"])
def test_init_from_puts_the_twin_under_the_wrappers(static, row):
    """With everything kept the adaptive model is its twin."""
    _, twin, _ = checkpoint.load(static)
    config = parse(row, "--init-from", str(static))
    model = views.still(checkpoint.build(config, 11, train._twin(config, checkpoint.read_config(static)[1])))
    budget.set_threshold(model, -30.0)
    x = jax.random.bits(jax.random.key(0), (2, 48, 48, 3), np.uint8)
    adaptive, static_twin = (jax.jit(lambda x, net=net: net(x))(x) for net in (model, twin))
    np.testing.assert_allclose(adaptive, static_twin, rtol=1e-5, atol=1e-5)
    statistics = checkpoint.named_arrays(nnx.state(twin, nnx.BatchStat))
    assert any(np.abs(array).max() > 0 for name, array in statistics.items() if name.endswith("mean"))


def test_init_from_trains_and_resumes_without_the_twin(static, tmp_path, monkeypatch):
    moved = tmp_path / "twin"
    os.symlink(static, moved)
    arguments = ["digits_unet_skip", "--workdir", str(tmp_path / "w"), *TINY, "--init-from", str(moved), "--steps", "1"]
    assert command.main(arguments) is None
    moved.unlink()
    assert command.main(arguments) is None


def test_init_from_again_when_killed_before_the_first_checkpoint_was_finished(static, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: train.Fitted(nnx.Module(), {}, 1))
    monkeypatch.setattr(train, "_twin", lambda config, classes: asked.append(config.init_from))
    unfinished = tmp_path / "w" / "checkpoints" / "1"
    unfinished.mkdir(parents=True)
    arguments = ["digits_unet_skip", "--workdir", str(tmp_path / "w"), *TINY, "--init-from", str(static)]
    command.main(arguments)
    (unfinished / checkpoint.SEAL).write_text("{}")
    command.main(arguments)
    assert asked == [str(static)]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.widths", "8", "16"], "model.widths is (8, 12) there and (8, 16) here"),
        (["--model.stem-stride", "4"], "model.stem_stride is 2 there and 4 here"),
    ],
)
def test_init_from_another_net(capsys, monkeypatch, tmp_path, static, more, message):
    arguments = ["digits_unet_tiles", "--workdir", tmp_path / "w", *TINY, "--init-from", static, *more]
    status, _, err = run(capsys, monkeypatch, *arguments)
    assert status == 2 and message in err.splitlines()[-1]


def test_init_from_a_row_that_is_not_static(capsys, monkeypatch, tmp_path, static):
    command.main(["digits_unet_skip", "--workdir", str(tmp_path / "skip"), *TINY, "--steps", "1"])
    arguments = ["digits_unet_tiles", "--workdir", tmp_path / "w", *TINY, "--init-from", tmp_path / "skip"]
    status, _, err = run(capsys, monkeypatch, *arguments)
    assert status == 2 and "row digits_unet_skip is skip, it must be a static twin" in err.splitlines()[-1]
