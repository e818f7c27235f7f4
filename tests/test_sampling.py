"""Samplers give the same pictures from the same noise, bit for bit, however little they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make
from flax import nnx

from dynjax import budget, models
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.models.pixeltransformer import PixelTransformerConfig
from dynjax.ops import sampling
from dynjax.ops.sampling import Known

SHAPE = (6, 5, 1)
CONFIGS = {
    "binary": PixelCNNConfig(shape=SHAPE, features=6, layers=2, conditional=True),
    "categorical": PixelCNNConfig(shape=SHAPE, values=256, features=6, layers=1),
    "logistic": PixelCNNConfig(shape=(6, 5, 3), values=256, likelihood="logistic", features=6, layers=1),
    "transformer": PixelTransformerConfig(shape=SHAPE, values=4, features=8, layers=1, heads=2, conditional=True),
    "transformer, logistic": PixelTransformerConfig(
        shape=(4, 4, 3), values=256, likelihood="logistic", features=8, layers=1, heads=2
    ),
    "exits": PixelTransformerConfig(shape=SHAPE, values=4, features=8, layers=3, heads=2, dynamics="exits"),
}
_MODELS = {}


def model_of(name):
    if name not in _MODELS:
        _MODELS[name] = make(lambda rngs: models.build(CONFIGS[name], 10, rngs=rngs))
        budget.set_threshold(_MODELS[name], 2.5)  # of exits: some pixels leave and some do not
    return _MODELS[name]


def draw(name, sampler, examples, key=0, *, first=0, completing=False, **options):
    """Compiled; with labels where the model has some."""
    model = model_of(name)
    label = jnp.arange(examples) % 11 - 1 if model.classes else None
    random = np.random.default_rng(0)
    image = jnp.asarray(random.integers(0, model.likelihood.values, (examples, *model.shape)), jnp.int32)
    upper = jnp.broadcast_to(jnp.arange(model.shape[0])[:, None] < 3, (examples, *model.shape[:2]))

    @jax.jit
    def run(key):
        noise = sampling.make_noise(model, key, examples, first)
        known = Known(image, upper) if completing else None
        return sampling.SAMPLERS[sampler](model, noise, label=label, known=known, **options)

    return jax.tree.map(np.asarray, run(jax.random.key(key)))


@pytest.mark.parametrize("name", CONFIGS)
def test_all_samplers_give_the_same_pictures(name):
    wanted = draw(name, "pixel", 5)
    pixels = np.prod(wanted.visits.shape[1:])
    assert wanted.image.min() >= 0 and wanted.image.max() < model_of(name).likelihood.values
    assert len(np.unique(wanted.image)) > 1
    for sampler in ("cached", "plain", "fixed-point"):
        found = draw(name, sampler, 5)
        flipped = int((found.image != wanted.image).any(-1).sum())
        assert flipped == 0, f"{sampler}: {flipped} of {wanted.visits.size} pixels differ"
    assert (wanted.calls == pixels).all()


@pytest.mark.parametrize("strategy", ["loop", "buckets"])
@pytest.mark.parametrize("window", [1, 6])
def test_fixed_point_of_any_window_and_strategy(window, strategy):
    wanted = draw("binary", "cached", 9)
    found = draw("binary", "fixed-point", 9, window=window, strategy=strategy)
    np.testing.assert_array_equal(found.image, wanted.image)


@pytest.mark.parametrize("name", ["binary", "categorical", "logistic", "transformer"])
def test_the_same_picture_in_batches_of_1_to_64(name):
    wanted = draw(name, "fixed-point", 64).image
    for sampler, examples in (("fixed-point", 1), ("cached", 16)):
        np.testing.assert_array_equal(draw(name, sampler, examples).image, wanted[:examples])


def test_pictures_have_numbers_whatever_batch_they_are_in():
    found = draw("categorical", "cached", 3, first=5).image
    np.testing.assert_array_equal(found, draw("categorical", "cached", 8).image[5:])


@pytest.mark.parametrize("threshold", [-30.0, 2.5, 30.0])
@pytest.mark.parametrize(("examples", "strategy"), [(1, "auto"), (3, "loop"), (9, "buckets")])
def test_pixels_that_leave_early_are_drawn_as_if_they_had_not(examples, strategy, threshold):
    """Compact equals masked, for pixels that none, some and all leave."""
    model = nnx.clone(model_of("exits"))
    budget.set_threshold(model, threshold)
    noise = sampling.make_noise(model, jax.random.key(0), examples)
    run = nnx.jit(lambda model, noise: sampling.cached(model, noise).image)
    compact = nnx.view(model, execution="compact", strategy=strategy, raise_if_not_found=False)
    np.testing.assert_array_equal(run(compact, noise), run(model, noise))


def test_calls_are_of_each_picture():
    """A picture takes as many calls in a batch as alone."""
    together = draw("categorical", "fixed-point", 6)
    assert len(set(together.calls)) > 1
    alone = [draw("categorical", "fixed-point", 1, first=number).calls[0] for number in range(2)]
    assert list(together.calls[:2]) == alone
    assert (together.calls <= 2 * together.visits[0].size).all()
    # Every call evaluates a window: no pixel more often than there were calls, each at least once.
    assert (together.visits.max((1, 2)) <= together.calls).all() and together.visits.min() >= 1


@pytest.mark.parametrize("name", ["binary", "transformer"])
def test_what_is_given_stays(name):
    found = [draw(name, sampler, 3, completing=True).image for sampler in ("pixel", "cached", "plain", "fixed-point")]
    image = np.random.default_rng(0).integers(0, model_of(name).likelihood.values, (3, *model_of(name).shape))
    np.testing.assert_array_equal(found[0][:, :3], image[:, :3])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_limit_stops_before_the_end():
    whole = draw("binary", "fixed-point", 2)
    limit = int(whole.calls.min()) - 1
    stopped = draw("binary", "fixed-point", 2, limit=limit)
    assert (stopped.calls == limit).all() and (stopped.visits.sum() < whole.visits.sum())
    np.testing.assert_array_equal(draw("binary", "fixed-point", 2, limit=1000).image, whole.image)


def test_other_noise_is_another_picture():
    assert (draw("binary", "cached", 2, key=1).image != draw("binary", "cached", 2).image).any()


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="window=0"):
        draw("binary", "fixed-point", 1, window=0)
