"""Flip, crop and colour: picture and mask move together, nothing is invented, the generator decides."""

import numpy as np
import pytest

from dynjax.config import AugmentConfig, UserError
from dynjax.data.augment import Augment, check_augment, random_colour, random_crop


def example(height=24, width=36):
    """Every 6x6 block has one grey level and one label, a tenth of it; blocks of levels 0, 70, 140, 210 are ignored."""
    blocks = np.arange(24).reshape(4, 6)[: height // 6, : width // 6]
    level = np.kron(blocks * 10, np.ones((6, 6), int))
    mask = np.where(level % 70 == 0, -1, level // 10).astype(np.int32)
    return {"image": np.repeat(level[..., None], 3, axis=2).astype(np.uint8), "mask": mask}


def agree(image, mask, source):
    """Share of pixels whose grey level belongs to their label."""
    level = image[..., 0].astype(int)
    expected = np.where(mask >= 0, mask * 10, level)
    ignored = np.isin(np.round(level / 10) * 10, np.unique(source["image"][source["mask"] < 0]))
    return np.mean(np.where(mask >= 0, np.abs(level - expected) <= 1, ignored))


@pytest.mark.parametrize("seed", range(5))
def test_picture_and_mask_move_together(seed):
    source = example()
    change = Augment(AugmentConfig(flip=True, crop=0.4, colour=0.0))
    changed = change(source, np.random.default_rng(seed))
    assert changed["image"].shape == source["image"].shape and changed["image"].dtype == np.uint8
    assert changed["mask"].shape == source["mask"].shape and changed["mask"].dtype == np.int32
    assert changed["image"].flags.c_contiguous and changed["mask"].flags.c_contiguous
    assert set(np.unique(changed["mask"])) <= set(np.unique(source["mask"]))
    assert agree(changed["image"], changed["mask"], source) > 0.7  # but for blurred borders between blocks
    shuffled = np.random.default_rng(0).permutation(changed["mask"].ravel()).reshape(changed["mask"].shape)
    assert agree(changed["image"], shuffled, source) < 0.5  # the measure can tell


def test_the_whole_picture_is_a_crop_that_changes_nothing():
    source = example()
    image, mask = random_crop(source["image"], source["mask"], 1.0, np.random.default_rng(0))
    np.testing.assert_array_equal(image, source["image"])
    np.testing.assert_array_equal(mask, source["mask"])


def test_flip_is_exact_and_happens_half_of_the_time():
    source = example()
    change = Augment(AugmentConfig(flip=True, crop=1.0, colour=0.0))
    flipped = 0
    for seed in range(40):
        changed = change(source, np.random.default_rng(seed))
        turn = np.s_[:, ::-1] if (changed["mask"] != source["mask"]).any() else np.s_[:, :]
        flipped += turn != np.s_[:, :]
        np.testing.assert_array_equal(changed["image"], source["image"][turn])
        np.testing.assert_array_equal(changed["mask"], source["mask"][turn])
    assert 10 < flipped < 30


def test_colour_stays_within_its_bounds():
    image = np.full((4, 4, 3), 100, np.uint8)
    found = [int(random_colour(image, 0.25, np.random.default_rng(seed))[0, 0, 0]) for seed in range(50)]
    assert 74 <= min(found) < 85 and 115 < max(found) <= 126  # a plain picture has no contrast or saturation to change
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    spread = [np.ptp(random_colour(red, 0.5, np.random.default_rng(seed))[0, 0].astype(int)) for seed in range(50)]
    assert min(spread) < 120 and max(spread) > 220


def test_all_off_changes_nothing_and_the_generator_decides_the_rest():
    source = example()
    off = Augment(AugmentConfig(flip=False, crop=1.0, colour=0.0))(source, np.random.default_rng(0))
    np.testing.assert_array_equal(off["image"], source["image"])
    change = Augment(AugmentConfig())
    one, same, other = (change(source, np.random.default_rng(seed))["image"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(source["image"], example()["image"])  # never in place: the source keeps it


@pytest.mark.parametrize(
    "wrong, text", [({"crop": 0.0}, "crop=0.0"), ({"crop": 1.1}, "crop=1.1"), ({"colour": -0.1}, "colour=-0.1")]
)
def test_bad_values(wrong, text):
    with pytest.raises(UserError, match=text):
        check_augment(AugmentConfig(**wrong))
