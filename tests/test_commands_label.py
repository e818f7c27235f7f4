"""Masks proposed for pictures without, and pictures larger than the model's, on a row made tiny."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_commands import COMMANDS, fail, make, run_evaluate

from dynjax.config import DataConfig, UserError
from dynjax.data import folder
from dynjax.data.pictures import read_mask
from dynjax.run import lock
from experiments import deployed, label, predict

pytestmark = pytest.mark.xdist_group("commands")

SIZES = {"a.png": (70, 110), "b.jpg": (48, 48), "c.png": (30, 60)}
BUDGET = ("--budget", "0.6")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    made = make(tmp_path_factory.mktemp("tiles") / "w", "digits_unet_tiles")
    run_evaluate(made, "--budgets", 0.6, 1.0)  # the threshold is solved once
    return made


@pytest.fixture(scope="module")
def windows(workdir):
    """A row by windows at the budget: the program is compiled once."""
    return deployed.deploy(deployed.Asked(workdir=str(workdir), out="o", budget=0.6, whole="windows"))


@pytest.fixture
def once(windows, monkeypatch):
    monkeypatch.setattr(deployed, "deploy", lambda asked: windows)


@pytest.fixture
def pictures(tmp_path):
    where = tmp_path / "new"
    (where / "inside").mkdir(parents=True)
    for index, (name, size) in enumerate(SIZES.items()):
        image = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(image).save(where / name)
    (where / "notes.txt").write_text("no picture")
    return where


def run(workdir, out, pictures, *more):
    return label.main(["--workdir", str(workdir), "--out", str(out), *BUDGET, *map(str, more), str(pictures)])


def table(out):
    with open(out / "labels.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stored(path):
    with Image.open(path) as picture:
        return picture.mode, np.asarray(picture)


# Pictures larger than the model's


def test_a_picture_of_the_models_size_is_the_same_by_windows(workdir, windows, pictures):
    other = deployed.deploy(deployed.Asked(workdir=str(workdir), out="o", budget=0.6))
    assert (other.whole, other.overlap, windows.whole, windows.overlap) == ("resize", None, "windows", 0.25)
    with Image.open(pictures / "b.jpg") as picture:
        a, b = other.look(picture), windows.look(picture)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.sure, b.sure)
    np.testing.assert_array_equal(a.heat, b.heat)
    assert (a.macs, a.full) == (b.macs, b.full)


def test_predict_by_windows(workdir, windows, pictures, tmp_path):
    arguments = ["--workdir", str(workdir), "--out", str(tmp_path / "o"), *BUDGET, "--whole", "windows"]
    assert predict.main([*arguments, "--overlap", "0.5", str(pictures / "a.png")]) == 0
    mode, mask = stored(tmp_path / "o" / "a_mask.png")
    assert mode == "P" and mask.shape == (70, 110)
    assert {path.name for path in (tmp_path / "o").iterdir()} == {f"a_{k}.png" for k in ("mask", "overlay", "compute")}
    with Image.open(pictures / "a.png") as picture:
        answer = windows.look(picture)
    assert answer.ids.shape == answer.sure.shape == answer.heat.shape == (70, 110)
    with Image.open(pictures / "b.jpg") as picture:
        assert answer.full == 6 * windows.look(picture).full  # 2 windows of 48 down, 3 across
    assert 0 < answer.heat.sum() < answer.macs <= answer.full


def test_windows_are_those_of_the_training(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "w")
    told = json.loads((copy / "config.json").read_text())
    told["config"]["data"]["crop"] = [24, 32]
    (copy / "config.json").write_text(json.dumps(told))
    row = deployed.deploy(deployed.Asked(workdir=str(copy), out="o", budget=0.6))
    assert (row.whole, row.size) == ("windows", (24, 32))


# Labels


@pytest.mark.usefixtures("once")
def test_what_is_written_can_be_trained_on(workdir, windows, pictures, tmp_path, capsys):
    out = tmp_path / "set" / "train"
    assert run(workdir, out, pictures, "--unsure", 0.3) == 0
    assert "2 files and folders left out" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} >= {*label.OWN, "labels.csv", "classes.txt", "label.json"}
    assert (out / "classes.txt").read_text().splitlines() == list(windows.classes)
    for name, size in SIZES.items():
        stem = name.partition(".")[0]
        assert (out / "images" / name).read_bytes() == (pictures / name).read_bytes()
        mode, mask = stored(out / "masks" / f"{stem}.png")
        assert mode == "P" and mask.shape == size
        with Image.open(pictures / name) as picture:
            answer = windows.look(picture)
        np.testing.assert_array_equal(mask, answer.ids)
        _, marked = stored(out / "unsure" / f"{stem}.png")
        red = (marked[..., 0].astype(int) - marked[..., 1]) > 50
        np.testing.assert_array_equal(red, answer.sure < 0.3)
        (line,) = [line for line in table(out) if line["picture"] == name]
        assert float(line["unsure"]) == pytest.approx((answer.sure < 0.3).mean(), abs=1e-4)
        assert float(line["probability"]) == pytest.approx(answer.sure.mean(), abs=1e-4)
        assert int(line["macs"]) == round(answer.macs)
    shares = [float(line["unsure"]) for line in table(out)]
    assert shares == sorted(shares, reverse=True)
    config = DataConfig(name="folder", path=str(tmp_path / "set"), size=(48, 48))
    source = folder.make(config, "train", classes=windows.classes)
    assert len(source) == 3 and source[0]["mask"].shape == (48, 48)


@pytest.mark.usefixtures("once")
def test_unsure_pixels_may_be_ignored(workdir, windows, pictures, tmp_path):
    assert run(workdir, tmp_path / "o", pictures, "--unsure", 0.3, "--ignore-unsure") == 0
    with Image.open(pictures / "a.png") as picture:
        answer = windows.look(picture)
    assert 0 < (answer.sure < 0.3).mean() < 1
    mask = read_mask(tmp_path / "o" / "masks" / "a.png")
    np.testing.assert_array_equal(mask, np.where(answer.sure < 0.3, 255, answer.ids))


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock"}


@pytest.mark.usefixtures("once")
def test_the_same_command_goes_on(workdir, pictures, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "o"
    assert run(workdir, whole, pictures) == 0
    with monkeypatch.context() as stopped:
        save = label.report.save_mask

        def stop(path, mask, classes):
            if mask.shape == SIZES["b.jpg"]:
                path.write_text("a part")
                raise KeyboardInterrupt
            save(path, mask, classes)

        stopped.setattr(label.report, "save_mask", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workdir, out, pictures)
    assert [path.name for path in (out / "masks").iterdir() if path.name[0] != "."] == ["a.png"]
    assert [line["picture"] for line in table(out)] == ["a.png", "b.jpg"]
    with open(out / "labels.csv", "a") as file:
        file.write("c.png,0.")
    Image.fromarray(np.zeros(SIZES["a.png"], np.uint8)).save(out / "masks" / "a.png")  # by hand
    capsys.readouterr()
    assert run(workdir, out, pictures) == 0
    assert "1 of 3 pictures have a mask already and are left as they are" in capsys.readouterr().out
    assert not stored(out / "masks" / "a.png")[1].any()
    shutil.copyfile(whole / "masks" / "a.png", out / "masks" / "a.png")
    assert contents(out) == contents(whole)


@pytest.mark.usefixtures("once")
def test_masks_that_others_made_stay(workdir, pictures, tmp_path):
    made = tmp_path / "train"
    for name in ("images", "masks"):
        (made / name).mkdir(parents=True)
    with pytest.raises(UserError, match="has images, which is not of this command: give another --out"):
        run(workdir, made, pictures)
    out = tmp_path / "o"
    assert run(workdir, out, pictures) == 0
    with pytest.raises(UserError, match=r"made otherwise: unsure is 0\.9 there and 0\.5 here: give another --out"):
        run(workdir, out, pictures, "--unsure", 0.5)
    (out / "labels.csv").write_text("picture;unsure\n")
    with pytest.raises(UserError, match=r"labels\.csv cannot be read: its first line must be picture,unsure,"):
        run(workdir, out, pictures)
    with lock.hold(out, "out"), pytest.raises(UserError, match=r"out .* is in use by process .* another --out"):
        run(workdir, out, pictures)


@pytest.mark.usefixtures("once")
def test_the_others_are_labelled_when_some_cannot_be(workdir, pictures, tmp_path, capsys):
    (pictures / "b.png").write_bytes((pictures / "a.png").read_bytes())
    (pictures / "broken.png").write_text("no picture")
    assert run(workdir, tmp_path / "o", pictures) == 2
    out, err = capsys.readouterr()
    assert "3 of 5 pictures have masks" in out and "Traceback" not in err
    assert "broken.png: not a picture" in err and "b.png: another picture is called b too" in err
    assert {path.stem for path in (tmp_path / "o" / "masks").iterdir()} == {"a", "b", "c"}
    assert {path.name for path in (tmp_path / "o" / "images").iterdir()} == set(SIZES)


@pytest.mark.parametrize(
    ("command", "arguments", "about"),
    [
        ("label", ["--workdir", "W", "--out", "O", "nowhere"], "FOLDER nowhere: there is no such folder"),
        ("label", ["--workdir", "W", "--out", "O", "P/a.png"], "it is a file"),
        ("label", ["--workdir", "W", "--out", "O", "P/inside"], "no picture in it (.png"),
        ("label", ["--workdir", "W", "--out", "O"], "no folder given"),
        ("label", ["--workdir", "W", "--out", "P", "P"], "is where --out"),
        ("label", ["--workdir", "W", "--out", "O", "--unsure", "2", "P"], "--unsure 2 must be"),
        ("label", ["--workdir", "W", "--out", "O", "--budget", "2", "P"], "budget 2"),
        ("label", ["--workdir", "nowhere", "--out", "O", "P"], "nowhere"),
        ("label", ["--workdir", "W", "--out", "O", "--overlap", "0.9", "P"], "--overlap 0.9 must be"),
        ("predict", ["--workdir", "W", "--out", "O", "--overlap", "0.5", "P/a.png"], "--overlap 0.5 is of --whole"),
        ("predict", ["--workdir", "W", "--out", "O", "--whole", "half", "P/a.png"], "half"),
    ],
)
def test_bad_input_is_one_line(workdir, pictures, tmp_path, capsys, monkeypatch, command, arguments, about):
    monkeypatch.setitem(COMMANDS, "label", label)
    places = {"W": workdir, "O": tmp_path / "o", "P": pictures, "P/a.png": pictures / "a.png"}
    places["P/inside"] = pictures / "inside"
    assert about in fail(capsys, monkeypatch, command, *(places.get(each, each) for each in arguments))
    assert not (tmp_path / "o").exists()


def test_a_row_without_masks(tmp_path, pictures):
    made = make(tmp_path / "w", "digits_resnet_static")
    with pytest.raises(UserError, match="row digits_resnet_static is of classification and has no masks to propose"):
        run(made, tmp_path / "o", pictures)
    with pytest.raises(UserError, match="--whole windows: row digits_resnet_static gives one answer per picture"):
        deployed.deploy(deployed.Asked(workdir=str(made), out="o", whole="windows"))
