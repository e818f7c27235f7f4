"""Nothing is written before all has been checked; what is odd about files, classes and budgets is said in one line."""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import standin
from flax import nnx
from PIL import Image
from test_commands import evaluated, pictures, run_evaluate, static, workdir  # noqa: F401

from dynjax.config import DataConfig, UserError
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.run import train
from dynjax.run.workdir import other_classes, read_config, write_config
from dynjax.show import report
from dynjax.tasks.autoregressive import AutoregressiveTask
from experiments import cli, evaluate, predict, results, rows
from experiments import train as command

pytestmark = pytest.mark.xdist_group("commands")


def contents(folder):
    """Every file under a folder and what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


# Classes and number of examples


def class_folder(root, names, each=2):
    """A data set of 8x8 pictures; the row that trains on it."""
    for split in ("train", "val", "test"):
        for name in names:
            for number in range(each):
                save(root / split / name / f"{number}.png", np.full((8, 8, 3), number))
    config = rows.tiny(rows.get_row("digits_resnet_skip"))
    return dataclasses.replace(config, data=DataConfig(name="class_folder", path=str(root)))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            ("b", "c"),
            r"other classes than this data has: b, c \(2\) there and a, b \(2\) here, which differ from class 0",
        ),
        (("a",), r"a \(1\) there and a, b \(2\) here, which differ from class 1"),
        (("a", "b"), "was made with other data: 6 training examples there and 4 here"),
    ],
)
def test_a_run_goes_on_with_its_own_classes_and_examples_alone(tmp_path, there, message):
    config, folder = class_folder(tmp_path / "data", ("a", "b")), tmp_path / "w"
    write_config(folder, config, there, examples=6)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        train.train(config, folder, quiet=True)
    assert contents(folder) == before


def test_the_data_and_the_twin_may_have_moved(tmp_path, monkeypatch):
    config, folder = class_folder(tmp_path / "data", ("a", "b")), tmp_path / "w"
    moved = dataclasses.replace(config.data, path=str(tmp_path / "elsewhere"))
    write_config(folder, dataclasses.replace(config, data=moved, init_from="gone"), ("a", "b"), examples=4)
    monkeypatch.setattr(train, "fit", lambda *args, **about: train.Fitted(nnx.Module(), about, 1))
    about = train.train(config, folder, quiet=True)
    assert (about["classes"], about["examples"]) == (("a", "b"), 4)


def test_a_twin_of_other_classes(tmp_path, static):  # noqa: F811
    shutil.copytree(static, tmp_path / "twin")
    told = json.loads((tmp_path / "twin" / "config.json").read_text())
    (tmp_path / "twin" / "config.json").write_text(json.dumps(told | {"classes": told["classes"][::-1]}))
    config = read_config(static)[0]
    config = dataclasses.replace(config, row="digits_unet_tiles", init_from=str(tmp_path / "twin"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dynamics=TilesConfig(tiles=(4,))))
    with pytest.raises(UserError, match=r"trained for other classes: background, .* there and 0, 1, .* here"):
        train.train(config, tmp_path / "w", quiet=True)
    assert not (tmp_path / "w").exists()


def test_a_configuration_is_written_once_the_checkpoint_is_known_to_fit(tmp_path):
    standin.fit(standin.config(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    other = standin.Net(nnx.Rngs(0), norm=False)
    with pytest.raises(UserError, match=r"checkpoint 6 of .* does not fit the model of row standin"):
        standin.fit(standin.config(checkpoint_every=3), tmp_path, model=other)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize("option", [["--model.stem-stride", "3"], ["--init-from", "nowhere"], ["--data.name", "digit"]])
def test_no_folder_is_made_for_a_run_that_cannot_be(tmp_path, option):
    with pytest.raises(UserError):
        command.main(["digits_unet_tiles", "--workdir", str(tmp_path / "w"), "--batch-size", "8", *option])
    assert not (tmp_path / "w").exists()


def test_many_classes_are_shown_around_the_first_that_differs():
    there = tuple(map(str, range(1000)))
    said = other_classes(there, (*there[:700], "x", *there[701:]))
    assert "700" in said and "x, 701" in said and len(said) < 300 and said.endswith("which differ from class 700 on")


def test_a_split_need_not_have_the_last_class(tmp_path, static):  # noqa: F811
    folder = shutil.copytree(static, tmp_path / "w")
    told = json.loads((folder / "config.json").read_text())
    told["config"]["data"] |= {"name": "folder", "path": str(tmp_path / "data")}
    told["classes"] = [f"class {index}" for index in range(11)]
    (folder / "config.json").write_text(json.dumps(told))
    rng = np.random.default_rng(0)
    for split in ("val", "test"):
        for number in range(8):
            save(tmp_path / "data" / split / "images" / f"{number}.png", rng.integers(0, 256, (48, 48, 3)))
            save(tmp_path / "data" / split / "masks" / f"{number}.png", rng.integers(0, 8, (48, 48)))
    run_evaluate(folder)
    record = json.loads((folder / "evaluation.json").read_text())
    assert len(record["classes"]) == len(record["scores"]["1"]["iou"]) == 11
    save(tmp_path / "data" / "test" / "masks" / "3.png", np.full((48, 48), 11))
    with pytest.raises(UserError, match="label 11 in the mask, allowed are 0 to 10"):
        run_evaluate(folder)
    save(tmp_path / "data" / "test" / "masks" / "3.png", np.zeros((48, 48)))
    (folder / "config.json").write_text(json.dumps(told | {"classes": told["classes"][::-1]}))
    with pytest.raises(UserError, match="the run was trained for other classes than folder has"):
        run_evaluate(folder)


def test_devices_that_cannot_share_a_batch_of_validation():
    with pytest.raises(UserError, match=f"--batch-size 12 is not a multiple of {jax.device_count()}"):
        train.validator(AutoregressiveTask(), standin.pictures(), standin.config(batch_size=12))


def test_no_home(tmp_path, monkeypatch):
    def nobody(*args):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", nobody)
    monkeypatch.setattr(pathlib.Path, "expanduser", nobody)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cli.use_compilation_cache()
    from dynjax.data import make_source

    with pytest.raises(UserError, match=r"data\.path=~/here: Could not determine home directory"):
        make_source(DataConfig(name="folder", path="~/here"), "val")


# Predict


def test_a_budget_that_cannot_be_met_is_said(workdir, pictures, tmp_path, capsys):  # noqa: F811
    arguments = ["--workdir", str(workdir), "--out", str(tmp_path / "o"), "--budget", "0.05"]
    assert predict.main([*arguments, str(pictures / "grey.jpg")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "budget" in line]
    assert "budget 0.05 is not met: the least that row digits_unet_tiles can spend on val's pictures is" in line
    assert 5 < float(line.split("%")[0].split()[-1]) < 100


class Spent:
    met, mean = False, 0.31201


def test_the_least_share_is_rounded_up_so_that_it_can_be_met():
    assert "is 31.3% of the static twin's MACs" in evaluate.unmet("row", 0.05, Spent, 1.0)


def test_large_pictures_are_drawn_small(workdir, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(report, "SHOWN", 1000)
    save(tmp_path / "large.png", np.zeros((60, 90, 3)))
    arguments = ["--workdir", str(workdir), "--out", str(tmp_path / "o"), "--budget", "0.6"]
    assert predict.main([*arguments, str(tmp_path / "large.png")]) == 0
    sizes = {}
    for kind in ("mask", "overlay"):
        with Image.open(tmp_path / "o" / f"large_{kind}.png") as picture:
            sizes[kind] = picture.size
    assert sizes == {"mask": (90, 60), "overlay": (38, 25)}


def test_names_that_are_no_utf8_and_others_that_fail_lose_nothing(tmp_path, capfdbinary):
    good, odd, none = tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff\xe9.png", tmp_path / "none.png"
    save(good, np.zeros((8, 8, 3)))
    shutil.copyfile(good, odd)
    images = (str(good), os.fsdecode(odd), str(none), str(good))
    run = lambda image: (np.int64(1), np.float32(0.5), None, np.float32(3), 4.0)  # noqa: E731
    assert predict.predict(run, images, ("x", os.fsdecode(b"\xfc")), tmp_path) == 1
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["picture"].rpartition("/")[2] for line in lines] == ["a.png", r"\udcff\udce9.png", "a.png"]
    assert {(line["class"], line["probability"], line["macs"]) for line in lines} == {(r"\udcfc", "0.5000", "3")}
    out, err = capfdbinary.readouterr()
    assert out.decode().count("(0.5000)") == 3 and err.decode().count("error: ") == 1


def test_masks_of_names_that_are_no_utf8_or_too_long(tmp_path, capsys):
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    long, last = tmp_path / ("n" * 250 + ".png"), tmp_path / "last.png"
    save(last, np.zeros((8, 8, 3)))
    for name in (odd, long):
        shutil.copyfile(last, name)
    images = (os.fsdecode(odd), str(long), str(last))
    run = lambda image: (np.zeros((8, 8), int), np.ones((8, 8)), np.ones((8, 8)), np.float32(3), 4.0)  # noqa: E731
    (tmp_path / "o").mkdir()
    assert predict.predict(run, images, ("x", "y"), tmp_path / "o") == 1
    assert os.strerror(errno.ENAMETOOLONG) in capsys.readouterr().err
    found = os.listdir(os.fsencode(tmp_path / "o"))
    assert sorted(found) == sorted(
        b"%s_%s.png" % (n, k) for n in (b"last", b"\xff") for k in (b"mask", b"overlay", b"compute")
    )


def test_predict_makes_no_folder_before_it_knows_the_run(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        predict.main(["--workdir", "nowhere", "--out", str(tmp_path / "o"), "a.png"])
    assert not (tmp_path / "o").exists()


# Results


def test_results_are_not_written_where_they_cannot_be(static, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"cannot write in .*nowhere: No such file"):
        results.main(["add", "--folder", str(tmp_path / "nowhere"), "--workdir", str(static)])
