import dataclasses
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dynjax.core.deploy import Report
from dynjax.data.pictures import read_mask
from dynjax.show import curve, report
from dynjax.show.curve import Point, plot_curve


def point(budget, score=0.5):
    return Point(budget, score, 0.75, 4e8 * budget, budget, 10 * budget, 12 * budget, 9.0, 0.9, True, 5e8, 6e8, 4e8, 7)


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("classes", [1, 11, 20, 60])
def test_every_class_has_a_colour_of_its_own(classes):
    colours = report.palette(classes)
    assert colours.shape == (classes, 3)
    assert len({tuple(colour) for colour in colours} | {report.IGNORED}) == classes + 1


def test_paint_gives_ignored_pixels_grey():
    mask = np.array([[0, 1], [-1, 2]], np.int32)
    painted = report.paint(mask, 2)
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted[0], report.palette(2))
    assert tuple(painted[1, 0]) == tuple(painted[1, 1]) == report.IGNORED


def test_overlay_lies_between_the_picture_and_the_colours():
    image = np.full((2, 2, 3), 200, np.uint8)
    mask = np.zeros((2, 2), np.int32)
    np.testing.assert_array_equal(report.overlay(image, mask, 3, strength=0.0), image)
    np.testing.assert_array_equal(report.overlay(image, mask, 3, strength=1.0), report.paint(mask, 3))


def test_a_mask_is_saved_as_class_ids(tmp_path):
    mask = np.arange(12, dtype=np.int32).reshape(3, 4)
    report.save_mask(tmp_path / "mask.png", mask, 12)
    with Image.open(tmp_path / "mask.png") as saved:
        assert saved.mode == "P"
        np.testing.assert_array_equal(np.asarray(saved), mask)
    np.testing.assert_array_equal(read(tmp_path / "mask.png"), report.paint(mask, 12))
    report.save_mask(tmp_path / "many.png", 100 * mask, 1101)
    with Image.open(tmp_path / "many.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), 100 * mask)


def test_tables_are_aligned():
    lines = curve.curve_table([point(0.25), point(1.0, 0.625)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["0.25", "50.0", "75.0", "100.0", "25.0", "2.50", "3.00", "9.00", "0.90x", "yes"]
    shares = {"down/0": {"kept": 0.25, "macs": 0.1}}
    assert curve.layer_table({0.5: shares, 1.0: {"down/0": {"kept": 1.0, "macs": 0.2}}}).splitlines()[2].split() == [
        "down/0",
        "25",
        "100",
    ]


def test_classes_are_told_with_their_means():
    scores = {"iou": [0.5, float("nan")], "miou": 0.5, "class_dice": [2 / 3, float("nan")], "dice": 2 / 3}
    scores |= {"class_boundary_f1": [0.25, float("nan")], "boundary_f1": 0.25}
    lines = [line.split() for line in curve.class_table(["sky", "car"], scores).splitlines()]
    assert lines[0] == ["class", "IoU", "%", "Dice", "%", "boundary", "F1", "%"]
    assert lines[2:] == [["sky", "50.0", "66.7", "25.0"], ["car", "-", "-", "-"], ["mean", "50.0", "66.7", "25.0"]]
    assert curve.class_table(["sky", "car"], {"accuracy": 0.5, "recall": [0.5, 0.5]}) == ""


def test_budgets_that_end_at_the_same_point_have_one_name(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text as text
    spent = {0.42: 0.5, 0.5: 0.505, 0.6: 0.51, 0.75: 0.9}
    points = [(point(budget, share), share) for budget, share in spent.items()]
    own = [dataclasses.replace(each, macs_fraction=share, latency_ms_p50=10 * share) for each, share in points]
    plot_curve(tmp_path / "curve.svg", {"own": own}, twin=None)
    drawn = re.findall(r">([^<>]+)</text>", (tmp_path / "curve.svg").read_text())
    names = [name for name in drawn if name in ("0.42", "0.5", "0.6", "0.75", "0.42 to 0.6")]
    assert names == ["0.42 to 0.6", "0.75"] * 2  # over MACs, and over milliseconds


def test_calibration_table_is_in_millions():
    found = Report(0.5, 1.25, False, 2e6, 3e6, 4e6, 8e6)
    assert curve.calibration_table({0.25: found}).splitlines()[2].split() == "0.25 2.0 3.0 4.0 8.0 1.25 no".split()


def test_curve_shows_every_curve_and_the_twin(tmp_path):
    own = [point(0.25), point(1.0, 0.6)]
    plot_curve(tmp_path / "one.png", {"own": own}, twin=None)
    others = {"own": own, "random": [point(0.5, 0.3)]}
    plot_curve(tmp_path / "two.png", others, twin=0.65, title="a row")
    nan = float("nan")
    untimed = dataclasses.replace(point(1.0, 3.5), latency_ms_p50=nan, static_latency_ms_p50=nan)
    plot_curve(tmp_path / "half.png", {"own": [untimed]}, twin=3.4, score_name="bits/dim", percent=False)
    assert read(tmp_path / "half.png").shape[1] < 0.6 * read(tmp_path / "one.png").shape[1]
    one, two = read(tmp_path / "one.png"), read(tmp_path / "two.png")

    def has(picture, colour):
        return (np.abs(picture - np.array(tuple(bytes.fromhex(colour[1:])))).max(-1) < 3).sum() > 20

    assert has(one, report.LINES[0]) and not has(one, report.LINES[1])
    assert has(two, report.LINES[0]) and has(two, report.LINES[1])


def test_heat_is_shown_where_the_macs_are(tmp_path):
    image = np.full((24, 32, 3), 255, np.uint8)
    heat = np.zeros((12, 16), np.float32)
    heat[:, 8:] = 5000
    report.plot_compute(tmp_path / "compute.png", image, heat, title="5 MMAC")
    picture = read(tmp_path / "compute.png")
    height, width = picture.shape[:2]
    # Viridis: dark blue for nothing, yellow for the most.
    left, right = picture[height // 2, width // 8], picture[height // 2, width * 5 // 8]
    assert left.sum() < 350 and left[2] > left[1]
    assert right[0] > 200 and right[1] > 200 and right[2] < 100


def test_heatmaps_and_histogram_are_written(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.integers(-1, 3, (8, 12)).astype(np.int32)
    shown = [
        report.Example(
            name, 1e6, rng.integers(0, 256, (8, 12, 3), dtype=np.uint8), mask, np.maximum(mask, 0), np.ones((8, 12))
        )
        for name in ("easiest", "hardest")
    ]
    report.plot_heatmaps(tmp_path / "heatmaps.png", shown, class_names=("a", "b", "c"), title="t")
    assert read(tmp_path / "heatmaps.png").shape[1] > 800
    report.plot_heatmaps(tmp_path / "many.png", shown, class_names=[f"class {k}" for k in range(1000)], title="t")
    assert read(tmp_path / "many.png").shape[0] < 1.2 * read(tmp_path / "heatmaps.png").shape[0]
    macs = {budget: budget * rng.uniform(1e6, 2e6, 50) for budget in (0.5, 1.0)}
    report.plot_histogram(tmp_path / "histogram.png", macs, 2e6)
    assert read(tmp_path / "histogram.png").std() > 10


def test_pictures_are_saved_under_their_names(tmp_path):
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    report.save_pictures(tmp_path / "new", {"easiest": image})
    np.testing.assert_array_equal(read(tmp_path / "new" / "easiest.png"), image)


def test_hardware_names_the_cores():
    assert "core" in report.hardware()


def test_masks_have_a_byte_a_pixel_and_ignored_ones_are_grey(tmp_path):
    mask = np.array([[0, 1, 2], [3, 255, 3]])
    report.save_mask(tmp_path / "mask.png", mask, 4)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)
    assert (tmp_path / "mask.png").read_bytes()[24] == 8  # bits a pixel, of the header
    np.testing.assert_array_equal(read(tmp_path / "mask.png"), report.paint(mask, 4))


def test_marked_pixels_stand_out_of_a_grey_picture():
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    where = np.eye(4, dtype=bool)
    marked = report.mark(image, where).astype(int)
    assert (np.ptp(marked[~where], axis=-1) == 0).all() and (np.ptp(marked[where], axis=-1) > 100).all()
