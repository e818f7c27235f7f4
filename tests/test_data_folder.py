"""A user's own folder of pictures and masks."""

import numpy as np
import pytest
from PIL import Image

from dynjax.config import Config, DataConfig, UNetConfig, UserError
from dynjax.data import make_source
from dynjax.tasks import make_task


def make_set(root, labels=None):
    labels = labels or {"train": (0, 1), "val": (1,), "test": (4, 255)}
    for split, ids in labels.items():
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index, label in enumerate(ids):
            Image.fromarray(np.full((8, 10, 3), label, np.uint8)).save(root / split / "images" / f"{index}.jpg")
            Image.fromarray(np.full((8, 10), label, np.uint8)).save(root / split / "masks" / f"{index}.png")
    return root


def folder_config(root, **options):
    return DataConfig(name="folder", path=str(root), **options)


def test_classes_come_from_all_splits(tmp_path):
    config = folder_config(make_set(tmp_path))
    sources = [make_source(config, split) for split in ("train", "val", "test")]
    assert all(source.classes == tuple(f"class {i}" for i in range(5)) for source in sources)
    assert [len(source) for source in sources] == [2, 1, 2]
    assert sources[2].spec["mask"].ignored == 255 and (sources[2][1]["mask"] == 255).all()
    assert (
        make_source(folder_config(tmp_path, classes=9, size=(4, 5)), "val").describe()
        == "folder val: 1 pictures 4x5, 9 classes"
    )


def test_a_label_outside_the_classes(tmp_path):
    make_set(tmp_path)
    with pytest.raises(UserError, match=r"test/images/0\.jpg: label 4 in the mask, allowed are 0 to 1 and 255"):
        make_source(folder_config(tmp_path, classes=2), "test")
    for classes in (-1, 256):
        with pytest.raises(UserError, match=f"data.classes={classes}"):
            make_source(folder_config(tmp_path, classes=classes), "train")


def test_a_broken_mask_is_named_not_counted(tmp_path):
    make_set(tmp_path)
    (tmp_path / "train" / "masks" / "1.png").write_text("no picture")
    with pytest.raises(UserError, match=r"masks/1\.png: not a picture"):
        make_source(folder_config(tmp_path), "train")
    assert len(make_source(folder_config(tmp_path, on_error="skip"), "train")) == 1
    assert len(make_source(folder_config(tmp_path), "val")) == 1


def test_nothing_but_ignored_pixels_and_missing_folders(tmp_path):
    make_set(tmp_path / "all", {"train": (255,), "val": (), "test": ()})
    with pytest.raises(UserError, match="no class in any mask"):
        make_source(folder_config(tmp_path / "all"), "train")
    with pytest.raises(UserError, match="the split val is empty"):
        make_source(folder_config(tmp_path / "all", classes=2), "val")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        make_source(folder_config(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match=r"give --data\.path"):
        make_source(DataConfig(name="folder"), "train")
    (tmp_path / "half" / "train" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder .*masks"):
        make_source(folder_config(tmp_path / "half"), "train")


def test_the_classes_of_a_run_count_where_a_split_lacks_one(tmp_path):
    trained = tuple(f"class {i}" for i in range(6))
    make_set(tmp_path, {"test": (0, 1)})  # neither train nor val, and no mask with the last class
    source = make_source(folder_config(tmp_path), "test", classes=trained)
    assert source.classes == trained and len(source) == 2
    with pytest.raises(UserError, match=r"label 1 in the mask|data\.classes=1: there can be 2 to 255"):
        make_source(folder_config(tmp_path), "test", classes=trained[:1])


def test_masks_of_0_and_255_are_no_two_classes(tmp_path):
    make_set(tmp_path, {"train": (0, 255), "val": (255,)})
    (mask,) = (tmp_path / "val" / "masks").iterdir()
    pixels = np.full((8, 10), 255, np.uint8)
    pixels[0] = 0
    Image.fromarray(pixels).save(mask)
    with pytest.raises(UserError, match=r"no mask has a class other than 0, 255 marks ignored.*not as 0 and 255"):
        make_source(folder_config(tmp_path), "train")
    # Where the number of classes is given, what occurs decides.
    row = Config(row="r", model=UNetConfig(), data=folder_config(tmp_path, classes=2))
    source = make_source(row.data, "train")
    assert source.seen == {0}
    with pytest.raises(
        UserError, match=r"folder, train, has 2 classes, of which only class 0 occurs in its masks \(255"
    ):
        make_task(row, source)
    make_task(row, source, training=False)  # a test split may lack a class


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_nothing_but_ignored_pixels(tmp_path, split):
    make_set(tmp_path, {"train": (0, 1), "val": (1,), "test": (1,)})
    for mask in (tmp_path / split / "masks").iterdir():
        Image.fromarray(np.full((8, 10), 255, np.uint8)).save(mask)
    with pytest.raises(UserError, match=f"folder, {split}: every pixel of every mask is 255, which marks ignored"):
        make_source(folder_config(tmp_path, classes=2), split)


def test_folders_inside_are_named(tmp_path):
    make_set(tmp_path)
    inside = tmp_path / "train" / "images" / "night"
    inside.mkdir()
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(inside / "9.png")
    with pytest.raises(UserError, match=r"images/night: a folder inside images, whose files are not read from there"):
        make_source(folder_config(tmp_path), "train")
    assert make_source(folder_config(tmp_path, on_error="skip"), "train").describe().endswith("1 skipped")
    (tmp_path / "train" / "images" / ".cache").mkdir()
    (tmp_path / "old" / "masks").mkdir(parents=True)  # no split: its masks say nothing about the classes
    Image.fromarray(np.full((8, 10), 9, np.uint8)).save(tmp_path / "old" / "masks" / "0.png")
    inside.rename(tmp_path / "old" / "night")
    assert len(make_source(folder_config(tmp_path), "train").classes) == 5
