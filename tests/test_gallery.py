"""Pictures of a classifier's compute: they are written, and show what they are given."""

import numpy as np
import pytest
from PIL import Image

from dynjax.show import gallery


@pytest.fixture
def size():
    def of(path):
        with Image.open(path) as picture:
            return picture.size

    return of


def test_compute_by_class_leaves_out_classes_that_do_not_occur(tmp_path, size):
    macs, labels = np.arange(1.0, 41.0) * 1e6, np.arange(40) % 3
    path = tmp_path / "classes.png"
    gallery.plot_classes(path, macs, labels, ("a", "b", "c"), title="t")
    all_three = size(path)
    gallery.plot_classes(path, macs, labels, ("a", "b", "c", "never"), title="t")
    assert size(path)[1] > all_three[1]  # room for the name alone
    gallery.plot_classes(path, np.full(3, 5e6), np.zeros(3, int), ("a", "b"))


def test_extremes_of_any_number(tmp_path, size):
    path = tmp_path / "extremes.png"
    picture = np.zeros((4, 4, 3), np.uint8)
    for count in (1, 3):
        rows = {"easiest": [(picture, "label")] * count, "hardest": [(picture + 255, "label")] * count}
        gallery.plot_extremes(path, rows)
        with Image.open(path) as found:
            assert (np.asarray(found)[..., :3] == 0).all(-1).any()  # the black pictures are there
    assert size(path)[0] > size(path)[1]


def test_exits(tmp_path, size):
    curves = {
        "budgeted": [(1e6 * k, 0.5 + k / 100) for k in range(1, 41)],
        "anytime": [(1e7 * (k + 1), 0.5 + k / 10) for k in range(3)],
    }
    path = tmp_path / "exits.png"
    gallery.plot_exits(path, curves, static=(4e7, 0.9), title="t")
    assert min(size(path)) > 300
