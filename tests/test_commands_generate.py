"""experiments.sample and experiments.evaluate on rows that draw a picture at once, made tiny."""

import contextlib
import csv
import io

import numpy as np
import pytest
import test_commands
from PIL import Image

from benchmarks import generation
from dynjax.config import UserError
from dynjax.run import checkpoint
from experiments import sample

pytestmark = pytest.mark.xdist_group("generate")  # one worker, so that each row is trained once


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    static = test_commands.make(folder / "static", "digits_gan_static")
    return test_commands.make(folder / "w", "digits_gan_steps", init_from=str(static))


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    return test_commands.make(tmp_path_factory.mktemp("scales") / "w", "digits_gan_scales")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return test_commands.make(tmp_path_factory.mktemp("vae") / "w", "digits_vae_groups")


def draw(workdir, out, *arguments):
    """What the command prints, and the lines of compute.csv."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        sample.main(["--workdir", str(workdir), "--out", str(out), "--n", "5", *map(str, arguments)])
    with open(out / "compute.csv", newline="") as file:
        return said.getvalue(), list(csv.DictReader(file))


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "pictures").iterdir())])


def test_pictures_of_a_budget_and_what_each_took(steps, tmp_path):
    said, lines = draw(steps, tmp_path / "a", "--budget", 0.7, "--batch-size", 2)
    assert "budget 70% met: mean" in said and "0 of 320 pixels differ from those without skipping" in said
    assert [line["label"] for line in lines] == list("01234") and {line["flipped"] for line in lines} == {"0"}
    _, whole = draw(steps, tmp_path / "b", "--check", "none")
    assert {line["macs"] for line in whole} == {max(line["macs"] for line in whole)} and whole[0]["flipped"] == ""
    assert max(int(line["macs"]) for line in lines) <= int(whole[0]["macs"])
    assert pixels(tmp_path / "a").shape == (5, 8, 8, 3)
    with Image.open(tmp_path / "a" / "film.png") as film:  # two steps of each picture
        assert film.size == (2 * (2 * 10 + 2), 2 * (8 * 10 + 2))


def test_a_picture_is_the_same_in_whatever_batch(steps, tmp_path):
    draw(steps, tmp_path / "a", "--batch-size", 5)
    draw(steps, tmp_path / "b", "--batch-size", 3)
    assert np.abs(pixels(tmp_path / "a").astype(int) - pixels(tmp_path / "b")).max() <= 1
    draw(steps, tmp_path / "c", "--seed", 1)
    assert (pixels(tmp_path / "a") != pixels(tmp_path / "c")).any()


def test_one_class_by_either_name(steps, tmp_path):
    for name in ("--class", "--label"):
        _, lines = draw(steps, tmp_path / name, name, 3)
        assert {line["label"] for line in lines} == {"3"}


def test_a_small_picture_costs_less(scales, tmp_path):
    found = {}
    for size in (4, 8):
        _, lines = draw(scales, tmp_path / str(size), "--size", size)
        found[size] = float(lines[0]["macs"])
        assert pixels(tmp_path / str(size)).shape == (5, size, size, 3)
    assert found[4] < found[8]


def test_a_vae_draws_at_a_budget(vae, tmp_path):
    said, lines = draw(vae, tmp_path / "a", "--budget", 0.9)
    assert "budget 90%" in said and len(lines) == 5 and lines[0]["label"] == ""
    assert pixels(tmp_path / "a").shape == (5, 8, 8, 3)


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ("steps", ["--class", 12], r"--class 12: row digits_gan_steps has the classes 0 to 9$"),
        ("vae", ["--class", 1], "--class 1: row digits_vae_groups was not trained by class"),
        ("steps", ["--size", 16], r"--size 16: row digits_gan_steps draws pictures of 8 pixels; rows \*_gan_scales"),
        ("scales", ["--size", 5], "--size 5: row digits_gan_scales draws pictures of 4, 8 pixels"),
        ("scales", ["--budget", 0.5], "--budget 0.5: row digits_gan_scales has no gates that a budget could move"),
        ("steps", ["--sampler", "cached"], "--sampler cached: row digits_gan_steps draws a picture at once"),
        ("steps", ["--complete"], "--complete True: row digits_gan_steps draws a picture at once"),
    ],
)
def test_what_a_row_cannot_do_is_one_clear_line(row, arguments, message, tmp_path, request):
    with pytest.raises(UserError, match=message):
        draw(request.getfixturevalue(row), tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_untrained_workdir(steps, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_bytes((steps / "config.json").read_bytes())
    with pytest.raises(UserError, match="has no checkpoint yet"):
        draw(tmp_path / "w", tmp_path / "out")


def test_evaluation_shows_what_stops_when(steps):
    said = test_commands.run_evaluate(steps, "--budgets", 0.7, 1.0, "--timing-batches", 2)
    assert "Fréchet distance" in said and "precision" in said
    for name in ("drawn.png", "distances.csv", "steps.png", "curve.csv", "latency.csv"):
        assert (steps / name).exists(), name
    with open(steps / "distances.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["features"] == "classifier" and 0 <= float(line["precision"]) <= 1


@pytest.mark.slow
def test_evaluation_of_sizes(scales):
    said = test_commands.run_evaluate(scales)
    assert "evaluated once" in said
    with open(scales / "sizes.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["height"] for line in lines] == ["8", "4"]
    assert float(lines[1]["macs"]) < float(lines[0]["macs"]) and float(lines[0]["off"]) == 0


@pytest.mark.slow
def test_evaluation_of_a_dynamic_discriminator(tmp_path):
    folder = test_commands.make(tmp_path / "w", "digits_gan_dynamicd")
    assert "evaluated once" in test_commands.run_evaluate(folder)
    with open(folder / "discriminator.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    shares = [float(line["macs_fraction"]) for line in lines]
    assert shares == sorted(shares, reverse=True) and shares[0] == pytest.approx(1, abs=1e-5) and shares[-1] < 0.9


def test_pictures_a_second(steps, tmp_path):
    out = tmp_path / "generation.csv"
    some = ["--budgets", "1", "0.7", "--batches", "1", "2", "--repeats", "2"]
    generation.main(["--workdir", str(steps), "--out", str(out), *some])
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["kind"], line["value"], line["batch"]) for line in lines] == [
        (*kind, batch) for batch in ("1", "2") for kind in (("static", "1"), ("budget", "1"), ("budget", "0.7"))
    ]
    _, model, _ = checkpoint.load(steps)
    with pytest.raises(UserError, match="is no workdir"):
        generation.main(["--workdir", str(tmp_path / "none")])
    assert model.heights == (8,)
