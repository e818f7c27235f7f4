"""Sources of text and of film, from outside of the package, go the way of all others; and what a spec may say."""

import numpy as np
import pytest
from made import Made

from dynjax import data
from dynjax.config import AugmentConfig, DataConfig, UserError
from dynjax.data.source import Field, Source, input_of, picture_spec, size_of, target_of

FRAMES, HEIGHT, WIDTH = 3, 6, 8


def text(count=10):
    """Tokens count up from 10 i; the label is 100 + i."""
    spec = {"tokens": Field((5,), np.int32, "text", 9999), "label": Field((), np.int32, "label", -1)}
    return Made(count, spec, lambda i: {"tokens": 10 * i + np.arange(5), "label": 100 + i}, name="text")


def film(count=10, masks=False):
    """Frame t of film i is grey i + 1, but for a column of white as far from the left as t, 1 in the masks."""
    spec = {"film": Field((FRAMES, HEIGHT, WIDTH, 3), np.uint8, "film", 0)}
    spec |= {"masks": Field((FRAMES, HEIGHT, WIDTH), np.int32, "mask", -1, 7)} if masks else {}
    spec |= {"label": Field((), np.int32, "label", -1)}

    def example(index):
        frames = np.full((FRAMES, HEIGHT, WIDTH, 3), index + 1, np.uint8)
        for t in range(FRAMES):
            frames[t, :, t] = 255
        return {"film": frames, "masks": (frames[..., 0] == 255).astype(np.int64), "label": np.int32(100 + index)}

    return Made(count, spec, example, name="film")


ALL_ON = AugmentConfig(flip=True, crop=0.5, colour=0.3, pad=2, cutout=3)
KINDS = pytest.mark.parametrize("kind", [text, film, lambda: film(masks=True)], ids=["text", "film", "masks"])


def batches(source, count=None, size=4, augment=ALL_ON, state=0, **options):
    iterator = iter(data.make_loader(source, size, seed=3, augment=augment, **options))
    iterator.set_state(state)
    return list(iterator) if count is None else [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@KINDS
def test_batches_are_what_the_spec_says(kind):
    source = kind()
    assert isinstance(source, Source)
    stream = batches(source, 5)
    for batch in stream:
        assert batch.keys() == source.spec.keys()
        for key, field in source.spec.items():
            assert batch[key].shape == (4, *field.shape) and batch[key].dtype == field.dtype
    labels = np.concatenate([batch["label"] for batch in stream])
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(100, 110))
    assert labels[:10].tolist() != labels[10:].tolist() and labels[:10].tolist() != list(range(100, 110))


@KINDS
def test_a_pass_is_filled_up_with_blanks(kind):
    source = kind()
    stream = batches(source, augment=None, shuffle=False, repeat=False)
    assert [batch["valid"].tolist() for batch in stream] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert np.concatenate([batch["label"] for batch in stream]).tolist() == [*range(100, 110), -1, -1]
    for key, field in source.spec.items():
        assert (stream[2][key][2:] == field.blank).all()
        for index in range(4):
            np.testing.assert_array_equal(stream[1][key][index], source[4 + index][key])


@KINDS
@pytest.mark.parametrize("repeat", [True, False])
def test_processes_share_and_resume_at_the_exact_batch(kind, repeat):
    whole = batches(kind(), 3, repeat=repeat)
    halves = [batches(kind(), 3, repeat=repeat, process_index=p, process_count=2) for p in range(2)]
    assert_same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)], whole)
    assert_same(batches(kind(), 1, repeat=repeat, state=2), whole[2:])


def test_text_is_left_alone_and_films_change_frame_by_frame_alike():
    for batch in batches(text(), 5):
        np.testing.assert_array_equal(batch["tokens"], 10 * (batch["label"][:, None] - 100) + np.arange(5))
    assert_same(batches(text(), 5), batches(text(), 5, augment=None))
    still = Field((FRAMES, HEIGHT, WIDTH, 3), np.uint8, "film", 0)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    source = Made(1, {"film": still}, lambda _: {"film": np.stack([picture] * FRAMES)})
    found = batches(source, 8, size=1)
    for batch in found:
        assert (batch["film"][0] == batch["film"][0, 0]).all()
    assert len({batch["film"].tobytes() for batch in found}) == 8


def test_the_masks_of_a_film_move_with_it():
    moved = AugmentConfig(flip=True, crop=1.0, colour=0.0, pad=2)
    seen = set()
    for batch in batches(film(masks=True), 20, augment=moved):
        frames, masks = batch["film"][..., 0], batch["masks"]
        np.testing.assert_array_equal(masks == 1, frames == 255)
        np.testing.assert_array_equal(masks == -1, frames == 0)
        seen |= {tuple(np.flatnonzero(mask[2, 3] == 1)) for mask in masks}
    assert len(seen) > 5
    assert {len(np.unique(batch["masks"])) for batch in batches(film(masks=True), 4, augment=None)} == {2}


@KINDS
def test_calibration(kind):
    found = data.calibration_batches(kind(), 2, 5)
    assert [batch["label"].tolist() for batch in found] == [[100 + i, 105 + i] for i in range(5)]
    assert all(batch.keys() == kind().spec.keys() for batch in found)


def test_a_name_of_ones_own(monkeypatch):
    monkeypatch.setattr(data, "_MAKES", dict(data._MAKES))
    data.register("some_text", lambda config, split, *, seed, classes: text(config.examples + seed))
    data.register("films:", lambda config, split, *, seed, classes: film(int(config.name.removeprefix("films:"))))
    assert len(data.make_source(DataConfig(name="some_text", examples=4), "val", seed=2)) == 6
    assert len(data.make_source(DataConfig(name="films:12"), "train")) == 12
    with pytest.raises(UserError, match=r"'films' is not known: digits, .*tfds:NAME, some_text, films:NAME; did you"):
        data.make_source(DataConfig(name="films"), "train")
    with pytest.raises(UserError, match="split='all'"):
        data.make_source(DataConfig(name="some_text"), "all")


def test_what_a_spec_is_asked():
    pictures = picture_spec((4, 6), "mask", 255)
    assert (input_of(pictures), target_of(pictures), pictures["mask"].ignored) == ("image", "mask", 255)
    assert (input_of(text().spec), target_of(text().spec)) == ("tokens", "label")
    assert target_of({"tokens": text().spec["tokens"]}) == "tokens"  # a language model's
    assert size_of(film()) == (HEIGHT, WIDTH) and film(masks=True).spec["masks"].pixels == (HEIGHT, WIDTH)
    with pytest.raises(UserError, match="text has no pictures, it has tokens, label"):
        size_of(text())
    with pytest.raises(UserError, match="nothing to look at"):
        input_of({"label": text().spec["label"]})


@pytest.mark.parametrize(
    "shape, dtype, role",
    [
        ((4, 6), np.uint8, "picture"),
        ((4, 6, 3), np.float32, "picture"),
        ((4, 6, 1), np.uint8, "picture"),
        ((4, 6, 3), np.uint8, "film"),
        ((4, 6), np.uint8, "mask"),
        ((4,), np.int32, "mask"),
        ((), np.int32, "text"),
    ],
)
def test_shapes_that_a_role_cannot_have(shape, dtype, role):
    with pytest.raises(ValueError, match=f"a {role} cannot be {np.dtype(dtype)}"):
        Field(shape, dtype, role, 0)


def test_examples_unlike_their_spec_and_sizes_that_differ_are_named():
    wrong = Made(3, text().spec, lambda i: {"tokens": np.arange(4 + i), "label": 0}, name="wrong")
    with pytest.raises(ValueError, match=r"wrong train, example 0: tokens has shape \(4,\), by .* spec it is \(5,\)"):
        batches(wrong, 1, shuffle=False)
    spec = picture_spec((8, 8), "label") | {"mask": Field((4, 4), np.int32, "mask", -1)}
    halved = Made(2, spec, lambda i: {k: np.zeros(f.shape, f.dtype) for k, f in spec.items()})
    assert batches(halved, 1, augment=None)[0]["mask"].shape == (4, 4, 4)
    with pytest.raises(UserError, match=r"image \(8, 8, 3\), mask \(4, 4\): what is augmented together"):
        batches(halved, 1)
