"""experiments.sample, and evaluation of a row that draws pictures, from end to end on a row made tiny."""

import contextlib
import csv
import io
import json
import re

import pytest
import test_commands
from PIL import Image

from dynjax.config import UserError
from dynjax.show.curve import read_curve
from experiments import evaluate, results, sample, table

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


def share_of(said, twin):
    """The share that the command says pictures took while it solved the budget, of a twin of so many MACs."""
    share, of = re.search(r"\((\d+\.\d)% of the static twin's (\d+\.\d+)\)", said).groups()
    assert of == f"{twin / 1e6:.2f}"
    return float(share) / 100


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
    arguments = ["--sampler", "coarse-to-fine", "--batch-size", 2]
    said, lines = draw(scales, tmp_path / "a", *arguments, "--budget", 0.7)
    assert "budget 70% met" in said and "0 of 192 pixels differ from those of the masked execution" in said
    _, whole = draw(scales, tmp_path / "b", *arguments, "--check", "none", "--complete")
    assert {line["evaluations_per_pixel"] for line in whole} == {"1.750"}  # a coarse pixel once, the other three twice
    # Both networks see of 1, 2 or 3 of four pixels 3x3, and their place; a tile is 2x2 pixels of the rich one.
    plain = sum(16 * (4 * (9 * known + 2) + 4 * 16) for known in (1, 2, 3))
    tile, more = 4 * (8 * 11 + 2 * 8 * 8 + 8 * 16), 4 * 8 * 9
    (full,) = {int(line["macs"]) for line in whole}
    assert 0.6 < share_of(said, full - plain) <= 0.7
    for few, all_ in zip(lines, whole, strict=True):
        left_out, spared = 12 - int(few["calls"]), full - int(few["macs"])
        assert int(all_["calls"]) == 12 > int(few["calls"])
        assert (spared - left_out * tile) % more == 0 <= spared - left_out * tile <= 2 * left_out * more
    with Image.open(tmp_path / "a" / "film.png") as picture:
        assert picture.size == (2 * (4 * 10 + 2), 2 * (3 * 10 + 2))  # moments: the coarsest, three of the finer scale


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    vqvae = test_commands.make(folder / "vqvae", "digits_vqvae")
    return vqvae, test_commands.make(folder / "w", "digits_codes_exits", init_from=str(vqvae))


def test_codes_are_drawn_and_decoded(codes, tmp_path):
    said, lines = draw(codes[1], tmp_path / "a", "--batch-size", 2)
    assert "0 of 48 pixels differ" in said and len(lines) == 3
    draw(codes[1], tmp_path / "b", "--sampler", "cached", "--check", "none")
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()
    with Image.open(tmp_path / "a" / "grid.png") as picture:
        assert picture.size == (2 * (2 * 10 + 2),) * 2  # pictures of 8x8, of 4x4 codes
    draw(codes[1], tmp_path / "c", "--complete", "--check", "none")


# 16 codes of 4 values, two blocks of 8 features: what a second block takes of one code, and one head of all codes.
BLOCK, HEAD = 10 * 8**2 + 2 * 16 * 8, 16 * 8 * 4
CODES_TWIN = 2 * 16 * (2 * 8**2 + BLOCK) + HEAD
"""MACs of the static twin of the model of codes, counted by hand: no encoder in it."""


def test_codes_leave_early_within_a_share_of_the_twin(codes, tmp_path):
    arguments = ["--sampler", "cached", "--check", "none", "--batch-size", 3]
    said, lines = draw(codes[1], tmp_path / "a", "--budget", 0.8, *arguments)
    assert "budget 80% met" in said and 0.7 < share_of(said, CODES_TWIN) <= 0.8
    for line in lines:
        left_out = (CODES_TWIN + HEAD - int(line["macs"])) / BLOCK
        assert left_out == int(left_out) and 0 <= left_out <= 16
    _, lines = draw(codes[1], tmp_path / "b", *arguments)
    assert {int(line["macs"]) for line in lines} == {CODES_TWIN + HEAD}


def test_evaluate_says_psnr_and_bits_of_codes(codes, capsys):
    evaluate.main(["--workdir", str(codes[0])])
    assert "PSNR" in capsys.readouterr().out
    scores = json.loads((codes[0] / "evaluation.json").read_text())["scores"]["1"]
    (point,) = read_curve(codes[0] / "curve.csv")
    assert point.score == pytest.approx(scores["psnr"], rel=1e-5) and point.macs > 0 and scores["perplexity"] >= 1
    evaluate.main(["--workdir", str(codes[1]), "--budgets", "0.1", "0.8", "1"])
    said = capsys.readouterr().out
    assert "bits/dim of 4 values" in said and "budget 0.1 is not met: " in said and "budget 0.8 is" not in said
    record = json.loads((codes[1] / "evaluation.json").read_text())
    points = read_curve(codes[1] / "curve.csv")
    assert [point.budget for point in points] == [0.1, 0.8, 1]
    for point in points:  # of six digits
        spent = record["calibration"][f"{point.budget:g}"]
        assert point.macs == pytest.approx(point.macs_fraction * CODES_TWIN, rel=1e-5)
        assert spent["met"] == point.met == (point.budget != 0.1)
        if point.budget == 0.1:
            assert point.macs == pytest.approx(CODES_TWIN + HEAD - 16 * BLOCK, rel=1e-5)  # all leave
        else:
            assert spent["mean"] <= point.budget * CODES_TWIN * (1 + 1e-6)


def test_pixels_leave_early_within_a_budget(tmp_path):
    folder = test_commands.make(tmp_path / "w", "digits_transformer_exits")
    arguments = ["--sampler", "cached", "--check", "none", "--batch-size", 3]
    said, lines = draw(folder, tmp_path / "a", "--budget", 0.8, *arguments)
    assert "budget 80% met" in said and "MMAC a picture" in said
    assert all(int(line["macs"]) > 0 for line in lines)
    evaluate.main(["--workdir", str(folder), "--budgets", "0.8", "1"])
    few, all_ = read_curve(folder / "curve.csv")
    assert few.macs < all_.macs


def test_codes_without_their_vqvae(tmp_path):
    with pytest.raises(UserError, match="--init-from, the workdir of a trained vqvae"):
        test_commands.make(tmp_path / "w", "digits_codes")


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["--workdir", "nowhere"], "nowhere"),
        (["--n", "0"], "--n 0"),
        (["--window", "0"], "--window 0"),
        (["--window", "2", "--sampler", "cached"], "cached has none"),
        (["--seed", "-1"], "--seed -1"),
        (["--budget", "0.5"], "has no gates and no exits"),
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
    (point,) = read_curve(workdir / "curve.csv")
    assert point.macs_fraction == 1 and point.macs > 1000


def test_evaluate_says_bits_at_each_budget(scales, tmp_path, capsys):
    evaluate.main(["--workdir", str(scales), "--budgets", "0.7", "1"])
    assert "budget  bits/dim  MMAC/image" in capsys.readouterr().out
    curve = test_commands.lines(scales)
    assert [(line["budget"], line["latency_ms_p50"], line["speedup"]) for line in curve] == [
        ("0.7", "", ""),
        ("1", "", ""),
    ]
    record = json.loads((scales / "evaluation.json").read_text())
    add = ["add", "--folder", str(tmp_path), "--workdir", str(scales)]
    results.main(add)
    with pytest.raises(UserError, match=r"has no grid\.png"):
        results.main([*add, "--samples", str(tmp_path / "none")])
    kept = table.read(tmp_path / "results.csv")
    assert [(line.budget, line.metric, line.speedup, line.met) for line in kept] == [
        ("0.7", "bits/dim", "", "yes"),
        ("1", "bits/dim", "", "yes"),
    ]
    assert float(kept[0].score) == pytest.approx(record["scores"]["0.7"]["bits_per_dim"], abs=1e-4)
    few, all_ = read_curve(scales / "curve.csv")
    assert few.macs < all_.macs and few.score != all_.score
    assert record["calibration"]["0.7"]["met"]
