"""Benchmarks run to their end on something tiny; what they time is no matter here."""

import csv
import sys
from unittest import mock

import pytest
import test_commands
from PIL import Image

from benchmarks import foreign, heads, inside, many_classes, refinement, sampling, thin
from dynjax.config import UserError

pytestmark = pytest.mark.xdist_group("benchmarks")  # one worker, so that the row is trained once


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return test_commands.make(tmp_path_factory.mktemp("exits") / "w", "digits_transformer_exits")


def read(path):
    with Image.open(path.with_suffix(".png")) as picture:
        assert min(picture.size) > 300
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_refinement_spends_less_at_a_lower_budget(workdir, tmp_path):
    out = tmp_path / "refinement.csv"
    arguments = ["--budgets", "0.8", "--batches", "2", "--repeats", "1", "--pictures", "16"]
    refinement.main(["--workdir", str(workdir), "--out", str(out), *arguments])
    lines = {(line["gate"], line["budget"]): line for line in read(out)}
    assert set(lines) == {("entropy", "0.8"), ("entropy", "all"), ("random", "0.8"), ("static", "all")}
    few, all_, static = (lines[key] for key in (("entropy", "0.8"), ("entropy", "all"), ("static", "all")))
    assert float(few["mmacs"]) < float(all_["mmacs"]) and float(few["ms_batch2"]) > 0
    # 64 pixels of 16 values, two blocks of 8 features: a share is of the static twin, which has no head in between.
    twin, head = 2 * (12 * 64 * 8**2 + 2 * 64**2 * 8) + 64 * 8 * 16, 64 * 8 * 16
    assert [round(twin / 1e6, 3), 1.0] == [float(static["mmacs"]), float(static["macs_fraction"])]
    assert float(all_["macs_fraction"]) == pytest.approx((twin + head) / twin, abs=2e-4)
    assert float(few["macs_fraction"]) == pytest.approx(0.8, abs=0.05)
    assert float(all_["bits_per_dim"]) == pytest.approx(float(static["bits_per_dim"]), abs=1e-4)


def test_refinement_of_a_row_without_a_dial(tmp_path):
    with pytest.raises(UserError, match="is no workdir of a training run"):
        refinement.main(["--workdir", str(tmp_path)])


@pytest.mark.slow
def test_samplers_draw_the_same(workdir, tmp_path):
    out = tmp_path / "sampling.csv"
    sampling.main(["--workdir", str(workdir), "--out", str(out), "--batches", "2", "--repeats", "1", "--windows"])
    lines = read(out)
    assert [line["sampler"] for line in lines] == ["pixel", "cached", "plain", "fixed-point"]
    assert {line["pixels_that_differ"] for line in lines} == {"0"} and {line["pixels"] for line in lines} == {"128"}


@pytest.mark.slow
def test_what_tiles_cost_on_thin_maps(tmp_path):
    out = tmp_path / "thin.csv"
    thin.main(["--widths", "3", "4", "--size", "16", "24", "--tile", "4", "--repeats", "1", "--out", str(out)])
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["kind"] for line in lines] == ["wide", "even"]
    for line in lines:
        assert float(line["nothing_ms"]) > 0 and 0.2 < float(line["kept_at_half"]) < 0.8


def test_what_many_classes_cost(tmp_path):
    out = tmp_path / "many_classes.csv"
    many_classes.main(["--classes", "11", "40", "--side", "4", "--repeats", "1", "--out", str(out)])
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = [(line["classes"], line["kept"]) for line in lines]
    assert found == [("11", "1"), ("11", "11"), ("40", "2"), ("40", "4"), ("40", "40")]  # 5% and 10% of 11 are one
    for line in lines:
        assert float(line["max_error"]) < 1e-5 and float(line["list_ms"]) > 0 and float(line["step_dense_ms"]) > 0


def test_a_deployed_model_inside_of_jax_code(tmp_path):
    out = tmp_path / "inside.csv"
    inside.main(["--examples", "8", "--channels", "4", "--size", "8", "--repeats", "1", "--out", str(out)])
    with out.open(newline="") as file:
        gathers = {line["way"]: line["all_gather"] for line in csv.DictReader(file)}
    assert gathers.pop("mesh_gathers") == "True" and set(gathers.values()) == {"False"}
    assert {"vmap", "vmap_unfolded", "mesh_axis", "mesh_plain"} <= set(gathers)


def test_models_that_others_wrote(tmp_path, capsys):
    out, names = tmp_path / "foreign.csv", ["flax_cnn", "flax_scanned", "equinox_mlp"]
    with mock.patch.dict(sys.modules, equinox=None):
        foreign.main(["--out", str(out), "--repeats", "1", "--cases", *names])
    with open(out, newline="") as file:
        works, stacked, missing = csv.DictReader(file)
    assert works["status"] == "works" and float(works["speedup_8"]) > 0
    assert float(works["difference"]) < 1e-5 and float(works["difference_all_kept"]) < 1e-5
    assert works["met"] == "True" and 0.4 < float(works["share"]) <= 0.5 and works["lines"] == "4"
    assert "layers = nnx.List(" in stacked["status"] and missing["status"].startswith("not installed")
    assert "| flax_cnn | Flax docs | Tiles | 4 |" in capsys.readouterr().out


@pytest.mark.slow
def test_heads_are_compared_on_one_backbone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heads, "HEADS", {name: heads.HEADS[name] for name in ("fcn", "unet")})
    out = tmp_path / "heads.csv"
    (tmp_path / "camvid_lite0_fcn").mkdir()
    (tmp_path / "camvid_lite0_fcn" / "evaluation.json").write_text('{"scores": {"1": {"miou": 0.5}}}')
    heads.main(["--runs", str(tmp_path), "--size", "32", "48", "--repeats", "1", "--out", str(out)])
    with open(out, newline="") as file:
        fcn, decoder = csv.DictReader(file)
    assert (fcn["head"], fcn["miou"], decoder["miou"], decoder["ratio"]) == ("fcn", "50.0", "", "1.0")
    assert 0 < int(fcn["head_macs"]) < int(decoder["head_macs"]) < int(decoder["macs"])
    assert 0 < int(fcn["head_parameters"]) < int(fcn["parameters"])
