"""Windows of a picture: what is the same in every window comes back as it was, and no more than a band is in memory."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from dynjax.run import mosaic
from experiments import deployed

SHAPES = [(23, 31), (31, 23), (16, 12), (16, 40), (40, 12), (5, 7), (3, 40), (40, 3), (17, 13), (1, 1)]
SIZE = (16, 12)


def picture(height, width):
    return np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pointwise(window):
    """Every pixel for itself."""
    logits = np.stack([window[..., 0] / 60, window[..., 1] / 90, window[..., 2] / 50], -1).astype(np.float32)
    likely = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heat = window[..., 0].astype(np.float32)
    return likely, heat, float(heat.sum())


def by_place(window):
    """Depends on where in the window a pixel is."""
    likely, heat, macs = pointwise(window)
    away = np.linspace(0, 1, likely.shape[1], dtype=np.float32)[None, :, None]
    return likely * (1 - away) + away / 3, heat, macs


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.3, 0.75])
@pytest.mark.parametrize(("length", "side"), [(1, 1), (9, 4), (10, 10), (11, 10), (100, 7), (37, 16), (3, 10)])
def test_windows_cover_all_and_their_weights_sum_to_one(length, side, overlap):
    places = mosaic.starts(length, side, overlap)
    assert places[0] == 0 and places[-1] == max(length - side, 0)
    steps = np.diff(places)
    assert (steps > 0).all() and (steps <= max(1, side * (1 - overlap))).all()
    total = np.zeros(max(length, side))
    for place, weights in zip(places, mosaic.weights(length, side, places), strict=True):
        assert weights.shape == (side,) and (weights > 0).all()
        total[place : place + side] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_weights_fall_to_the_border_that_another_window_covers():
    first, second = mosaic.weights(14, 8, [0, 6])
    np.testing.assert_allclose(first, [1, 1, 1, 1, 1, 1, 0.75, 0.25])
    np.testing.assert_allclose(second, first[::-1])


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_every_window_agrees_on_comes_back(shape, overlap):
    image = picture(*shape)
    found = mosaic.stitch(image, SIZE, pointwise, overlap=overlap)
    likely, heat, macs = pointwise(image)
    assert found.ids.shape == found.sure.shape == found.heat.shape == shape
    np.testing.assert_array_equal(found.ids, likely.argmax(-1))
    np.testing.assert_allclose(found.sure, likely.max(-1), rtol=1e-5)
    np.testing.assert_allclose(found.heat, heat, rtol=1e-5)
    counts = [len(mosaic.starts(length, side, overlap)) for length, side in zip(shape, SIZE, strict=True)]
    assert found.windows == np.prod(counts)
    if shape == SIZE:
        assert found.macs == macs
    else:
        assert found.macs >= macs


def test_one_window_is_exactly_the_picture():
    image = picture(*SIZE)
    found = mosaic.stitch(image, SIZE, by_place)
    likely, heat, macs = by_place(image)
    np.testing.assert_array_equal(found.ids, likely.argmax(-1))
    np.testing.assert_array_equal(found.sure, likely.max(-1))
    np.testing.assert_array_equal(found.heat, heat)
    assert (found.macs, found.windows) == (macs, 1)


def test_windows_are_those_of_the_picture_upright():
    image, seen = picture(23, 31), []
    mosaic.stitch(image, SIZE, lambda window: (seen.append(window.copy()), pointwise(window))[1])
    assert {window.shape for window in seen} == {(*SIZE, 3)}
    rows, columns = mosaic.starts(23, 16), mosaic.starts(31, 12)
    expected = {image[y : y + 16, x : x + 12].tobytes() for y in rows for x in columns}
    assert {window.tobytes() for window in seen} == expected


def test_around_a_smaller_picture_it_is_black():
    image, seen = picture(3, 5), []
    mosaic.stitch(image, SIZE, lambda window: (seen.append(window.copy()), pointwise(window))[1])
    (window,) = seen
    np.testing.assert_array_equal(window[:3, :5], image)
    assert not window[3:].any() and not window[:, 5:].any()


def test_no_seams():
    """Where windows disagree by a constant, the result goes from one to the other in steps as small as the overlap is
    wide."""
    number = iter(range(100))

    def disagreeing(window):
        likely = np.full((*window.shape[:2], 2), [1, 0], np.float32)
        return likely - 0.4 * (next(number) % 2), np.zeros(window.shape[:2]), 0.0

    found = mosaic.stitch(picture(8, 26), (8, 8), disagreeing, overlap=0.5)
    assert np.ptp(found.sure) > 0.3
    assert np.abs(np.diff(found.sure, axis=1)).max() < 0.4 / 4 + 1e-6


@pytest.mark.parametrize("shape", [(600, 100), (100, 600)])
def test_probabilities_of_a_band_alone_are_in_memory(shape):
    classes, size = 50, (16, 20)
    likely = np.full((*size, classes), 1 / classes, np.float32)
    image, heat = picture(*shape), np.zeros(size, np.float32)
    tracemalloc.start()
    try:
        found = mosaic.stitch(image, size, lambda window: (likely, heat, 1.0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.ids.dtype == np.uint8
    all_of_them, band = 600 * 100 * classes * 4, 20 * 100 * classes * 4
    results = 600 * 100 * (1 + 4 + 4)
    assert peak < results + 3 * band < all_of_them / 5


def test_many_classes_and_an_overlap_that_makes_no_sense():
    likely = np.eye(300, dtype=np.float32)[np.full(SIZE, 299)]
    found = mosaic.stitch(picture(*SIZE), SIZE, lambda window: (likely, np.zeros(SIZE), 1.0))
    assert found.ids.dtype == np.uint16 and (found.ids == 299).all()
    with pytest.raises(ValueError, match=r"overlap 1\.0 must be a share"):
        mosaic.stitch(picture(*SIZE), SIZE, pointwise, overlap=1.0)


def test_a_picture_may_be_resized_before():
    run = lambda window: (*pointwise(window), 5.0)  # noqa: E731
    large = Image.fromarray(picture(90, 70))
    answer = deployed.in_windows(run, SIZE, 0.0, (32, 24))(large)
    assert answer.ids.shape == answer.heat.shape == (32, 24) and answer.full == 4 * 5
    assert deployed.in_windows(run, SIZE, 0.0, SIZE)(large).full == 5
