"""A user's own folder of pictures and masks."""

import numpy as np
import pytest
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import make_source


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
    assert sources[2].ignore_label == 255 and (sources[2][1]["mask"] == 255).all()
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
    with pytest.raises(UserError, match=r"label 1 in the mask, allowed are 0 to 0|at least 2"):
        make_source(folder_config(tmp_path), "test", classes=trained[:1])
