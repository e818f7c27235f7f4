import numpy as np
import pytest
from PIL import Image

from dynjax.show import film


def pictures(number, size=(4, 5)):
    return np.random.default_rng(0).integers(0, 256, (number, *size, 3), dtype=np.uint8)


def test_every_picture_is_in_the_grid(tmp_path):
    images = pictures(5)
    film.save_grid(tmp_path / "grid.png", images, columns=3, scale=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 6 + 2, 3 * 7 + 2, 3)
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 6, 2 + index % 3 * 7
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 5], image)
    assert (sheet[-6:, -7:] == film.PAPER).all()


def test_a_film_has_a_row_for_each_picture(tmp_path):
    film.save_film(tmp_path / "film.png", pictures(6).reshape(2, 3, 4, 5, 3), scale=2)
    with Image.open(tmp_path / "film.png") as picture:
        assert picture.size == (2 * (3 * 7 + 2), 2 * (2 * 6 + 2))


def test_plots_are_written(tmp_path):
    calls = np.array([3, 9])
    film.plot_calls(tmp_path / "calls.png", pictures(2), np.arange(40).reshape(2, 4, 5), calls)
    film.plot_histogram(tmp_path / "histogram.png", {"a": calls, "b": calls + 1})
    for name in ("calls", "histogram"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 150


def test_a_plain_picture_is_a_smaller_file():
    noise, plain = pictures(1, (16, 16))[0], np.zeros((16, 16, 3), np.uint8)
    assert film.png_bytes(plain) < film.png_bytes(noise)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3], [10, 20, 300], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # Ranks 1.5 1.5 3 and 1 2 3: covariance 1.5 over sqrt(1.5 * 2).
        ([5, 5, 7], [1, 2, 3], 1.5 / np.sqrt(3)),
        ([1, 1, 1], [1, 2, 3], float("nan")),
    ],
)
def test_rank_correlation(a, b, wanted):
    assert film.rank_correlation(np.array(a), np.array(b)) == pytest.approx(wanted, nan_ok=True)
