"""Picture and mask move together, nothing is invented, the generator decides; a batch is what its pictures are."""

import numpy as np
import pytest
from made import Made

from dynjax.config import AugmentConfig, UserError
from dynjax.data.augment import Augment, check_augment, colour, crop, cut_out, draw, mean_colour, shift
from dynjax.data.source import Field, picture_spec


def augment(config, size=(24, 36), target="mask", fill=(0, 0, 0)):
    return Augment(config, {k: f for k, f in picture_spec(size, target).items() if f.pixels}, {"image": fill})


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
    change = augment(AugmentConfig(flip=True, crop=0.4, colour=0.0))
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
    for name in ("image", "mask"):
        np.testing.assert_array_equal(crop(source[name], np.array([1.0, 0.0, 0.0])), source[name])


def test_flip_is_exact_and_happens_half_of_the_time():
    source = example()
    change = augment(AugmentConfig(flip=True, crop=1.0, colour=0.0))
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

    def changed(image, most, seed):
        config = AugmentConfig(flip=False, crop=1.0, colour=most)
        return colour(image, draw(config, (4, 4), np.random.default_rng(seed)).colours[0])

    found = [int(changed(image, 0.25, seed)[0, 0, 0]) for seed in range(50)]
    assert 74 <= min(found) < 85 and 115 < max(found) <= 126  # a plain picture has no contrast or saturation to change
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    spread = [np.ptp(changed(red, 0.5, seed)[0, 0].astype(int)) for seed in range(50)]
    assert min(spread) < 120 and max(spread) > 220


def test_all_off_changes_nothing_and_the_generator_decides_the_rest():
    source = example()
    off = augment(AugmentConfig(flip=False, crop=1.0, colour=0.0))(source, np.random.default_rng(0))
    np.testing.assert_array_equal(off["image"], source["image"])
    change = augment(AugmentConfig())
    one, same, other = (change(source, np.random.default_rng(seed))["image"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(source["image"], example()["image"])  # never in place: the source keeps it


def test_shift_is_pad_and_crop():
    image = np.arange(1, 7, dtype=np.uint8).reshape(1, 2, 3)
    still, up_left, down_right = (shift(image, np.array([offset]), 1)[0] for offset in ((1, 1), (2, 2), (0, 0)))
    np.testing.assert_array_equal(still, image[0])
    np.testing.assert_array_equal(up_left, [[5, 6, 0], [0, 0, 0]])
    np.testing.assert_array_equal(down_right, [[0, 0, 0], [0, 1, 2]])
    pair = shift(np.stack([image[0], image[0]])[..., None], np.array([[2, 1], [1, 0]]), 1, fill=9)[..., 0]
    np.testing.assert_array_equal(pair, [[[4, 5, 6], [9, 9, 9]], [[9, 1, 2], [9, 4, 5]]])


def test_cutout_is_a_square_cut_off_at_the_border():
    images = np.full((3, 5, 6, 3), 7, np.uint8)
    changed = cut_out(images, np.array([[2, 2], [0, 0], [4, 5]]), 2, (1, 2, 3))
    for image, square in zip(changed, (np.s_[1:3, 1:3], np.s_[:1, :1], np.s_[3:, 4:]), strict=True):
        expected = np.full((5, 6, 3), 7)
        expected[square] = (1, 2, 3)
        np.testing.assert_array_equal(image, expected)
    assert (images == 7).all()
    odd = cut_out(images[:1], np.array([[2, 2]]), 3, (0, 0, 0))[0, ..., 0]
    assert (odd == 0).sum() == 9 and (odd[1:4, 1:4] == 0).all()


def test_a_mask_is_ignored_where_its_picture_is_padding_and_kept_under_a_cutout():
    source = {"image": np.full((8, 9, 3), 50, np.uint8), "mask": np.arange(72, dtype=np.int32).reshape(8, 9)}
    off = {"flip": False, "crop": 1.0, "colour": 0.0}
    outside, covered = [], []
    for seed in range(20):
        padded = augment(AugmentConfig(**off, pad=3), (8, 9))(source, np.random.default_rng(seed))
        np.testing.assert_array_equal(padded["mask"] == -1, padded["image"][..., 0] == 0)
        outside.append((padded["mask"] == -1).sum())
        cut = augment(AugmentConfig(**off, cutout=4), (8, 9), fill=(1, 2, 3))(source, np.random.default_rng(seed))
        np.testing.assert_array_equal(cut["mask"], source["mask"])
        covered.append((cut["image"] == (1, 2, 3)).all(-1).sum())
    assert 0 <= min(outside) < 20 < max(outside) <= 72 - 5 * 6
    assert 4 <= min(covered) < max(covered) == 16


def batch(count=64):
    return np.random.default_rng(0).integers(1, 256, (count, 8, 9, 3), np.uint8)


def augment_batch(images, config, part=slice(None), seed=0, **options):
    change = augment(AugmentConfig(**config), (8, 9), "label", **options)
    given = {"image": images[part], "label": np.zeros(len(images[part]))}
    return change.batch(given, np.random.default_rng(seed), len(images), part)["image"]


ALL_ON = {"flip": True, "crop": 0.5, "colour": 0.3, "pad": 2, "cutout": 3}
OFF = {"flip": False, "crop": 1.0, "colour": 0.0}


def test_a_batch_is_flipped_shifted_and_cut_picture_by_picture():
    images = batch()
    np.testing.assert_array_equal(augment_batch(images, OFF), images)
    flipped = augment_batch(images, OFF | {"flip": True})
    turned = [(a == b[:, ::-1]).all() for a, b in zip(flipped, images, strict=True)]
    same = [(a == b).all() for a, b in zip(flipped, images, strict=True)]
    assert sum(turned) + sum(same) == 64 and 16 < sum(turned) < 48
    seen = set()
    for image, moved in zip(images, augment_batch(images, OFF | {"pad": 2}), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        places = [(y, x) for y in range(5) for x in range(5) if (padded[y : y + 8, x : x + 9] == moved).all()]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 15  # of 25
    cut = augment_batch(images, OFF | {"cutout": 4}, fill=(0, 0, 0))
    assert {int((image == 0).all(-1).sum()) for image in cut} >= {16, 8}
    np.testing.assert_array_equal(np.where(cut == 0, images, cut), images)


def test_parts_of_a_batch_change_as_the_whole():
    images = batch(12)
    whole = augment_batch(images, ALL_ON)
    assert whole.shape == images.shape and whole.dtype == np.uint8 and (whole != images).any((1, 2, 3)).all()
    for p in range(3):
        part = slice(p, None, 3)
        np.testing.assert_array_equal(augment_batch(images, ALL_ON, part), whole[part])
    assert (augment_batch(images, ALL_ON, seed=1) != whole).any((1, 2, 3)).all()
    np.testing.assert_array_equal(images, batch(12))  # never in place


def test_the_mean_colour_of_a_source():
    images = np.zeros((10, 2, 2, 3), np.uint8)
    images[::2] = (10, 20, 200)
    source = Made(10, {"image": Field((2, 2, 3), np.uint8, "picture", 0)}, lambda index: {"image": images[index]})
    assert mean_colour(source, "image") == (5, 10, 100)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"crop": 0.0}, "crop=0.0"),
        ({"crop": 1.1}, "crop=1.1"),
        ({"colour": -0.1}, "colour=-0.1"),
        ({"pad": -1}, "pad=-1: pictures of 24x36 allow 0 to 23"),
        ({"pad": 24}, "pad=24"),
        ({"cutout": 24}, "cutout=24: pictures of 24x36 allow 0 to 23"),
    ],
)
def test_bad_values(wrong, text):
    with pytest.raises(UserError, match=text):
        check_augment(AugmentConfig(**wrong), (24, 36))
