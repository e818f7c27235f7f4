"""Batches: every example once a pass, the same stream from the same seed, resumed and shared exactly."""

import dataclasses

import numpy as np
import pytest
from made import Made

from dynjax.config import AugmentConfig, DataConfig, UserError
from dynjax.data import calibration_batches, make_loader, make_source
from dynjax.data.source import picture_spec


def numbered(count, ignored=200):
    """Picture i is plain grey i; the first column of every mask is ignored."""

    def example(index):
        mask = np.full((6, 8), 3, np.int32)
        mask[:, 0] = 200
        return {"image": np.full((6, 8, 3), index, np.uint8), "mask": mask}

    return Made(count, picture_spec((6, 8), "mask", ignored), example)


def labelled(count):
    """Picture i is plain grey i + 1, its label 100 + i."""

    def example(index):
        return {"image": np.full((6, 8, 3), index + 1, np.uint8), "label": np.int32(100 + index)}

    return Made(count, picture_spec((6, 8), "label"), example)


def numbers(batch):
    return batch["image"][:, 0, 0, 0].tolist()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_batch():
    batch = next(iter(make_loader(numbered(5), 4, seed=0, augment=None)))
    assert batch.keys() == {"image", "mask"}
    assert batch["image"].shape == (4, 6, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["mask"].shape == (4, 6, 8) and batch["mask"].dtype == np.int32
    assert (batch["mask"][:, :, 0] == -1).all() and (batch["mask"][:, :, 1:] == 3).all()
    batch = next(iter(make_loader(numbered(5, ignored=None), 4, seed=0, augment=None)))
    assert (batch["mask"][:, :, 0] == 200).all()


def test_every_pass_has_all_examples_in_its_own_order():
    def read(seed):
        batches = take(iter(make_loader(numbered(10), 4, seed=seed, augment=None)), 5)
        return np.concatenate([numbers(batch) for batch in batches]).tolist()

    stream = read(seed=0)
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:] and stream[:10] != list(range(10))
    assert stream == read(seed=0) != read(seed=1)


@pytest.mark.parametrize("kind", [numbered, labelled])
@pytest.mark.parametrize("taken", [0, 1, 7])
def test_resumes_at_the_exact_batch(taken, kind):
    def start():
        return iter(make_loader(kind(10), 4, seed=2, augment=AugmentConfig(pad=2, cutout=3)))

    iterator = start()
    take(iterator, taken)
    state = iterator.get_state()
    expected = take(iterator, 4)
    fresh = start()
    take(fresh, 2)  # wherever it was
    fresh.set_state(state)
    assert_same(take(fresh, 4), expected)
    iterator.set_state(state)  # and back
    assert_same(take(iterator, 4), expected)


def test_a_pass_without_repeat_is_filled_up():
    batches = list(make_loader(numbered(10), 4, seed=0, augment=None, shuffle=False, repeat=False))
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert batches[0]["valid"].dtype == np.bool_
    assert (batches[2]["mask"][2:] == -1).all() and (batches[2]["image"][2:] == 0).all()
    even = list(make_loader(numbered(8), 4, seed=0, augment=None, shuffle=False, repeat=False))
    assert len(even) == 2 and all(batch["valid"].all() for batch in even)
    small = list(make_loader(numbered(2), 4, seed=0, augment=None, shuffle=False, repeat=False))
    assert [batch["valid"].tolist() for batch in small] == [[True, True, False, False]]
    mixed = list(make_loader(numbered(10), 4, seed=0, augment=None, repeat=False))
    assert sorted(n for b in mixed for n, v in zip(numbers(b), b["valid"], strict=True) if v) == list(range(10))


@pytest.mark.parametrize("kind", [numbered, labelled])
@pytest.mark.parametrize("repeat", [True, False])
def test_processes_share_the_batches_of_one(repeat, kind):
    options = {"seed": 5, "augment": AugmentConfig(pad=2, cutout=3), "repeat": repeat}
    count = 6 if repeat else 3  # without repeat, all there are
    whole = take(iter(make_loader(kind(10), 4, **options)), count)
    halves = [
        take(iter(make_loader(kind(10), 4, **options, process_index=p, process_count=2)), count) for p in range(2)
    ]
    for batch, left, right in zip(whole, *halves, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([left[key], right[key]]))


def test_noise_differs_between_passes_and_digits_are_never_mirrored():
    source = make_source(DataConfig(examples=1, size=(48, 48)), "train")
    original = source[0]
    flips = AugmentConfig(flip=True, crop=1.0, colour=0.0)
    for batch in take(iter(make_loader(source, 1, seed=0, augment=flips)), 8):
        np.testing.assert_array_equal(batch["image"][0], original["image"])
    noisy = take(iter(make_loader(source, 1, seed=0, augment=AugmentConfig())), 3)
    assert (noisy[0]["image"] != noisy[1]["image"]).any() and (noisy[1]["image"] != noisy[2]["image"]).any()


def test_batches_of_labels():
    batch = next(iter(make_loader(labelled(5), 4, seed=0, augment=None)))
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (4, 6, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
    assert [n + 99 for n in numbers(batch)] == batch["label"].tolist()
    stream = np.concatenate([numbers(b) for b in take(iter(make_loader(labelled(10), 4, seed=0, augment=None)), 5)])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(1, 11))
    assert stream[:10].tolist() != stream[10:].tolist() and stream[:10].tolist() != list(range(1, 11))


def test_a_pass_of_labels_is_filled_up():
    batches = list(make_loader(labelled(10), 4, seed=0, augment=None, shuffle=False, repeat=False))
    assert [numbers(batch) for batch in batches] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert batches[0]["valid"].dtype == np.bool_ and batches[2]["label"].tolist() == [108, 109, -1, -1]
    small = list(make_loader(labelled(2), 4, seed=0, augment=None, repeat=False))
    assert len(small) == 1 and sorted(small[0]["label"].tolist()) == [-1, -1, 100, 101]


def test_pictures_of_characters_are_never_mirrored_and_the_source_is_never_changed():
    source = make_source(DataConfig(name="digits8", examples=1), "train")
    image = source[0]["image"].copy()
    flips = AugmentConfig(flip=True, crop=1.0, colour=0.0)
    for batch in take(iter(make_loader(source, 1, seed=0, augment=flips)), 8):
        np.testing.assert_array_equal(batch["image"][0], image)
    mirrored = dataclasses.replace(source, handed=False)
    found = {b["image"].tobytes() for b in take(iter(make_loader(mirrored, 1, seed=0, augment=flips)), 16)}
    assert found == {image.tobytes(), image[:, ::-1].tobytes()}
    noisy = take(iter(make_loader(source, 1, seed=0, augment=AugmentConfig(pad=1, cutout=2))), 3)
    assert (noisy[0]["image"] != noisy[1]["image"]).any() and (noisy[1]["image"] != noisy[2]["image"]).any()
    np.testing.assert_array_equal(source[0]["image"], image)


def test_a_cutout_takes_the_mean_colour():
    config = AugmentConfig(flip=False, crop=1.0, colour=0.0, cutout=3)
    for batch in (next(iter(make_loader(kind(9), 4, seed=0, augment=config))) for kind in (labelled, numbered)):
        first = 1 if "label" in batch else 0
        for image in batch["image"][..., 0]:
            values, counts = np.unique(image, return_counts=True)
            assert 4 + first in values and len(values) <= 2  # the mean of 9 pictures
            assert len(values) == 1 or 4 <= counts[values == 4 + first][0] <= 9


def test_calibration_examples_come_from_all_over_the_source():
    batches = calibration_batches(numbered(100), 4, 5)
    assert len(batches) == 5 and all(b["image"].shape == (4, 6, 8, 3) and b["image"].dtype == np.uint8 for b in batches)
    assert all(b.keys() == {"image", "mask"} and (b["mask"][:, :, 0] == -1).all() for b in batches)
    found = [numbers(b) for b in batches]
    assert sorted(np.concatenate(found).tolist()) == list(range(0, 100, 5))
    assert all(max(f) - min(f) > 50 for f in found)
    short = [numbers(b) for b in calibration_batches(numbered(3), 2, 4)]
    assert {n for f in short for n in f} == {0, 1, 2}
    labels = calibration_batches(labelled(8), 2, 2)
    assert [numbers(b) for b in labels] == [[1, 5], [3, 7]]
    assert [b["label"].tolist() for b in labels] == [[100, 104], [102, 106]]
    with pytest.raises(UserError, match="calibration needs examples: 0 in the source"):
        calibration_batches(numbered(0), 2, 4)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5 cannot be shared equally by 2"),
        ({"seed": -1}, "seed=-1"),
        ({"augment": AugmentConfig(crop=2.0)}, "crop=2.0"),
        ({"augment": AugmentConfig(pad=6)}, "pad=6: pictures of 6x8 allow 0 to 5"),
    ],
)
def test_bad_values(options, text):
    options = {"batch_size": 4, "seed": 0, "augment": None, **options}
    with pytest.raises(UserError, match=text):
        make_loader(numbered(10), options.pop("batch_size"), **options)


@pytest.mark.parametrize("kind", [numbered, labelled])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (2, 2)])
def test_resumes_on_another_number_of_processes(kind, before, after):
    """Three batches read by so many processes and three by so many others are the six of one, example by example."""

    def read(processes, count, state=0):
        options = {"seed": 3, "augment": AugmentConfig(pad=2, cutout=3), "process_count": processes}
        parts = [iter(make_loader(kind(10), 8, **options, process_index=index)) for index in range(processes)]
        for part in parts:
            part.set_state(state)
        batches = [[next(part) for part in parts] for _ in range(count)]
        states = {part.get_state() for part in parts}
        assert len(states) == 1
        return [{k: np.concatenate([p[k] for p in parts]) for k in parts[0]} for parts in batches], states.pop()

    first, state = read(before, 3)
    second, state = read(after, 3, state)
    assert state == 6
    assert_same(first + second, read(1, 6)[0])
