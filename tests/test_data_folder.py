"""A user's own folder of pictures and masks, and sets that are laid out otherwise."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from dynjax.config import DataConfig, UserError
from dynjax.data import aerial_roads, isbi_em, make_source
from dynjax.data.legend import read_legend
from dynjax.tasks import make_task
from experiments import rows

SHARED = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"


def make_set(root, labels=None):
    labels = labels or {"train": (0, 1), "val": (1,), "test": (4, 255)}
    for split, ids in labels.items():
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index, label in enumerate(ids):
            Image.fromarray(np.full((8, 10, 3), label, np.uint8)).save(root / split / "images" / f"{index}.jpg")
            Image.fromarray(np.full((8, 10), label, np.uint8)).save(root / split / "masks" / f"{index}.png")
    return root


def folder_config(root, **options):
    return DataConfig(name="folder", path=str(root), **options)


def test_classes_come_from_all_splits(tmp_path):
    config = folder_config(make_set(tmp_path))
    sources = [make_source(config, split) for split in ("train", "val", "test")]
    assert all(source.classes == tuple(f"class {i}" for i in range(5)) for source in sources)
    assert [len(source) for source in sources] == [2, 1, 2]
    assert sources[2].spec["mask"].ignored == 255 and (sources[2][1]["mask"] == 255).all()
    assert (
        make_source(folder_config(tmp_path, classes=9, size=(4, 5)), "val").describe()
        == "folder val: 1 pictures 4x5, 9 classes"
    )


def test_a_label_outside_the_classes(tmp_path):
    make_set(tmp_path)
    with pytest.raises(UserError, match=r"test/images/0\.jpg: label 4 in the mask, allowed are 0 to 1 and 255"):
        make_source(folder_config(tmp_path, classes=2), "test")
    for classes in (-1, 256):
        with pytest.raises(UserError, match=f"data.classes={classes}"):
            make_source(folder_config(tmp_path, classes=classes), "train")


def test_a_broken_mask_is_named_not_counted(tmp_path):
    make_set(tmp_path)
    (tmp_path / "train" / "masks" / "1.png").write_text("no picture")
    with pytest.raises(UserError, match=r"masks/1\.png: not a picture"):
        make_source(folder_config(tmp_path), "train")
    assert len(make_source(folder_config(tmp_path, on_error="skip"), "train")) == 1
    assert len(make_source(folder_config(tmp_path), "val")) == 1


def test_nothing_but_ignored_pixels_and_missing_folders(tmp_path):
    make_set(tmp_path / "all", {"train": (255,), "val": (), "test": ()})
    with pytest.raises(UserError, match="no class in any mask"):
        make_source(folder_config(tmp_path / "all"), "train")
    with pytest.raises(UserError, match="the split val is empty"):
        make_source(folder_config(tmp_path / "all", classes=2), "val")
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        make_source(folder_config(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match=r"give --data\.path"):
        make_source(DataConfig(name="folder"), "train")
    (tmp_path / "half" / "train" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder .*masks"):
        make_source(folder_config(tmp_path / "half"), "train")


def test_the_classes_of_a_run_count_where_a_split_lacks_one(tmp_path):
    trained = tuple(f"class {i}" for i in range(6))
    make_set(tmp_path, {"test": (0, 1)})  # neither train nor val, and no mask with the last class
    source = make_source(folder_config(tmp_path), "test", classes=trained)
    assert source.classes == trained and len(source) == 2
    with pytest.raises(UserError, match=r"label 1 in the mask|data\.classes=1: there can be 2 to 255"):
        make_source(folder_config(tmp_path), "test", classes=trained[:1])


def test_masks_of_0_and_255_are_no_two_classes(tmp_path):
    make_set(tmp_path, {"train": (0, 255), "val": (255,)})
    (mask,) = (tmp_path / "val" / "masks").iterdir()
    pixels = np.full((8, 10), 255, np.uint8)
    pixels[0] = 0
    Image.fromarray(pixels).save(mask)
    with pytest.raises(UserError, match=r"no mask has a class other than 0, 255 marks ignored.*not as 0 and 255"):
        make_source(folder_config(tmp_path), "train")
    # Where the number of classes is given, what occurs decides.
    row = dataclasses.replace(rows.get_row("digits_unet_static"), row="r", data=folder_config(tmp_path, classes=2))
    source = make_source(row.data, "train")
    assert source.seen == {0}
    with pytest.raises(
        UserError, match=r"folder, train, has 2 classes, of which only class 0 occurs .*\(255.*--data\.masks binary"
    ):
        make_task(row, source)
    make_task(row, source, training=False)  # a test split may lack a class


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_nothing_but_ignored_pixels(tmp_path, split):
    make_set(tmp_path, {"train": (0, 1), "val": (1,), "test": (1,)})
    for mask in (tmp_path / split / "masks").iterdir():
        Image.fromarray(np.full((8, 10), 255, np.uint8)).save(mask)
    with pytest.raises(UserError, match=f"folder, {split}: every pixel of every mask is 255, which marks ignored"):
        make_source(folder_config(tmp_path, classes=2), split)


def test_folders_inside_are_named(tmp_path):
    make_set(tmp_path)
    inside = tmp_path / "train" / "images" / "night"
    inside.mkdir()
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(inside / "9.png")
    with pytest.raises(UserError, match=r"images/night: a folder inside images, whose files are not read from there"):
        make_source(folder_config(tmp_path), "train")
    assert make_source(folder_config(tmp_path, on_error="skip"), "train").describe().endswith("1 skipped")
    (tmp_path / "train" / "images" / ".cache").mkdir()
    (tmp_path / "old" / "masks").mkdir(parents=True)  # no split: its masks say nothing about the classes
    Image.fromarray(np.full((8, 10), 9, np.uint8)).save(tmp_path / "old" / "masks" / "0.png")
    inside.rename(tmp_path / "old" / "night")
    assert len(make_source(folder_config(tmp_path), "train").classes) == 5


# Names and colours of classes

LEGEND = """# what is seen

sky 0 128 255
traffic light #FF0000
road
#
ignore #000000
"""


def test_classes_txt_names_the_classes(tmp_path):
    make_set(tmp_path, {"train": (0, 1), "val": (2,), "test": (255,)})
    (tmp_path / "classes.txt").write_text(LEGEND)
    legend = read_legend(tmp_path)
    assert legend.names == ("sky", "traffic light", "road") and legend.plain == ("road",)
    assert legend.ids == {(0, 128, 255): 0, (255, 0, 0): 1, (0, 0, 0): 255}
    for classes in (0, 3):
        source = make_source(folder_config(tmp_path, classes=classes), "train")
        assert source.classes == ("sky", "traffic light", "road") and source.seen == {0, 1}
    assert make_source(folder_config(tmp_path), "train", classes=("x", "y")).classes == source.classes
    with pytest.raises(UserError, match=r"data\.classes=4: .*classes\.txt names 3 classes, not 4"):
        make_source(folder_config(tmp_path, classes=4), "train")
    with pytest.raises(UserError, match=r"data\.masks=binary: .*classes\.txt names 3 classes, not 2"):
        make_source(folder_config(tmp_path, masks="binary"), "train")
    with pytest.raises(UserError, match=r"needs the colour of every class.*classes\.txt has none for road"):
        make_source(folder_config(tmp_path, masks="colours"), "train")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    what = r"0\.jpg: label 2 in the mask, allowed are 0 to 1 and 255 .*\(.*classes\.txt names 2 classes\)"
    with pytest.raises(UserError, match=what):
        make_source(folder_config(tmp_path), "val")
    (tmp_path / "classes.txt").unlink()  # then the run says how many there are, and whoever compares names is told
    assert make_source(folder_config(tmp_path), "train", classes=("x", "y")).classes == ("class 0", "class 1")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("sky\nroad\n\nsky\n", "line 4: 'sky': sky is on line 1 already"),
        ("sky 1 2 3\nroad #010203\n", "line 2: 'road #010203': #010203 is on line 1 already"),
        ("sky\nroad #12345\n", "line 2: 'road #12345': a colour is written #rrggbb"),
        ("sky\n#road\n", "line 2: '#road': a colour is written #rrggbb; a comment has a space"),
        ("sky\n#road 1 2 3\n", "line 2: '#road 1 2 3': a name does not begin with #"),
        ("sky\nroad 1 2 256\n", "line 2: 'road 1 2 256': red, green and blue are 0 to 255"),
        ("sky\n#ff0000\n", "line 2: '#ff0000': a colour without a name"),
        ("sky\n1 2 3\n", "line 2: '1 2 3': a colour without a name"),
        ("sky\nroad\nignore\n", "line 3: 'ignore': the colour of ignored pixels is missing"),
        ("# nothing\nsky\nignore 0 0 0\n", "names 1 classes: there can be 2 to 255"),
        (b"sky\nr\xe9sidence\n", "cannot be read as UTF-8 text"),
    ],
)
def test_a_line_of_classes_txt_that_is_wrong(tmp_path, text, wrong):
    make_set(tmp_path)
    (tmp_path / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        make_source(folder_config(tmp_path), "train")
    assert f"{tmp_path}/classes.txt" in str(caught.value) and wrong in str(caught.value)


# Kinds of masks


def test_black_and_white_masks(tmp_path):
    make_set(tmp_path, {"train": (0, 255), "val": (255,), "test": (0,)})
    source = make_source(folder_config(tmp_path, masks="binary"), "train")
    assert source.classes == ("background", "foreground") and source.seen == {0, 1}
    assert (source[1]["mask"] == 1).all()
    (tmp_path / "classes.txt").write_text("soil\nroad\n")
    assert make_source(folder_config(tmp_path, masks="binary"), "val").classes == ("soil", "road")
    for config in (folder_config(tmp_path), folder_config(tmp_path, classes=2)):
        row = dataclasses.replace(rows.get_row("my_static"), data=config)
        with pytest.raises(UserError, match=r"of which only soil occurs .*--data\.masks binary"):
            make_task(row, make_source(config, "train"))
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"not as 0 and 255, or give --data\.masks binary"):
        make_source(folder_config(tmp_path), "train")
    with pytest.raises(UserError, match=r"data\.classes=3: with --data\.masks binary there are 2"):
        make_source(folder_config(tmp_path, masks="binary", classes=3), "train")
    with pytest.raises(UserError, match=r"data\.masks=binary: that is for data\.name=folder, not camvid"):
        make_source(DataConfig(name="camvid", path=str(tmp_path), masks="binary"), "train")


def test_masks_in_the_colours_of_the_classes(tmp_path):
    make_set(tmp_path, {"train": (0, 1), "val": (1,), "test": (0,)})
    with pytest.raises(UserError, match=r"colour of every class, .*: there is no .*classes\.txt"):
        make_source(folder_config(tmp_path, masks="colours"), "train")
    (tmp_path / "classes.txt").write_text(LEGEND.replace("road", "road 9 9 9"))
    colours = {"train": ((0, 128, 255), (9, 9, 9)), "val": ((0, 0, 0),), "test": ((1, 1, 1),)}
    for split, each in colours.items():
        for index, colour in enumerate(each):
            pixels = np.full((8, 10, 3), colour, np.uint8)
            pixels[0] = (255, 0, 0)
            Image.fromarray(pixels).save(tmp_path / split / "masks" / f"{index}.png")
    config = folder_config(tmp_path, masks="colours")
    source = make_source(config, "train")
    assert source.classes == ("sky", "traffic light", "road") and source.seen == {0, 1, 2}
    assert (source[1]["mask"][0] == 1).all() and (source[1]["mask"][1:] == 2).all()
    assert (make_source(config, "val")[0]["mask"][1:] == 255).all()
    with pytest.raises(UserError, match=r"test/masks/0\.png: 70 pixels of 1 colours that .*classes\.txt does not have"):
        make_source(config, "test")
    with pytest.raises(
        UserError, match=r"mode RGB, .*give --data\.masks colours and .*classes\.txt, .*--data\.masks bi"
    ):
        make_source(folder_config(tmp_path), "train")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"no class in any mask to count: .*masks/0\.png: .*give --data\.masks colours"):
        make_source(folder_config(tmp_path), "train")


# Other layouts


def scatter(root, folders, names):
    for folder, name, value in zip(folders, ("", "mask"), (60, 128), strict=True):
        (root / folder).mkdir()
        for index in names:
            pixels = np.zeros((12, 12), np.uint8)
            pixels[:6] = value if name else 10 * index
            pixels[6:] = 0 if name else 10 * index
            Image.fromarray(pixels).save(root / folder / f"{index}.png")


@pytest.mark.parametrize(
    ("module", "folders", "upper", "counts"),
    [(isbi_em, ("image", "label"), 0, (8, 2, 2)), (aerial_roads, ("images", "groundtruth"), 1, (8, 2, 2))],
)
def test_sets_without_splits(tmp_path, module, folders, upper, counts):
    scatter(tmp_path, folders, range(12))
    name = module.__name__.split(".")[-1]
    config = DataConfig(name=name, path=str(tmp_path))
    sources = [make_source(config, split) for split in ("train", "val", "test")]
    assert tuple(map(len, sources)) == counts
    numbers = [[int(source[i]["image"][0, 0, 0]) // 10 for i in range(len(source))] for source in sources]
    assert sorted(np.concatenate(numbers)) == list(range(12))
    assert (numbers == [list(range(8)), [8, 9], [10, 11]]) == (module is isbi_em)
    for source in sources:
        assert source.classes == module.CLASSES and source[0]["image"].shape == (12, 12, 3)
        assert (source[0]["mask"][:6] == upper).all() and (source[0]["mask"][6:] == 1 - upper).all()
    with pytest.raises(UserError, match=f"no folder .*nowhere; {name} is laid out as PATH/"):
        make_source(dataclasses.replace(config, path=str(tmp_path / "nowhere")), "train")
    for file in (tmp_path / folders[1]).iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no mask of that name"):
        make_source(config, "train")


@pytest.mark.parametrize(
    ("name", "size", "counts"), [("isbi_em", 512, (20, 5, 5)), ("aerial_roads", 400, (70, 15, 15))]
)
def test_the_real_sets(name, size, counts):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real {name} is not in {SHARED / name}")
    config = DataConfig(name=name, path=str(SHARED / name))
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        source = make_source(config, split)
        assert len(source) == count and source.seen == {0, 1} and source[0]["image"].shape == (size, size, 3)
        share = np.mean([(source[index]["mask"] == 1).mean() for index in range(count)])
        assert 0.1 < share < 0.35  # of membranes and of roads
