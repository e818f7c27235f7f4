"""Windows: in training one of each picture that is drawn, elsewhere such that every pixel counts once."""

import dataclasses

import numpy as np
import pytest
from made import Made

from dynjax.config import AugmentConfig, DataConfig, LossConfig, UserError
from dynjax.data import make_loader, make_source, pairs, windows
from dynjax.data.source import Field, calibration_batches, read, size_of
from dynjax.tasks import make_task
from dynjax.tasks.segmentation import class_frequencies
from experiments.rows import get_row

SIZES = ((7, 11), (23, 9), (16, 16), (5, 6), (40, 33))
CROP = (8, 10)


def picture(index):
    """Every pixel says where it is, from 1 on; its class follows from that, and one in seven is ignored."""
    rows, columns = np.indices(SIZES[index])
    image = np.stack([rows + 1, columns + 1, np.full(SIZES[index], index + 1)], -1).astype(np.uint8)
    mask = (rows + columns) % 7
    return image, np.where(mask == 6, 255, mask % 3).astype(np.uint8)


def whole(split, **options):
    config = DataConfig(name="some", crop=CROP, **options)
    found = pairs.Pairs(picture, len(SIZES), ("a", "b", "c"), target="mask", ignored=255)
    return pairs.check_pairs(found, config, split)


def put_together(source):
    """Masks of whole pictures from all windows, and how often each pixel counts."""
    masks, counts = ([np.zeros(size, int) for size in SIZES] for _ in range(2))
    for index in range(len(source)):
        example = read(source, index)
        places = np.argwhere(example["mask"] >= 0)
        for y, x in places:
            row, column, number = example["image"][y, x].astype(int) - 1
            masks[number][row, column] = example["mask"][y, x]
            counts[number][row, column] += 1
    return masks, counts


def test_every_pixel_counts_once_and_in_its_own_place():
    source = windows.cut(whole("val"), CROP)
    masks, counts = put_together(source)
    for index, (mask, count) in enumerate(zip(masks, counts, strict=True)):
        wanted = picture(index)[1]
        np.testing.assert_array_equal(count, wanted != 255)
        np.testing.assert_array_equal(mask[count > 0], wanted[count > 0])
    assert size_of(source) == CROP and source.spec["image"].shape == (*CROP, 3) and source.spec["mask"].shape == CROP
    assert source.describe() == "some val: 5 pictures of 5 sizes, 3 classes; 30 windows of 8x10"
    assert len(source) == 30 and source.seen == {0, 1, 2}


@pytest.mark.parametrize("size", [(1, 1), (8, 10), (9, 10), (15, 21), (16, 20), (17, 99), (100, 3)])
def test_windows_lie_inside_and_a_pixel_belongs_to_the_nearest_middle(size):
    grid = windows.grid(size, CROP)
    owners = np.full(size, -1)
    for number, window in enumerate(grid):
        assert (owners[window.rows, window.columns] == -1).all()
        owners[window.rows, window.columns] = number
        for start, side, span in ((window.top, size[0], 8), (window.left, size[1], 10)):
            assert start == 0 or start + span <= side
    assert (owners >= 0).all() and len(grid) == -(-size[0] // 8) * -(-size[1] // 10)
    middles = np.array([(window.top + 3.5, window.left + 4.5) for window in grid])
    for y, x in np.ndindex(size):
        distances = np.abs(middles - (y, x))
        assert (distances[owners[y, x]] <= distances.min(0)).all()


def test_a_picture_smaller_than_the_window_is_padded():
    source = windows.cut(whole("val"), CROP)
    small = next(read(source, i) for i in range(len(source)) if source[i]["image"][0, 0, 2] == 4)  # 5x6
    assert (small["image"][5:] == 0).all() and (small["image"][:, 6:] == 0).all()
    assert (small["mask"][5:] == -1).all() and (small["mask"][:, 6:] == -1).all()
    np.testing.assert_array_equal(small["image"][:5, :6], picture(3)[0])


def test_training_windows_are_drawn_anywhere_with_their_masks():
    source = windows.cut(whole("train"), CROP)
    assert len(source) == 5 and source.describe().endswith("5 sizes, 3 classes; a window of 8x10")
    seen = set()
    for seed in range(200):
        example = read(source, seed % 5, np.random.default_rng(seed))
        inside = example["image"][..., 2] > 0
        assert inside.sum() == min(8, SIZES[seed % 5][0]) * min(10, SIZES[seed % 5][1])
        rows, columns = example["image"][inside][:, :2].astype(int).T - 1
        wanted = picture(seed % 5)[1].astype(int)
        wanted[wanted == 255] = -1
        np.testing.assert_array_equal(example["mask"][inside], wanted[rows, columns])
        assert (example["mask"][~inside] == -1).all()
        seen.add((seed % 5, rows[0], columns[0], *np.argwhere(inside)[0]))
    assert len(seen) > 90  # of 200
    same, again = (source[4]["image"] for _ in range(2))
    np.testing.assert_array_equal(same, again)
    assert [source.name_of(index) for index in (0, 4)] == ["example 0", "example 4"]


def test_a_pass_has_its_own_windows_whatever_the_number_of_processes():
    source, off = windows.cut(whole("train"), CROP), AugmentConfig(flip=False, crop=1.0, colour=0.0)

    def batches(count, **options):
        stream = iter(make_loader(source, 4, seed=3, augment=off, **options))
        return [next(stream) for _ in range(count)]

    one = batches(5)
    parts = [batches(5, process_index=index, process_count=2) for index in range(2)]
    for batch, *halves in zip(one, *parts, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([half[key] for half in halves]))
    drawn = [image for batch in one for image in batch["image"] if image[..., 2].max() == 5]
    assert len(drawn) == 4 and len({image.tobytes() for image in drawn}) == 4
    stream = iter(make_loader(source, 4, seed=3, augment=off))
    stream.set_state(3)
    np.testing.assert_array_equal(next(stream)["image"], one[3]["image"])
    changed = next(iter(make_loader(source, 4, seed=3, augment=AugmentConfig(crop=0.7))))
    assert changed["image"].shape == (4, *CROP, 3) and (changed["image"] != one[0]["image"]).any()
    # Nothing is drawn for an evaluation.
    plain = make_loader(source, 4, seed=0, augment=None, shuffle=False, repeat=False)
    np.testing.assert_array_equal(next(iter(plain))["image"][1], source[1]["image"])


def test_a_large_split_is_read_again_instead_of_kept(monkeypatch):
    kept = whole("val")
    monkeypatch.setattr(pairs, "KEEP_BYTES", 4 * 1000)
    streamed = whole("val")
    assert len(kept.memory[0]) == 5 and streamed.memory is None
    one, other = windows.cut(kept, CROP), windows.cut(streamed, CROP)
    for index in range(len(one)):
        for key in ("image", "mask"):
            np.testing.assert_array_equal(one[index][key], other[index][key])


def test_a_size_comes_before_the_windows():
    source = windows.cut(whole("test", size=(20, 20)), CROP)
    assert len(source) == 5 * 3 * 2 and set(source.sizes) == {(20, 20)}


def test_what_else_looks_at_a_source_takes_windows():
    source = windows.cut(whole("val"), CROP)
    (batch,) = calibration_batches(source, 4, 1)
    assert batch["image"].shape == (4, *CROP, 3)
    every = np.concatenate([picture(index)[1].ravel() for index in range(5)])
    shares = np.bincount(every[every != 255]) / (every != 255).sum()
    np.testing.assert_allclose(class_frequencies(source), shares)


def test_windows_without_a_label_have_no_class_weights():
    def read(index):
        mask = np.full((40, 40), 255, np.uint8)
        mask[0, index] = index
        return np.zeros((40, 40, 3), np.uint8), mask

    config = DataConfig(name="some", crop=CROP)
    found = pairs.Pairs(read, 2, ("a", "b"), target="mask", ignored=255)
    source = windows.cut(pairs.check_pairs(found, config, "train"), CROP)
    row = dataclasses.replace(get_row("my_static"), data=config)
    with pytest.raises(UserError, match=r"some train: 2 pictures 40x40, .*: every pixel .*--loss\.class-weights none"):
        make_task(row, source)
    assert make_task(dataclasses.replace(row, loss=LossConfig()), source).class_weights is None


def test_windows_of_every_source_with_masks_and_of_no_other():
    scenes = make_source(DataConfig(name="digits", examples=20, crop=(50, 60)), "val")
    assert len(scenes) == 2 * 4 and scenes[0]["image"].shape == (50, 60, 3)
    with pytest.raises(UserError, match=r"data\.crop=\(4, 4\): windows .* data\.name=digits8 has for each a label and"):
        make_source(DataConfig(name="digits8", crop=(4, 4)), "train")
    film = Made(2, {"film": Field((3, 8, 8, 3), np.uint8, "film", 0)}, lambda index: {})
    with pytest.raises(UserError, match="has for each a film"):
        windows.cut(film, CROP)
