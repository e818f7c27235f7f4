"""CamVid's layout, on a set made here and on the real one."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import camvid, make_source
from dynjax.data.source import size_of

REAL = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data" / "camvid"


def make_set(root, count=3, size=(12, 16)):
    """A small set in CamVid's layout; picture i of a split is grey i, its mask class i with a void corner."""
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for index in range(count):
            mask = np.full(size, index, np.uint8)
            mask[0, 0] = camvid.VOID
            Image.fromarray(np.full((*size, 3), 10 * index, np.uint8)).save(root / split / f"{index}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{index}.png")
    return root


def camvid_config(root, **options):
    return DataConfig(name="camvid", path=str(root), **options)


def test_a_set_without_lists(tmp_path):
    source = make_source(camvid_config(make_set(tmp_path)), "val")
    assert len(source) == 3 and size_of(source) == (12, 16) and source.spec["mask"].ignored == 11
    assert source.classes[0] == "sky" and source.classes[10] == "bicyclist" and len(source.classes) == 11
    example = source[2]
    assert (example["image"] == 20).all() and example["mask"][0, 0] == 11 and (example["mask"].ravel()[1:] == 2).all()
    assert source.describe() == "camvid val: 3 pictures 12x16, 11 classes"


@pytest.mark.parametrize("prefix", ["", "/SegNet/CamVid/"])
def test_lists_say_which_files(tmp_path, prefix):
    make_set(tmp_path)
    (tmp_path / "train.txt").write_text(
        f"{prefix}train/2.png {prefix}trainannot/2.png\n\n{prefix}train/0.png {prefix}trainannot/0.png\n"
    )
    source = make_source(camvid_config(tmp_path, size=(6, 8)), "train")
    assert [int(source[i]["image"].max()) for i in range(len(source))] == [20, 0]


def test_broken_sets_give_one_line(tmp_path):
    make_set(tmp_path, count=6)
    (tmp_path / "train" / "1.png").write_text("no picture")
    (tmp_path / "trainannot" / "2.png").unlink()
    Image.fromarray(np.full((12, 16), 12, np.uint8)).save(tmp_path / "trainannot" / "3.png")
    Image.fromarray(np.zeros((10, 16), np.uint8)).save(tmp_path / "trainannot" / "4.png")
    with pytest.raises(UserError) as caught:
        make_source(camvid_config(tmp_path), "train")
    text = str(caught.value)
    assert "\n" not in text and "4 bad files" in text
    for part in (
        "1.png: not a picture",
        "2.png: no mask of that name",
        "label 12 in the mask",
        "the image is 16x12 and the mask 16x10",
    ):
        assert part in text
    source = make_source(camvid_config(tmp_path, on_error="skip"), "train")
    assert len(source) == 2 and source.skipped == 4

    (tmp_path / "val.txt").write_text("val/0.png valannot/0.png\nval/9.png valannot/9.png\nval/1.png\n")
    with pytest.raises(
        UserError, match=r"2 bad files: .*line 3: 'val/1.png' is not 'image mask', .*9\.png: there is no such file"
    ):
        make_source(camvid_config(tmp_path), "val")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"give --data\.path"):
        make_source(DataConfig(name="camvid"), "train")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        make_source(camvid_config(tmp_path / "nowhere"), "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no folder .*trainannot"):
        make_source(camvid_config(tmp_path), "train")
    (tmp_path / "trainannot").mkdir()
    with pytest.raises(UserError, match="the split train is empty"):
        make_source(camvid_config(tmp_path), "train")
    (tmp_path / "train.txt").touch()
    with pytest.raises(UserError, match=r"the split train is empty \(.*train\.txt\)"):
        make_source(camvid_config(tmp_path), "train")


@pytest.mark.parametrize("name, near", [("camvit", "camvid"), ("digit", "digits"), ("xyz", None)])
def test_unknown_names(name, near):
    with pytest.raises(UserError, match=f"did you mean {near}" if near else "is not known"):
        make_source(DataConfig(name=name), "train")
    with pytest.raises(UserError, match="split='dev'"):
        make_source(DataConfig(), "dev")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real CamVid is not in {REAL}")
def test_the_real_set():
    source = make_source(camvid_config(REAL, size=(90, 120)), "val")
    assert len(source) == 101 and source.skipped == 0
    labels = np.unique(source.memory[1])
    assert labels.max() == 11 and len(labels) == 12
    road = source[0]["mask"] == source.classes.index("road")
    assert road[60:].mean() > 0.3 > road[:30].mean()  # the road is below


@pytest.mark.parametrize("gap", [" ", "\t", "  "])
def test_lists_whose_names_have_spaces(tmp_path, gap):
    root = make_set(tmp_path / "my set")
    for folder in ("train", "trainannot"):
        (root / folder / "1.png").rename(root / folder / "1 at  night.png")
    (root / "train.txt").write_text(
        f"train/1 at  night.png{gap}trainannot/1 at  night.png\n/my set/train/2.png{gap}/my set/trainannot/2.png\n"
    )
    source = make_source(camvid_config(root), "train")
    assert [int(source[i]["image"].max()) for i in range(len(source))] == [10, 20]
    with (root / "train.txt").open("a") as file:
        file.write("train/no such file.png trainannot/2.png\n")
    with pytest.raises(UserError, match=r"train\.txt, line 3: 'train/no such .* is not 'image mask', of files that"):
        make_source(camvid_config(root), "train")


def test_a_list_of_names_that_are_not_utf_8(tmp_path):
    make_set(tmp_path)
    name = b"\xe9t\xe9.png"  # Latin-1
    for folder in ("train", "trainannot"):
        (tmp_path / folder / "1.png").rename(tmp_path / folder / os.fsdecode(name))
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbftrain/" + name + b" trainannot/" + name + b"\n")
    assert len(make_source(camvid_config(tmp_path), "train")) == 1
