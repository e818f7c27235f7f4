"""Extractors of features, and what is kept of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynjax.config import DataConfig, UserError
from dynjax.data import make_source
from dynjax.data.labelled import with_labels
from dynjax.data.pairs import check_pairs
from dynjax.tasks import cache, classifier, features
from dynjax.tasks.distances import Moments, frechet_distance
from dynjax.tasks.features import Extractor, digest, features_of, make_extractor, pictures, reference


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """The folder of the cache, and a classifier trained into it, shortly."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("DYNJAX_CACHE", str(folder))
        patch.setattr(classifier, "STEPS", 60)
        patch.setattr(classifier, "WIDTHS", (8, 8, 16))
        yield folder, make_extractor("classifier", make_source(DataConfig("digits8"), "train"))


def source(number=40, seed=0, split="val"):
    """Pictures of noise in two classes, light and dark."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 2
    images = rng.integers(0, 128, (number, 8, 8), dtype=np.uint8) + (128 * labels[:, None, None]).astype(np.uint8)
    return check_pairs(with_labels(images, labels, ("dark", "light"), handed=False), DataConfig("noise"), split)


def test_a_classifier_learns_its_set_and_is_read_again(kept, monkeypatch):
    folder, extractor = kept
    test = make_source(DataConfig("digits8"), "test")
    assert isinstance(extractor, Extractor)
    assert (extractor.name, extractor.distance_name) == ("classifier", "Fréchet distance (classifier)")
    image, label = jnp.asarray(np.concatenate(list(pictures(test)))), [int(test[i]["label"]) for i in range(len(test))]
    share = np.asarray(extractor.probabilities(image))
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-5)
    assert (share.argmax(1) == label).mean() > 0.85
    assert [file.name for file in (folder / "features").iterdir()] == [f"{extractor.checksum}.npz"]
    monkeypatch.setattr(classifier, "_train", None)  # which would fail
    again = make_extractor("classifier", make_source(DataConfig("digits8"), "train"))
    assert again.checksum == extractor.checksum
    np.testing.assert_array_equal(again(image[:4]), extractor(image[:4]))


def test_pictures_of_another_size_are_resized(kept):
    image = jnp.full((1, 16, 12, 3), 200, jnp.uint8)
    np.testing.assert_allclose(kept[1](image), kept[1](image[:, :8, :8]), rtol=1e-6)


def test_the_reference_is_of_all_pictures_and_kept(kept, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 16)
    extractor, noise = kept[1], source()
    found = reference(extractor, noise)
    whole = features_of(extractor, [np.stack([noise[i]["image"] for i in range(40)])])
    assert whole.shape == (40, 16) and whole.dtype == np.float32
    np.testing.assert_allclose(found.covariance, Moments.of(whole).covariance, rtol=1e-4, atol=1e-6)
    assert found.count == 40
    assert frechet_distance(found, Moments.of(whole)) == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(features, "_in_batches", None)
    assert reference(extractor, source()).mean.tolist() == found.mean.tolist()
    with pytest.raises(TypeError):
        reference(extractor, source(seed=1))  # other pictures are looked at


def test_last_batches_may_be_short(kept):
    noise = source()
    np.testing.assert_allclose(
        features_of(kept[1], pictures(noise, 16)), features_of(kept[1], pictures(noise, 40)), rtol=1e-4, atol=1e-5
    )


def test_digests_are_of_pictures_and_labels():
    assert digest(source(), "label") == digest(source(), "label") != digest(source())
    assert digest(source()) != digest(source(seed=1))
    assert cache.checksum(["ab", "c"]) != cache.checksum(["a", "bc"])
    assert cache.checksum([np.zeros((2, 3))]) != cache.checksum([np.zeros((3, 2))])


@pytest.mark.parametrize("damage", ["half", "other", "no file of arrays", "empty"])
def test_a_damaged_file_is_made_again(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNJAX_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(100.0), "b": np.ones((2, 2), np.float32)}

    first = cache.cached("name", make)
    file = tmp_path / "features" / "name.npz"
    content = file.read_bytes()
    if damage == "other":  # a right .npz, whose arrays are not those that were kept
        with np.load(file) as stored:
            np.savez(file, **{**stored, "a": np.zeros(100)})
    else:
        file.write_bytes({"half": content[: len(content) // 2], "empty": b""}.get(damage, b"some text"))
    again = cache.cached("name", make)
    assert len(made) == 2
    np.testing.assert_array_equal(again["a"], first["a"])
    third = cache.cached("name", make)
    assert len(made) == 2 and third.keys() == {"a", "b"} and third["b"].dtype == np.float32
    assert [each.name for each in file.parent.iterdir()] == ["name.npz"]


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setenv("DYNJAX_CACHE", str(file))
    made = []
    for _ in range(2):
        cache.cached("name", lambda: made.append(1) or {"a": np.zeros(1)})
    assert len(made) == 2
    monkeypatch.setenv("DYNJAX_CACHE", "~nobody_of_that_name")
    assert cache.cached("name", lambda: {"a": np.zeros(1)})["a"].tolist() == [0]


def test_what_does_not_fit_is_refused(kept):
    with pytest.raises(UserError, match="has image, mask: a classifier is trained on pictures with labels"):
        make_extractor("classifier", make_source(DataConfig("digits", examples=10), "val"))
    with pytest.raises(UserError, match="weights are read for inception only"):
        make_extractor("classifier", source(), "some.npz")
    with pytest.raises(UserError, match="features of no pictures"):
        features_of(kept[1], [])
