"""One's own pictures from end to end: five sizes, black and white masks, names of classes, few labels, windows."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from test_commands import run_evaluate
from test_commands_train import TILED

from dynjax.run.workdir import read_run
from experiments import cli, predict
from experiments import train as command

SIZES = ((40, 60), (64, 48), (97, 33), (30, 30), (48, 64))
HERE = ["my_tiles", "--data.masks", "binary", "--data.crop", "48", "48", "--steps", "2"]
HERE += [each for each in TILED if each not in ("--data.size", "48", "--data.examples", "20")]


def make_set(root):
    """A bright square on dark noise, which the mask has too; of every second mask the pixels are a palette's."""
    rng = np.random.default_rng(0)
    for split, sizes in (("train", SIZES), ("val", SIZES[:2]), ("test", SIZES[2:4])):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index, size in enumerate(sizes):
            image, mask = rng.integers(0, 100, (*size, 3), np.uint8), np.zeros(size, np.uint8)
            image[8:20, 8:20] += 100
            mask[8:20, 8:20] = 255
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            picture = Image.fromarray(mask)
            if index % 2:
                picture = Image.fromarray(mask // 255)
                picture.putpalette([0, 0, 0, 200, 0, 0])
            picture.save(root / split / "masks" / f"{index}.png")
    (root / "classes.txt").write_text("ground\nsquare #ff0000\n")
    return root


def test_train_evaluate_predict(tmp_path, capsys, monkeypatch):
    root, workdir, out = make_set(tmp_path / "set"), tmp_path / "w", tmp_path / "out"
    train = [*HERE, "--workdir", str(workdir), "--data.path", str(root), "--data.labelled", "4/5"]
    command.main(train)
    said = capsys.readouterr()
    assert "folder train: 5 pictures of 5 sizes, 2 classes; a window of 48x48; 4 of 5 labelled" in said.err
    assert "folder val: 2 pictures of 2 sizes, 2 classes; 4 windows of 48x48" in said.err
    assert 0 <= json.loads(said.out)["val"]["miou"] <= 1
    run = read_run(workdir)
    assert run.classes == ("ground", "square") and run.examples == 4
    kept = (workdir / "labelled.txt").read_text()
    assert len(kept.splitlines()) == 4 and kept.splitlines()[0] in ("0 0.png", "1 1.png")
    command.main(train)  # nothing is left to do, and the same pictures are labelled
    assert (workdir / "labelled.txt").read_text() == kept
    (workdir / "labelled.txt").write_text("0 other.png\n")
    monkeypatch.setattr(sys, "argv", ["train", *train])
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.run(command.main)
    assert "was made with other labelled pictures: 0 " in capsys.readouterr().err

    told = run_evaluate(workdir, "--budgets", "1")
    assert "folder test: 2 pictures of 2 sizes, 2 classes; 4 windows of 48x48" in told and "4 windows; step 2" in told
    assert json.loads((workdir / "evaluation.json").read_text())["size"] == [48, 48]

    tall = root / "test" / "images" / "0.png"
    assert predict.main(["--workdir", str(workdir), "--out", str(out), "--budget", "1", str(tall)]) == 0
    with Image.open(out / "0_mask.png") as mask:
        assert mask.mode == "P" and mask.size == (33, 97) and np.asarray(mask).max() <= 1
    assert (out / "0_compute.png").exists() and (out / "0_overlay.png").exists()
