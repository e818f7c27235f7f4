"""Pictures and masks from files: what is read, what is refused and how it is said."""

import numpy as np
import pytest
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import files, pairs, pictures
from dynjax.data.source import size_of, target_of


def save(array, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(file, **options)
    return file


def check(read, count, **options):
    """Pairs of masks where nothing else is said; options of a DataConfig or of Pairs."""
    ours = {key: options.pop(key) for key in ("size", "on_error", "examples") if key in options}
    options = {"classes": ("a", "b", "c"), "target": "mask", "ignored": 255, **options}
    return pairs.check_pairs(pairs.Pairs(read, count, **options), DataConfig(name="some", **ours), "train")


def constant(shapes, label=1):
    return lambda i: (np.full((*shapes[i], 3), i, np.uint8), np.full(shapes[i], label, np.uint8))


def test_masks_of_every_kind_give_class_ids(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.putpalette([200, 10, 10] * 256)
    palette.save(tmp_path / "palette.png")
    save(ids, tmp_path / "grey.png")
    save(ids.astype(np.uint16), tmp_path / "deep.png")
    Image.fromarray(ids > 5).save(tmp_path / "bits.png")
    for name in ("palette", "grey", "deep"):
        np.testing.assert_array_equal(pictures.read_mask(tmp_path / f"{name}.png"), ids)
    np.testing.assert_array_equal(pictures.read_mask(tmp_path / "bits.png"), (ids > 5).astype(int))


def test_images_of_every_kind_become_rgb(tmp_path):
    grey = np.full((4, 6), 77, np.uint8)
    save(grey, tmp_path / "grey.png")
    save(np.dstack([grey] * 4), tmp_path / "rgba.png")
    save(np.dstack([grey] * 3), tmp_path / "photo.jpg")
    for name in ("grey.png", "rgba.png", "photo.jpg"):
        image = pictures.read_image(tmp_path / name)
        assert image.shape == (4, 6, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - 77).max() <= 1


def test_masks_of_two_classes(tmp_path):
    grey = np.array([[0, 1, 127], [128, 200, 255]], np.uint8)
    wanted = [[0, 0, 0], [1, 1, 1]]
    palette = Image.fromarray(np.array([[0, 0, 0], [1, 2, 255]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0] * 256)  # indices count, not their colours
    palette.save(tmp_path / "palette.png")
    save(grey, tmp_path / "soft.png")
    save(np.dstack([grey] * 3), tmp_path / "rgb.png")
    save(np.array(wanted, np.uint8), tmp_path / "ids.png")
    save(np.array(wanted, bool), tmp_path / "bits.png")
    for name in ("palette", "soft", "rgb", "ids", "bits"):
        mask = pictures.read_binary_mask(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(mask, wanted, err_msg=name)
    dark = save(np.zeros((2, 3), np.uint8), tmp_path / "dark.png")
    assert not pictures.read_binary_mask(dark).any()
    with pytest.raises(pictures.BadFile, match=r"deep\.png: .*mode I;16, two classes need 8 bits"):
        pictures.read_binary_mask(save(grey.astype(np.uint16), tmp_path / "deep.png"))
    with pytest.raises(pictures.BadFile, match=r"photo\.jpg: a mask must be lossless"):
        pictures.read_binary_mask(save(grey, tmp_path / "photo.jpg"))


def test_masks_in_colours(tmp_path):
    ids = {(255, 0, 0): 0, (0, 0, 255): 1, (9, 9, 9): 255}
    mask = np.array([[0, 1, 255], [1, 1, 0]])
    colours = np.array([next(each for each, own in ids.items() if own == one) for one in mask.ravel()], np.uint8)
    rgb = save(colours.reshape(2, 3, 3), tmp_path / "rgb.png")
    Image.open(rgb).convert("RGBA").save(tmp_path / "rgba.png")
    Image.open(rgb).quantize(4).save(tmp_path / "palette.png")
    for name in ("rgb", "rgba", "palette"):
        found = pictures.read_colour_mask(tmp_path / f"{name}.png", ids, "classes.txt")
        np.testing.assert_array_equal(found, mask, err_msg=name)
    colours[:3] = (1, 2, 3)
    colours[4] = (255, 255, 255)
    strange = save(colours.reshape(2, 3, 3), tmp_path / "strange.png")
    with pytest.raises(pictures.BadFile, match=r"strange\.png: 4 pixels of 2 colours that here .* #010203 \(3\)"):
        pictures.read_colour_mask(strange, ids, "here")


def test_what_cannot_be_read_is_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("this is no picture")
    whole = save(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), tmp_path / "whole.jpg")
    half = tmp_path / "half.jpg"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    empty = tmp_path / "empty.png"
    empty.touch()
    deep = save(np.zeros((4, 4), np.uint16), tmp_path / "deep.png")
    for file, reason in [
        (text, "not a picture"),
        (half, "truncated"),
        (empty, "not a picture"),
        (tmp_path / "gone.png", "no such file"),
        (deep, "convert to 8 bits"),
    ]:
        with pytest.raises(pictures.BadFile, match=rf"{file.name}: .*{reason}"):
            pictures.read_image(file)
    with pytest.raises(pictures.BadFile, match=r"whole\.jpg: a mask must be lossless"):
        pictures.read_mask(whole)
    colour = save(np.zeros((4, 4, 3), np.uint8), tmp_path / "colour.png")
    with pytest.raises(pictures.BadFile, match=r"colour\.png: .*one channel"):
        pictures.read_mask(colour)


def test_resizing_keeps_classes_and_averages_colours():
    mask = np.zeros((8, 8), np.int32)
    mask[:, 4:] = 7
    assert set(np.unique(pairs.resize_mask(mask, (3, 5)))) == {0, 7}
    np.testing.assert_array_equal(pairs.resize_mask(mask, (4, 4)), mask[::2, ::2])
    np.testing.assert_array_equal(pairs.resize_mask(pairs.resize_mask(mask, (16, 24)), (8, 8)), mask)
    stripes = np.zeros((8, 8, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(pairs.resize_image(stripes, (2, 2)).astype(int) - 100).max() < 15
    assert pairs.resize_image(stripes, (8, 8)) is stripes


def test_one_error_names_all_that_is_wrong():
    shapes = [(4, 4)] * 8

    def read(index):
        image, mask = constant(shapes)(index)
        if index in (1, 2):
            raise pictures.BadFile(f"file{index}.png: broken")
        if index == 3:
            image = image[:3]
        if index == 4:
            mask = mask + 2
        if index == 5:
            mask = mask.astype(int) - 2
        if index == 6:
            mask = mask * 255  # ignored everywhere is allowed
        return image, mask

    with pytest.raises(UserError) as caught:
        check(read, 8, broken=["file9.png: no mask of that name"])
    text = str(caught.value)
    assert "\n" not in text and "data.name=some, train: 6 bad files" in text
    assert "file9.png: no mask" in text and "file1.png: broken" in text and "and 1 more" in text
    assert "example 3: the image is 4x3 and the mask 4x4" in text
    assert "example 4: label 3 in the mask, allowed are 0 to 2 and 255 for ignored pixels" in text
    assert "--data.on-error skip" in text

    source = check(read, 8, on_error="skip", broken=["file9.png: no mask of that name"])
    assert len(source) == 3 and source.skipped == 6 and "6 skipped" in source.describe()
    assert [int(source[i]["image"][0, 0, 0]) for i in range(3)] == [0, 6, 7]
    assert (source[1]["mask"] == 255).all() and source[1]["mask"].dtype == np.int32
    with pytest.raises(IndexError):
        source[3]


def test_nothing_left_is_an_error_even_when_skipping():
    with pytest.raises(UserError, match="no example can be used: example 0: label 9"):
        check(constant([(4, 4)], label=9), 1, on_error="skip")
    with pytest.raises(UserError, match="no example can be used"):
        check(constant([]), 0)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_pictures_of_several_sizes_need_a_size(on_error):
    shapes = [(4, 6), (4, 6), (8, 6)]
    with pytest.raises(UserError, match=r"2 sizes \(width x height\): 6x4 \(2\), 6x8 \(1\); give --data.size"):
        check(constant(shapes), 3, on_error=on_error)
    source = check(constant(shapes), 3, size=(5, 5))
    assert size_of(source) == (5, 5) and source[2]["image"].shape == (5, 5, 3)
    with pytest.raises(UserError, match=r"data.size=\(0, 5\)"):
        check(constant(shapes), 3, size=(0, 5))


def test_a_large_split_is_read_again_instead_of_kept(monkeypatch):
    shapes = [(4, 6)] * 3
    kept = check(constant(shapes), 3, size=(2, 3))
    monkeypatch.setattr(pairs, "KEEP_BYTES", 10)
    streamed = check(constant(shapes), 3, size=(2, 3))
    assert kept.memory is not None and streamed.memory is None
    for index in range(3):
        for key in ("image", "mask"):
            np.testing.assert_array_equal(kept[index][key], streamed[index][key])
            assert kept[index][key].dtype == streamed[index][key].dtype


def test_fewer_examples_come_from_all_over_the_set():
    source = check(constant([(4, 4)] * 10), 10, examples=4)
    assert [int(source[i]["image"][0, 0, 0]) for i in range(4)] == [0, 2, 5, 7]
    assert len(source.memory[0]) == 4 and len(check(constant([(4, 4)] * 3), 3, examples=4)) == 3
    with pytest.raises(UserError, match=r"data\.examples=0"):
        check(constant([(4, 4)]), 1, examples=0)


def test_labels_instead_of_masks():
    def read(index):
        if index == 1:
            raise pictures.BadFile("file1.png: broken")
        return np.full((4, 6, 3), index, np.uint8), np.int64((0, 1, 2, -1, 3)[index])

    options = {"target": "label", "ignored": None}
    with pytest.raises(UserError) as caught:
        check(read, 5, **options)
    for part in ("3 bad files: file1.png: broken", "example 3: label -1, allowed are 0 to 2", "example 4: label 3"):
        assert part in str(caught.value)
    source = check(read, 5, **options, on_error="skip", size=(2, 3), note="(somehow)", handed=True)
    assert source.describe() == "some (somehow) train: 2 pictures 2x3, 3 classes, 3 skipped" and source.handed
    assert target_of(source.spec) == "label" and target_of(check(constant([(4, 4)]), 1).spec) == "mask"
    assert source[1].keys() == {"image", "label"} and isinstance(source[1]["label"], np.int32)
    assert source[1]["label"] == 2 and source[1]["image"].shape == (2, 3, 3)


def test_matching_by_name(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for name in ("b.png", "a.jpg", "lonely.png", "twice.png", "twice.jpg"):
        save(np.zeros((2, 2, 3), np.uint8), images / name)
    for name in ("a.png", "b.png", "orphan.png", "twice.png"):
        save(np.zeros((2, 2), np.uint8), masks / name)
    (images / "notes.txt").write_text("")
    (images / ".DS_Store").write_text("")
    found, problems = files.match_stems(images, masks)
    assert [(a.name, b.name) for a, b in found][:2] == [("a.jpg", "a.png"), ("b.png", "b.png")]
    text = " | ".join(problems)
    assert len(problems) == 4
    for part in ("lonely.png: no mask", "orphan.png: no image", "notes.txt: not one of", "a second file named twice"):
        assert part in text
