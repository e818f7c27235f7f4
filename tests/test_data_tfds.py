"""TFDS sets: CamVid prepared and read here without TensorFlow; what is missing is said at once."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import make_source
from dynjax.data.source import target_of
from dynjax.data.tfds import find_prepared, splits_of

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def camvid_folder(tmp_path_factory):
    """Three pictures a split, of two sizes in train."""
    root = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    for split in SPLITS:
        (root / split).mkdir()
        (root / f"{split}annot").mkdir()
        for index in range(3):
            size = (20, 30) if index else (12, 18)
            Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(root / split / f"{index}.png")
            Image.fromarray(rng.integers(0, 12, size, np.uint8)).save(root / f"{split}annot" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def prepared(camvid_folder, tmp_path_factory):
    """Prepared by the command; TensorFlow is not among the requirements, so this shows that it does without."""
    data_dir = tmp_path_factory.mktemp("tfds")
    command = [sys.executable, "-m", "dynjax.data.camvid_tfds", str(camvid_folder), str(data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"prepared {data_dir / 'camvid' / '1.0.0'}" in done.stdout
    return data_dir


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Grey and colour pictures with class labels, from encoded bytes: only arrays would need TensorFlow."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("labelled")

    def prepare(set_name, channels, labels):
        def png(index):
            stream = io.BytesIO()
            shape = (6, 5) if channels == 1 else (6, 5, channels)
            Image.fromarray(np.full(shape, index, np.uint8)).save(stream, "PNG")
            stream.seek(0)
            return stream

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = set_name
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = data_dir  # where TFDS looks for citations and checksums; there are none

            def _info(self):
                features = {"image": tfds.features.Image(shape=(6, 5, channels)), **labels}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

            def _generate_examples(self, count):
                for index in range(count):
                    yield index, {"image": png(10 * index), **dict.fromkeys(labels, index % 4)}

        builder = Builder(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))

    names = tfds.features.ClassLabel(names=["bird", "cat", "dog", "elk"])
    prepare("mnist", 1, {"label": names})
    prepare("cifar", 3, {"coarse": tfds.features.ClassLabel(num_classes=2000), "label": names})
    prepare("twofold", 3, {"one": names, "other": names})
    prepare("bare", 3, {})
    return data_dir


def tfds_config(data_dir, name="camvid", **options):
    return DataConfig(name=f"tfds:{name}", path=str(data_dir), **options)


@pytest.mark.parametrize("split", SPLITS)
def test_reads_what_was_prepared(prepared, camvid_folder, split):
    source = make_source(tfds_config(prepared, size=(10, 15)), split)
    folder = make_source(DataConfig(name="camvid", path=str(camvid_folder), size=(10, 15)), split)
    assert source.classes == folder.classes and source.spec["mask"].ignored == 255 and len(source) == 3
    assert source.describe() == f"tfds:camvid {split}: 3 pictures 10x15, 11 classes"
    originals = {folder[i]["image"].tobytes(): folder[i]["mask"] for i in range(3)}
    for index in range(3):  # TFDS has an order of its own
        mask = originals.pop(source[index]["image"].tobytes())
        np.testing.assert_array_equal(source[index]["mask"], np.where(mask == 11, 255, mask))


def test_names_of_versions_and_paths(prepared):
    folder = prepared / "camvid" / "1.0.0"
    assert find_prepared("camvid", str(prepared)) == folder
    assert find_prepared("camvid:1.0.0", str(prepared)) == folder
    assert find_prepared("camvid", str(folder)) == folder
    os.environ["TFDS_DATA_DIR"], before = str(prepared), os.environ.get("TFDS_DATA_DIR")
    try:
        assert find_prepared("camvid", "") == folder
    finally:
        if before is None:
            del os.environ["TFDS_DATA_DIR"]
        else:
            os.environ["TFDS_DATA_DIR"] = before


def test_the_newest_version_is_taken(tmp_path):
    for version in ("9.0.0", "10.0.0", "2.1.0"):
        folder = tmp_path / "pets" / "small" / version
        folder.mkdir(parents=True)
        (folder / "features.json").touch()
        (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "array_record"}))
    assert find_prepared("pets", str(tmp_path)).name == "10.0.0"
    assert find_prepared("pets/small:2.1.0", str(tmp_path)).name == "2.1.0"
    with pytest.raises(UserError, match=r"no prepared set in .*pets/large"):
        find_prepared("pets/large", str(tmp_path))
    (tmp_path / "pets" / "small" / "10.0.0" / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError, match=r"stored as tfrecord, which has no random access; .*file_format='array_record'"
    ):
        find_prepared("pets", str(tmp_path))
    for text in ("{", "[]", '{"alternativeFileFormats": 3}'):
        (tmp_path / "pets" / "small" / "10.0.0" / "dataset_info.json").write_text(text)
        with pytest.raises(UserError, match=r"dataset_info\.json cannot be read"):
            find_prepared("pets", str(tmp_path))


@pytest.mark.parametrize(
    "name, text",
    [
        ("oxford_iiit_pet", r"no prepared set in .*oxford_iiit_pet; prepare it once.*download_and_prepare\(\)"),
        ("camvid:7.0.0", r"prepare it with: python -m dynjax\.data\.camvid_tfds"),
        ("../camvid", "write tfds:NAME"),
    ],
)
def test_a_set_that_is_not_there_says_how_to_prepare_it(prepared, name, text):
    with pytest.raises(UserError, match=text):
        make_source(tfds_config(prepared, name), "train")


def test_labels_and_sizes_are_checked(prepared):
    with pytest.raises(UserError, match=r"give --data\.size HEIGHT WIDTH"):
        make_source(tfds_config(prepared), "train")
    with pytest.raises(UserError, match="label 10 in the mask, allowed are 0 to 4"):
        make_source(tfds_config(prepared, classes=5, size=(10, 15)), "train")
    assert make_source(tfds_config(prepared, classes=20, size=(10, 15)), "train").classes[-1] == "class 19"


def test_a_damaged_set_is_one_line(prepared, tmp_path):
    folder = tmp_path / "camvid" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (prepared / "camvid" / "1.0.0").iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(b"\0" * len(content) if "train.array_record" in file.name else content)
    with pytest.raises(UserError, match="tfds:camvid") as caught:
        make_source(tfds_config(tmp_path, size=(10, 15)), "train")
    assert "\n" not in str(caught.value)
    assert len(make_source(tfds_config(tmp_path, size=(10, 15)), "val")) == 3
    (folder / "features.json").write_text("{}")
    with pytest.raises(UserError, match="tfds:camvid"):
        make_source(tfds_config(tmp_path, size=(10, 15)), "val")


@pytest.mark.parametrize("name, handed", [("mnist", True), ("cifar", False)])
def test_sets_of_labels(labelled, name, handed):
    for split, count in (("train", 18), ("val", 2), ("test", 3)):
        source = make_source(tfds_config(labelled, name), split)
        assert source.describe() == f"tfds:{name} {split}: {count} pictures 6x5, 4 classes"
        assert target_of(source.spec) == "label" and source.handed is handed and source.spec["label"].ignored is None
        assert source.classes == ("bird", "cat", "dog", "elk")
        for index in range(count):
            example = source[index]
            assert example["image"].shape == (6, 5, 3) and np.ptp(example["image"]) == 0
            assert example["label"] == example["image"][0, 0, 0] // 10 % 4
    assert len(make_source(tfds_config(labelled, name, examples=7), "train")) == 7
    with pytest.raises(UserError, match="label 3, allowed are 0 to 2"):
        make_source(tfds_config(labelled, name, classes=3), "train")


@pytest.mark.parametrize("name, what", [("twofold", "label"), ("bare", "mask")])
def test_sets_that_are_neither(labelled, name, what):
    with pytest.raises(
        UserError, match=f"no set of pictures with masks or class labels: .* none is clearly the {what}"
    ):
        make_source(tfds_config(labelled, name), "train")


@pytest.mark.parametrize(
    "available, expected",
    [
        (("train", "validation", "test"), ("train", "validation", "test")),
        (("train", "val", "test"), ("train", "val", "test")),
        (("train", "test"), ("train[:90%]", "train[90%:100%]", "test")),
        (("train", "validation"), ("train[:90%]", "train[90%:100%]", "validation")),
        (("train",), ("train[:80%]", "train[80%:90%]", "train[90%:100%]")),
    ],
)
def test_parts_for_splits_that_a_set_lacks(available, expected):
    assert tuple(splits_of(available)[split] for split in SPLITS) == expected
    with pytest.raises(UserError, match="the splits test cannot be used"):
        splits_of(["test"])


def test_preparing_from_a_broken_folder(camvid_folder, tmp_path):
    from dynjax.data.camvid_tfds import prepare

    with pytest.raises(UserError, match="no folder"):
        prepare(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    for split in SPLITS:
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
            for file in (camvid_folder / folder).iterdir():
                (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "val" / "1.png").write_text("no picture")
    with pytest.raises(UserError, match=r"1\.png: not a picture"):
        prepare(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "camvid" / "1.0.0").exists()
