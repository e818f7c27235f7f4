"""Few labels: which pictures keep theirs, what goes with them, and what a point or a scribble leaves of a mask."""

import numpy as np
import pytest
from made import Made
from skimage.measure import label

from dynjax.config import AugmentConfig, DataConfig, UserError
from dynjax.data import few, make_loader, make_source, pairs
from dynjax.data.source import input_of, picture_spec, read, target_of
from dynjax.data.weak import weaken


def numbered(count=16):
    """Picture i is grey i, its mask class i % 3."""

    def example(index):
        return {"image": np.full((4, 6, 3), index, np.uint8), "mask": np.full((4, 6), index % 3, np.int32)}

    return Made(count, picture_spec((4, 6), "mask", 255), example)


def greys(source, key="image"):
    return [int(source[index][key][0, 0, 0]) for index in range(len(source))]


@pytest.mark.parametrize("wanted", ["1/8", "46", "3/4", "1", "2/2"])
def test_shares_and_numbers(wanted):
    assert few.is_wanted(wanted)


@pytest.mark.parametrize("wanted", ["", "0", "0/8", "9/8", "1/0", "0.125", "-1", "1/", "/8", "1/8/2", "all"])
def test_what_is_neither(wanted):
    assert not few.is_wanted(wanted)
    with pytest.raises(UserError, match="it must be a share of the training pictures such as 1/8"):
        few.labelled(numbered(), wanted, 0)


def test_each_picture_is_on_one_side_and_fewer_are_among_more():
    source = numbered()
    marked, bare = few.labelled(source, "1/4", 0)
    assert len(marked) == 4 and sorted(greys(marked) + greys(bare)) == list(range(16))
    assert greys(few.labelled(source, "4", 0)[0]) == greys(marked)
    assert set(greys(few.labelled(source, "1/8", 0)[0])) < set(greys(marked))
    assert greys(few.labelled(source, "1/4", 1)[0]) != greys(marked)
    assert len(few.labelled(source, "1/100", 0)[0]) == 1
    assert all((marked[i]["mask"] == grey % 3).all() for i, grey in enumerate(greys(marked)))
    assert all((read(bare, i)["mask"] == -1).all() for i in range(12))
    assert marked.describe() == "made: 16 examples; 4 of 16 labelled" and marked.seen is None
    assert few.chosen(marked)[0] == f"{greys(marked)[0]} example {greys(marked)[0]}" and few.chosen(source) == ()
    with pytest.raises(UserError, match=r"data\.labelled=17: made: 16 examples: there are no more than 16"):
        few.labelled(source, "17", 0)


def test_make_source_leaves_the_others_out_of_training_alone():
    config = DataConfig(name="digits8", size=(8, 8), labelled="1/10")
    train = make_source(config, "train")
    assert len(train) == 108 and len(make_source(config, "val")) == 360
    assert train[0]["label"] >= 0 and next(iter(make_loader(train, 8, seed=0, augment=AugmentConfig())))
    assert few.chosen(train) == few.chosen(make_source(config, "train")) != few.chosen(make_source(config, "train", 1))
    _, bare = few.labelled(make_source(DataConfig(name="digits8", size=(8, 8)), "train"), "1/10", 0)
    assert {int(bare[index]["label"]) for index in range(5)} == {-1}


@pytest.mark.parametrize("wanted", ["1/4", "3/4"])
def test_labelled_pictures_with_others_beside_them(wanted):
    marked, bare = few.labelled(numbered(), wanted, 0)
    both = few.WithUnlabelled(marked, bare, seed=0)
    assert len(both) == 12 and both.spec["unlabelled"] == both.spec["image"]
    assert (input_of(both.spec), target_of(both.spec)) == ("image", "mask")
    assert set(greys(both)) == set(greys(marked)) and set(greys(both, "unlabelled")) == set(greys(bare))
    assert greys(both, "unlabelled") != greys(few.WithUnlabelled(marked, bare, seed=1), "unlabelled")
    assert few.chosen(both) == few.chosen(marked) and both.name_of(len(marked)) == marked.name_of(0)
    with pytest.raises(IndexError):
        both[12]
    batches = [
        [next(iter(make_loader(both, 4, seed=0, augment=AugmentConfig(colour=0.0), **each)))["unlabelled"]]
        for each in ({}, dict(process_count=2), dict(process_count=2, process_index=1))
    ]
    np.testing.assert_array_equal(batches[0][0], np.concatenate([batches[1][0], batches[2][0]]))
    with pytest.raises(UserError, match="no picture is unlabelled"):
        few.WithUnlabelled(*few.labelled(numbered(), "1/1", 0))


def test_windows_of_the_two_are_drawn_apart():
    def read(index):
        rows, columns = np.indices((20, 20))
        return np.stack([rows, columns, rows], -1).astype(np.uint8), np.full((20, 20), index % 2, np.uint8)

    found = pairs.Pairs(read, 4, ("a", "b"), target="mask", ignored=255)
    from dynjax.data.windows import cut

    source = cut(pairs.check_pairs(found, DataConfig(name="some", crop=(8, 8)), "train"), (8, 8))
    both = few.WithUnlabelled(*few.labelled(source, "1/2", 0))
    drawn = [both.draw(0, np.random.default_rng(seed)) for seed in range(8)]
    assert {each["image"].shape for each in drawn} == {(8, 8, 3)} == {each["unlabelled"].shape for each in drawn}
    for key in ("image", "unlabelled"):
        assert len({each[key].tobytes() for each in drawn}) > 4
    assert any((each["image"] != each["unlabelled"]).any() for each in drawn)
    again = both.draw(0, np.random.default_rng(3))
    assert all((again[key] == drawn[3][key]).all() for key in again)


# Weak labels


def regions():
    """Two squares of class 1 on class 0, a speck of class 2 and a speck of class 1, a band that is ignored."""
    mask = np.zeros((60, 80), np.uint8)
    mask[5:25, 5:25] = mask[30:55, 40:75] = 1
    mask[2, 70] = 2
    mask[27, 70] = 1
    mask[:, 30:33] = 255
    return mask


@pytest.mark.parametrize("kind", ["points", "scribbles"])
def test_a_region_keeps_a_point_or_a_scribble(kind):
    mask = regions()
    weak = weaken(mask, kind, 255, np.random.default_rng(0))
    left = weak != 255
    np.testing.assert_array_equal(weak[left], mask[left])
    assert set(np.unique(weak)) == {0, 1, 2, 255} and left.mean() < (0.02 if kind == "points" else 0.15)
    assert (
        label(weak == 1).max() == 2 and not left[27, 70]
    )  # the speck of class 1 is too small, that of 2 is all it has
    if kind == "points":
        assert (weak == 1).sum() == 2 * 13
        assert (weak[5 + 3 : 25 - 3, 5 + 3 : 25 - 3] == 1).sum() == 13  # well inside
    np.testing.assert_array_equal(weak, weaken(mask, kind, 255, np.random.default_rng(0)))
    assert (weak != weaken(mask, kind, 255, np.random.default_rng(1))).any()


def test_masks_of_training_alone_are_weak():
    found = pairs.Pairs(
        lambda index: (np.zeros((60, 80, 3), np.uint8), regions()), 2, ("a", "b", "c"), target="mask", ignored=255
    )
    config = DataConfig(name="some", weak="points")
    train, val = (pairs.check_pairs(found, config, split) for split in ("train", "val"))
    assert (train[0]["mask"] != 255).sum() < 60 and (train[0]["mask"] != train[1]["mask"]).any()
    np.testing.assert_array_equal(val[0]["mask"], regions())
    np.testing.assert_array_equal(train[1]["mask"], train.read(1)[1])  # read again it is the same
    with pytest.raises(UserError, match=r"data\.weak=points: data\.name=digits has no masks from files"):
        make_source(DataConfig(name="digits", examples=20, weak="points"), "train")
    with pytest.raises(UserError, match=r"data\.weak='dots'"):
        weaken(regions(), "dots", 255, np.random.default_rng(0))
