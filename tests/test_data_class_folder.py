"""A user's own folder of pictures, one folder a class."""

import numpy as np
import pytest
from PIL import Image

from dynjax.config import Config, DataConfig, PixelCNNConfig, ResNetConfig, UserError
from dynjax.data import make_loader, make_source, pairs
from dynjax.data.source import target_of
from dynjax.tasks import make_task


def make_set(root, counts=None):
    """Pictures of class i in train are grey 100 i + 10 k."""
    counts = counts or {"train": {"dog": 3, "ant": 2, "cat": 2}, "val": {"cat": 1, "dog": 1}, "test": {"ant": 1}}
    for split, classes in counts.items():
        for label, name in enumerate(sorted(classes)):
            (root / split / name).mkdir(parents=True)
            for k in range(classes[name]):
                picture = Image.fromarray(np.full((8, 10, 3), 100 * label + 10 * k, np.uint8))
                picture.save(root / split / name / f"{k}.{'png' if k else 'JPG'}")
    return root


def read(root, split="train", **options):
    return make_source(DataConfig(name="class_folder", path=str(root), **options), split)


def test_classes_are_the_folders_of_train(tmp_path):
    source = read(make_set(tmp_path))
    assert source.classes == ("ant", "cat", "dog") and target_of(source.spec) == "label" and not source.handed
    found = [(int(source[i]["label"]), int(source[i]["image"].max())) for i in range(len(source))]
    assert found == [(0, 0), (0, 10), (1, 100), (1, 110), (2, 200), (2, 210), (2, 220)]
    assert source.describe() == "class_folder train: 7 pictures 8x10, 3 classes"
    val = read(tmp_path, "val", size=(4, 5), classes=3)
    assert val.classes == source.classes and [int(val[i]["label"]) for i in (0, 1)] == [1, 2]
    few = read(tmp_path, examples=3)
    assert [int(few[i]["label"]) for i in range(3)] == [0, 1, 2]  # from all over the set


def test_broken_files_are_named_or_skipped(tmp_path):
    make_set(tmp_path)
    (tmp_path / "train" / "dog" / "0.JPG").write_text("no picture")
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "cat" / ".hidden").touch()
    (tmp_path / "train" / "ant" / "more").mkdir()
    (tmp_path / "train" / "list.csv").touch()
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    text = str(caught.value)
    assert "\n" not in text and "data.name=class_folder, train: 4 bad files" in text
    for part in (
        "dog/0.JPG: not a picture",
        "notes.txt: not one of .png",
        "ant/more: a folder inside the folder of a class",
        "list.csv: lies beside the folders of the classes",
        "--data.on-error skip",
    ):
        assert part in text
    source = read(tmp_path, on_error="skip")
    assert len(source) == 6 and source.skipped == 4


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_folders_that_do_not_fit(tmp_path, on_error):
    make_set(tmp_path)
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(UserError, match=r"val: cow are no classes of .*train"):
        read(tmp_path, "val", on_error=on_error)
    assert len(read(tmp_path, "test")) == 1
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(UserError, match=r"train/cow: no picture of that class"):
        read(tmp_path, on_error=on_error)


def test_missing_and_other_folders(tmp_path):
    with pytest.raises(UserError, match=r"give --data\.path"):
        read("")
    with pytest.raises(UserError, match=r"no folder .*nowhere; a class_folder set is laid out as"):
        read(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no class, .*train has no folders"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*val"):
        read(tmp_path, "val")
    (tmp_path / "train" / "images").mkdir()
    (tmp_path / "train" / "masks").mkdir()
    with pytest.raises(UserError, match=r"pictures with masks are data\.name=folder"):
        read(tmp_path)
    make_set(tmp_path / "other")
    with pytest.raises(UserError, match=r"data\.classes=2: .*train has 3 folders"):
        read(tmp_path / "other", classes=2)
    with pytest.raises(UserError, match=r"folder per class are data\.name=class_folder"):
        make_source(DataConfig(name="folder", path=str(tmp_path / "other")), "train")


def test_sizes_differ(tmp_path):
    make_set(tmp_path)
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(tmp_path / "train" / "ant" / "odd.png")
    with pytest.raises(UserError, match=r"2 sizes \(width x height\): 10x8 \(7\), 6x6 \(1\)"):
        read(tmp_path)
    assert len(read(tmp_path, size=(8, 8))) == 8


def test_a_large_set_is_read_again_instead_of_kept(tmp_path, monkeypatch):
    make_set(tmp_path)
    kept = read(tmp_path)
    monkeypatch.setattr(pairs, "KEEP_BYTES", 10)
    streamed = read(tmp_path)
    assert kept.memory is not None and streamed.memory is None
    batches = [next(iter(make_loader(source, 4, seed=0, augment=None))) for source in (kept, streamed)]
    for key in ("image", "label"):
        np.testing.assert_array_equal(batches[0][key], batches[1][key])
        assert batches[0][key].dtype == batches[1][key].dtype


def test_the_classes_of_a_run_count_where_folders_lack_one(tmp_path):
    make_set(tmp_path, {"test": {"cat": 2}})  # no train folder beside it
    config = DataConfig(name="class_folder", path=str(tmp_path))
    source = make_source(config, "test", classes=("dog", "cat", "ant"))  # in the run's order
    assert source.classes == ("dog", "cat", "ant") and int(source[0]["label"]) == 1
    with pytest.raises(UserError, match=r"test: cat are no classes of the run \(dog, ant\)"):
        make_source(config, "test", classes=("dog", "ant"))


def test_one_class_is_learnt_by_any_model(tmp_path):
    make_set(tmp_path, {"train": {"ant": 2}, "val": {"ant": 1}})
    row = Config(row="r", model=ResNetConfig(), data=DataConfig(name="class_folder"))
    with pytest.raises(UserError, match=r"class_folder, train, has one class alone, ant: there must be at least 2"):
        make_task(row, read(tmp_path))
    draws = Config(row="r", model=PixelCNNConfig(shape=(8, 10, 3)))
    make_task(draws, read(tmp_path))  # to draw, no classes are needed
    make_set(tmp_path / "two", {"train": {"ant": 1, "bee": 1}})
    (tmp_path / "two" / "train" / "bee" / "0.JPG").write_text("no picture")
    with pytest.raises(UserError, match=r"has 2 classes, of which only ant occurs in its labels"):
        make_task(row, read(tmp_path / "two", on_error="skip"))
