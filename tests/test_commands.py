"""The commands from end to end, on a row made tiny."""

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynjax.run import log, train
from experiments import cli, evaluate, predict, results, rows, table

pytestmark = pytest.mark.xdist_group("commands")  # one worker, so that the row is trained once

ROOT = Path(__file__).parents[1]
COMMANDS = {"evaluate": evaluate, "predict": predict, "results": results}


def make(folder, name, **changes):
    """A workdir of a row made tiny; whichever test has it trained first, in any process, leaves it for the others."""
    config = rows.tiny(rows.get_row(name))
    data = dataclasses.replace(config.data, examples=20)
    config = dataclasses.replace(config, data=data, batch_size=8, **changes)
    # Those that start from the same weights are the same, wherever these lie.
    twin = Path(config.init_from, "config.json").read_text() if config.init_from else ""
    known = hashlib.sha256(f"{dataclasses.replace(config, init_from='')} {twin}".encode()).hexdigest()
    kept = Path(os.environ["DYNJAX_TESTS_TRAINED"], known)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            train.train(config, folder, quiet=True)
            shutil.copytree(folder, f"{kept}.part")
            os.rename(f"{kept}.part", kept)
    return shutil.copytree(kept, folder, dirs_exist_ok=True)


def last_scores(workdir):
    """The evaluation on val with which training ended."""
    records = [record for record in log.read_metrics(workdir) if "val/macs_fraction" in record]
    return {name.removeprefix("val/"): value for name, value in records[-1].items()}


def run_evaluate(folder, *arguments):
    """What it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        evaluate.main(["--workdir", str(folder), "--timing", "2", "--calibration", "8", *map(str, arguments)])
    return said.getvalue()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("tiles") / "w", "digits_unet_tiles")
    return folder, run_evaluate(folder, "--budgets", 0.6, 1.0)


@pytest.fixture(scope="module")
def workdir(evaluated):
    return evaluated[0]


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("static") / "w", "digits_unet_static")
    run_evaluate(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("wide.png", (50, 70)), ("grey.jpg", (40, 40)), ("other/wide.jpg", (32, 32))):
        (folder / name).parent.mkdir(exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        (picture.convert("L") if name == "grey.jpg" else picture).save(folder / name)
    (folder / "text.png").write_text("no picture")
    return folder


def fail(capsys, monkeypatch, command, *arguments):
    """The one line that the command says on stderr before it exits with status 2."""
    monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(COMMANDS[command].main)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def lines(folder):
    with open(folder / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_writes_what_it_promises(workdir):
    found = {path.name for path in workdir.iterdir()}
    assert found >= {"curve.csv", "curve.png", "heatmaps.png", "compute_histogram.png", "evaluation.json", "examples"}
    assert "borders.csv" in found
    assert {path.name for path in (workdir / "examples").iterdir()} == {"easiest.png", "median.png", "hardest.png"}
    curve = lines(workdir)
    assert [line["budget"] for line in curve] == ["0.6", "1"]
    for line in curve:
        assert 0 <= float(line["score"]) <= 1
        assert float(line["macs_fraction"]) == pytest.approx(float(line["macs"]) / float(line["static_macs"]), rel=1e-4)
    record = json.loads((workdir / "evaluation.json").read_text())
    assert (record["row"], record["split"], record["step"], record["size"]) == (
        "digits_unet_tiles",
        "test",
        2,
        [48, 48],
    )
    assert set(record["thresholds"]) == {"0.6", "1"}
    scores = record["scores"]["1"]
    assert len(scores["class_dice"]) == len(scores["class_boundary_f1"]) == len(record["classes"]) == 11
    told = (workdir / "table.txt").read_text().split("classes at budget 1\n")[1].splitlines()
    assert [line.split()[0] for line in told[2:]] == [*(name.split()[0] for name in record["classes"]), "mean"]
    assert told[-1].split()[1:] == [f"{100 * scores[name]:.1f}" for name in ("miou", "dice", "boundary_f1")]


def test_a_classifier_with_exits(tmp_path, pictures):
    folder = make(tmp_path / "w", "digits_resnet_exits")
    said = run_evaluate(folder, "--budgets", 0.7, 1.0, "--timing-batches", 2, "--batch-size", 16)
    assert "accuracy %" in said and "pixel acc." not in said and "speed-up at 2" in said
    for line in lines(folder):
        assert line["pixel_accuracy"] == "" and 0 <= float(line["score"]) <= 1
    with open(folder / "latency.csv", newline="") as file:
        found = [(line["budget"], line["batch"]) for line in csv.DictReader(file)]
    assert found == [("0.7", "1"), ("1", "1"), ("0.7", "2"), ("1", "2")]
    with open(folder / "budgeted.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
    with open(folder / "anytime.csv", newline="") as file:
        assert [line["exit"] for line in csv.DictReader(file)] == ["0", "1"]
    for name in ("curve", "compute_histogram", "compute_by_class", "extremes", "exits"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 150
    assert json.loads((folder / "evaluation.json").read_text())["score"] == "accuracy"
    status = predict.main(
        ["--workdir", str(folder), "--out", str(tmp_path / "o"), "--budget", "0.7", str(pictures / "wide.png")]
    )
    assert status == 0
    with open(tmp_path / "o" / "predictions.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["class"] in "0123456789" and 0.1 <= float(line["probability"]) <= 1 and float(line["macs"]) > 0


def test_evaluate_ends_in_the_table(evaluated):
    said = evaluated[1]
    table = said[said.index("budget  ") :].splitlines()
    assert [line.split()[0] for line in table[2:4]] == ["0.6", "1"]
    assert "% of units kept" in said


def test_a_static_row_is_one_line(static):
    (line,) = lines(static)
    assert (line["budget"], line["speedup"], line["macs_fraction"], line["met"]) == ("1", "1", "1", "True")


def test_a_row_with_nothing_to_skip_is_one_line(tmp_path):
    folder = make(tmp_path / "w", "digits_condconv_kernels")
    said = run_evaluate(folder, "--budgets", 0.5, 1.0, "--timing-batches", 2, "--batch-size", 16)
    assert "nothing to skip" in said
    (line,) = lines(folder)
    assert line["budget"] == "1" and float(line["macs_fraction"]) > 1 and line["met"] == "False"


def test_a_trained_twin_and_controls_are_drawn(workdir, static, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "w")
    said = run_evaluate(copy, "--budgets", 1.0, "--split", "val", "--twin", static, "--compare", f"static={static}")
    assert "static twin: mIoU" in said
    record = json.loads((copy / "evaluation.json").read_text())
    assert record["split"] == "val" and record["static_score"] is not None


def test_predict_does_the_others_when_one_is_no_picture(workdir, pictures, tmp_path, capsys):
    names = ("wide.png", "text.png", "grey.jpg", "other/wide.jpg")
    status = predict.main(
        [
            "--workdir",
            str(workdir),
            "--out",
            str(tmp_path / "o"),
            "--budget",
            "0.6",
            *(str(pictures / n) for n in names),
        ]
    )
    assert status == 2
    said = capsys.readouterr().err
    assert "text.png" in said and "wide-2" in said and "Traceback" not in said
    stems = {"wide": (50, 70), "grey": (40, 40), "wide-2": (32, 32)}
    expected = {f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay", "compute")}
    assert {path.name for path in (tmp_path / "o").iterdir()} == expected
    for stem, size in stems.items():
        with Image.open(tmp_path / "o" / f"{stem}_mask.png") as mask:
            assert mask.mode == "P" and mask.size == size[::-1] and np.asarray(mask).max() <= 10
        with Image.open(tmp_path / "o" / f"{stem}_overlay.png") as overlay:
            assert overlay.mode == "RGB" and overlay.size == size[::-1]


def test_predict_solves_a_budget_that_evaluate_did_not(workdir, pictures, tmp_path):
    arguments = ["--workdir", str(workdir), "--out", str(tmp_path), "--budget", "0.8", str(pictures / "grey.jpg")]
    assert predict.main(arguments) == 0
    assert (tmp_path / "grey_mask.png").exists()


def test_predict_of_a_static_row(static, pictures, tmp_path, capsys, monkeypatch):
    arguments = ["--workdir", static, "--out", tmp_path, pictures / "grey.jpg"]
    assert predict.main(list(map(str, arguments))) == 0
    assert "static" in fail(capsys, monkeypatch, "predict", *arguments, "--budget", "0.5")


@pytest.mark.parametrize(
    ("command", "arguments", "about"),
    [
        ("evaluate", ["--workdir", "W", "--budgets", "0"], "budgets 0:"),
        ("evaluate", ["--workdir", "W", "--budgets", "0.5", "1.5"], "budgets 1.5"),
        ("evaluate", ["--workdir", "W", "--budgets", "nan"], "budgets nan"),
        ("evaluate", ["--workdir", "W", "--budgets", "many"], "many"),
        ("evaluate", ["--workdir", "W", "--timing", "0"], "--timing 0"),
        ("evaluate", ["--workdir", "W", "--split", "all"], "all"),
        ("evaluate", ["--workdir", "W", "--compare", "here"], "LABEL=WORKDIR"),
        ("evaluate", ["--workdir", "W", "--compare", "a=nowhere"], "nowhere"),
        ("evaluate", ["--workdir", "nowhere"], "nowhere"),
        ("evaluate", ["--workdir", "W", "--twin", "W"], "not static"),
        ("evaluate", [], "--workdir"),
        ("predict", ["--workdir", "nowhere", "--out", "O", "a.png"], "nowhere"),
        ("predict", ["--workdir", "W", "--out", "O"], "no picture"),
        ("predict", ["--workdir", "W", "--out", "O", "--budget", "2", "a.png"], "budget 2"),
        ("predict", ["--workdir", "W", "--out", "W/config.json", "a.png"], "config.json"),
        ("predict", ["--workdir", "W", "--out", "O", "nowhere.png"], "nowhere.png"),
        ("results", [], "add"),
        ("results", ["add", "--workdir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(workdir, tmp_path, capsys, monkeypatch, command, arguments, about):
    places = {"W": str(workdir), "O": str(tmp_path / "out"), "W/config.json": str(workdir / "config.json")}
    assert about in fail(capsys, monkeypatch, command, *(places.get(each, each) for each in arguments))


def test_a_command_exits_with_status_2_and_no_traceback():
    command = [sys.executable, "-m", "experiments.evaluate", "--workdir", "nowhere"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and "nowhere" in ran.stderr


def test_results_are_added_and_rendered(workdir, static, tmp_path):
    for folder in (workdir, static, workdir):
        results.main(["add", "--folder", str(tmp_path), "--workdir", str(folder)])
    kept = table.read(tmp_path / "results.csv")
    assert [(line.row, line.budget) for line in kept] == [
        ("digits_unet_tiles", "0.6"),
        ("digits_unet_tiles", "1"),
        ("digits_unet_static", "1"),
    ]
    assert all(line.seeds == "1" and line.score_std == "" and line.paper_score == "" for line in kept)
    assert all("experiments.evaluate" in line.command and line.hardware for line in kept)
    assert all("Run with" in line.protocol and "--steps" in line.protocol for line in kept)
    assert not any("Stopped" in line.protocol for line in kept)
    record = json.loads((static / "evaluation.json").read_text())
    shutil.copytree(static, tmp_path / "stopped")
    (tmp_path / "stopped" / "evaluation.json").write_text(json.dumps(record | {"step": 1}))
    assert results.changes(str(tmp_path / "stopped")).endswith("Stopped at step 1.")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## digits 48x48, test" in text and "figures/digits_unet_tiles_curve.png" in text
    assert (tmp_path / "figures" / "digits_unet_tiles_curve.png").exists()
    (tmp_path / "RESULTS.md").unlink()
    results.main(["render", "--folder", str(tmp_path)])
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_protocol_is_the_whole_paragraph():
    assert results.row_protocol("digits_resnet_skip").endswith("is drawn at every step.")


def test_seeds_are_averaged(static, tmp_path):
    other = tmp_path / "seed1"
    other.mkdir()
    record = json.loads((static / "evaluation.json").read_text())
    (other / "evaluation.json").write_text(json.dumps(record | {"seed": 1}))
    first = lines(static)[0]
    second = first | {"score": str(float(first["score"]) + 0.1)}
    (other / "curve.csv").write_text(f"{','.join(second)}\n{','.join(second.values())}\n")
    (line,) = results.collect((str(static), str(other)), "")
    assert float(line.score) == pytest.approx(100 * float(first["score"]) + 5, abs=0.01)
    assert float(line.score_std) == pytest.approx(10 / np.sqrt(2), abs=0.01)
    assert line.seeds == "2"
