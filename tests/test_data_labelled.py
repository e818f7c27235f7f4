"""Sources of one label: scikit-learn's digits, and what all that come as arrays share."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dynjax.config import DataConfig, UserError
from dynjax.data import make_source
from dynjax.data.labelled import part_of, with_labels
from dynjax.data.pairs import check_pairs
from dynjax.data.source import size_of, target_of

SPLITS = ("train", "val", "test")


def digits8(split="train", **options):
    return make_source(DataConfig(name="digits8", **options), split)


def labels_of(source):
    return np.array([source[i]["label"] for i in range(len(source))])


def test_the_embedded_digits():
    source = digits8()
    assert source.describe() == "digits8 train: 1078 pictures 8x8, 10 classes"
    assert (
        target_of(source.spec) == "label"
        and source.handed
        and size_of(source) == (8, 8)
        and source.spec["label"].ignored is None
    )
    assert source.name == "digits8" and source.split == "train" and source.classes == tuple("0123456789")
    example = source[5]
    assert example.keys() == {"image", "label"}
    assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.uint8
    assert isinstance(example["label"], np.int32)
    assert max(source[i]["image"].max() for i in range(10)) == 255  # 16 is full ink
    with pytest.raises(IndexError):
        source[1078]


def test_every_digit_is_in_one_split_with_its_label():
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pictures = {np.repeat(g[..., None], 3, 2).tobytes(): label for g, label in zip(grey, digits.target, strict=True)}
    assert len(pictures) == 1797  # no two are equal
    for split in SPLITS:
        source = digits8(split)
        for index in range(len(source)):
            example = source[index]
            assert pictures.pop(example["image"].tobytes()) == example["label"]
    assert not pictures


def test_splits_are_stratified_and_fixed():
    of_class = np.bincount(load_digits().target)
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        source = digits8(split)
        assert np.abs(np.bincount(labels_of(source)) - share * of_class).max() <= 1
        assert (labels_of(source) == labels_of(digits8(split))).all()
    assert len({labels_of(digits8(split))[:20].tobytes() for split in SPLITS}) == 3


def test_sizes_and_fewer_examples():
    source = digits8(size=(16, 20), examples=100)
    assert len(source) == 100 and source[0]["image"].shape == (16, 20, 3)
    assert np.unique(labels_of(source)).size == 10
    assert len(digits8("val", examples=100)) == 360  # training examples only
    assert len(digits8(examples=5000)) == 1078
    with pytest.raises(UserError, match=r"data\.examples=0"):
        digits8(examples=0)
    with pytest.raises(UserError, match=r"data\.size=\(0, 8\)"):
        digits8(size=(0, 8))


@pytest.mark.parametrize(
    "train, expected", [(60000, (55000, 5000)), (50000, (45000, 5000)), (200, (180, 20)), (5, (5, 0))]
)
def test_val_is_the_end_of_train(train, expected):
    counts = {"train": train, "val": train, "test": 70}
    parts = {split: range(10**6)[part_of(split, counts[split])] for split in SPLITS}
    assert (len(parts["train"]), len(parts["val"])) == expected
    assert [*parts["train"], *parts["val"]] == list(range(train)) and parts["test"] == range(70)


def labelled(images, labels, **options):
    pairs = with_labels(images, labels, ("a", "b"), handed=False)
    return check_pairs(pairs, DataConfig(name="some", **options), "train")


def test_arrays_grey_and_colour():
    images = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    source = labelled(images, np.array([0, 1, 1], np.uint8))
    np.testing.assert_array_equal(source[2]["image"], images[2])
    assert labels_of(source).tolist() == [0, 1, 1]
    grey = labelled(images[..., 0], np.array([0, 1, 1], np.uint8))[1]["image"]
    assert grey.shape == (4, 5, 3) and (grey == images[1, ..., :1]).all()
    assert len(labelled(np.zeros((9, 2, 2), np.uint8), np.zeros(9, np.uint8), examples=4)) == 4


def test_labels_outside_the_classes():
    images, labels = np.zeros((4, 2, 2), np.uint8), np.array([0, 2, -1, 1])
    with pytest.raises(UserError, match="2 bad files: example 1: label 2, allowed are 0 to 1; example 2: label -1"):
        labelled(images, labels)
    source = labelled(images, labels, on_error="skip")
    assert labels_of(source).tolist() == [0, 1] and source.skipped == 2 and "2 skipped" in source.describe()
