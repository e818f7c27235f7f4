"""experiments.sample, and evaluation of a row that draws pictures, from end to end on a row made tiny."""

import contextlib
import csv
import io
import json

import pytest
import test_commands
from PIL import Image

from experiments import evaluate, sample

pytestmark = pytest.mark.xdist_group("sample")  # one worker, so that each row is trained once


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return test_commands.make(tmp_path_factory.mktemp("pixels") / "w", "digits_pixelcnn_labels")


def draw(workdir, out, *arguments):
    """What the command prints, and the lines of calls.csv."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        sample.main(["--workdir", str(workdir), "--out", str(out), "--n", "3", *map(str, arguments)])
    with open(out / "calls.csv", newline="") as file:
        return said.getvalue(), list(csv.DictReader(file))


def test_two_samplers_write_the_same_pictures(workdir, tmp_path):
    said, lines = draw(workdir, tmp_path / "a", "--batch-size", 2)
    assert "0 of 192 pixels differ" in said
    assert [line["label"] for line in lines] == ["0", "1", "2"] and all(float(line["ms"]) > 0 for line in lines)
    for name in ("grid", "film", "calls"):
        with Image.open(tmp_path / "a" / f"{name}.png") as picture:
            assert min(picture.size) > 30
    _, lines = draw(workdir, tmp_path / "b", "--sampler", "cached", "--check", "pixel")
    assert {(line["calls"], line["evaluations_per_pixel"]) for line in lines} == {("64", "1.000")}
    assert {line["flipped"] for line in lines} == {"0"} and {line["rank_correlation"] for line in lines} == {"nan"}
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()


def test_one_label_and_a_given_upper_half(workdir, tmp_path):
    arguments = ["--label", 7, "--complete", "--seed", 1, "--check", "none"]
    said, lines = draw(workdir, tmp_path / "a", *arguments)
    assert "differ" not in said and {line["label"] for line in lines} == {"7"}
    draw(workdir, tmp_path / "b", *arguments, "--sampler", "cached")
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    return test_commands.make(tmp_path_factory.mktemp("scales") / "w", "digits_nextscale")


def test_coarse_to_fine_within_a_budget(scales, tmp_path):
    arguments = ["--sampler", "coarse-to-fine", "--batch-size", 2, "--budget"]
    said, lines = draw(scales, tmp_path / "a", *arguments, 0.7)
    assert "budget 70% met" in said and "0 of 192 pixels differ from those of the masked execution" in said
    _, whole = draw(scales, tmp_path / "b", *arguments, 1, "--check", "none", "--complete")
    assert {line["evaluations_per_pixel"] for line in whole} == {"1.750"}  # a coarse pixel once, the other three twice
    for few, all_ in zip(lines, whole, strict=True):
        assert int(few["macs"]) < int(all_["macs"]) and int(few["calls"]) < int(all_["calls"]) == 12
    with Image.open(tmp_path / "a" / "film.png") as picture:
        assert picture.size == (2 * (4 * 10 + 2), 2 * (3 * 10 + 2))  # moments: the coarsest, three of the finer scale


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--workdir", "nowhere"], "nowhere"),
        (["--n", "0"], "--n 0"),
        (["--window", "0"], "--window 0"),
        (["--window", "2", "--sampler", "cached"], "cached has none"),
        (["--seed", "-1"], "--seed -1"),
        (["--budget", "0.5"], "fixed-point is exact"),
        (["--budget", "2", "--sampler", "coarse-to-fine"], "--budget 2"),
        (["--sampler", "coarse-to-fine"], "by pixel, cached or fixed-point"),
        (["--label", "10"], "classes 0 to 9"),
        (["--sampler", "magic"], "magic"),
        (["--out", "FILE"], "config.json"),
    ],
)
def test_bad_input_is_one_line(workdir, tmp_path, capsys, monkeypatch, arguments, about):
    monkeypatch.setitem(test_commands.COMMANDS, "sample", sample)
    given = {"--workdir": str(workdir), "--out": str(tmp_path)} | dict(
        zip(arguments[::2], arguments[1::2], strict=True)
    )
    given = {name: str(workdir / "config.json") if value == "FILE" else value for name, value in given.items()}
    assert about in test_commands.fail(capsys, monkeypatch, "sample", *(a for pair in given.items() for a in pair))


def test_evaluate_says_bits_per_dimension(workdir, capsys):
    evaluate.main(["--workdir", str(workdir), "--batch-size", "16"])
    assert "bits/dim of 16 values" in capsys.readouterr().out
    record = json.loads((workdir / "evaluation.json").read_text())
    assert record["score"] == "bits/dim" and 0 < record["scores"]["1"]["bits_per_dim"] < 20
