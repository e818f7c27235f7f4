"""Losses of segmentation against loops, hand-worked figures and the paper's algorithm, and the memory they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynjax.tasks import losses
from dynjax.tasks.borders import borders, boundary_weights


def boundary(logits, mask):
    """The cross-entropy that `loss.boundary` weighs."""
    return losses.cross_entropy(logits, mask, pixel_weights=boundary_weights(mask))


LOSSES = (
    losses.cross_entropy,
    losses.soft_dice,
    losses.focal,
    losses.lovasz_softmax,
    losses.binary_cross_entropy,
    boundary,
)
# Compiled: eager, each operation of a new shape is compiled by itself, which takes longer.
GRADIENTS = [jax.jit(jax.value_and_grad(loss)) for loss in LOSSES]


@pytest.fixture(scope="module")
def scene():
    """Logits (2, 4, 5, 3) and a mask of the classes 0 and 1 with ignored pixels; class 2 is only ever predicted."""
    random = np.random.default_rng(0)
    mask = random.integers(-1, 2, (2, 4, 5)).astype(np.int32)
    return jnp.asarray(random.normal(size=(2, 4, 5, 3)), jnp.float32), jnp.asarray(mask)


def softmax(logits):
    shares = np.exp(np.asarray(logits, np.float64))
    return shares / shares.sum(-1, keepdims=True)


def mean(of, mask, weights):
    """The weighted mean of `of(where, label)` over the pixels that count."""
    places = [(where, label) for where, label in np.ndenumerate(np.asarray(mask)) if label != -1]
    each = [1.0 if weights is None else weights[label] for _, label in places]
    return np.average([of(where, label) for where, label in places], weights=each)


WEIGHTS = pytest.mark.parametrize("weights", [None, (1.0, 3.0, 0.5)])


@WEIGHTS
def test_cross_entropy_is_the_weighted_mean_over_the_pixels_that_count(scene, weights):
    expected = mean(lambda where, label: -np.log(softmax(scene[0])[where][label]), scene[1], weights)
    found = jax.jit(losses.cross_entropy, static_argnums=2)(*scene, weights)
    assert found == pytest.approx(expected, rel=1e-5)


@WEIGHTS
def test_focal_is_the_cross_entropy_of_pixels_by_how_wrong_they_are(scene, weights):
    share = softmax(scene[0])
    for gamma in (0.0, 1.0, 2.0):
        expected = mean(
            lambda where, label, gamma=gamma: -((1 - share[where][label]) ** gamma) * np.log(share[where][label]),
            scene[1],
            weights,
        )
        found = jax.jit(losses.focal, static_argnums=(2, 3))(*scene, weights, gamma)
        assert found == pytest.approx(expected, rel=1e-5)


@WEIGHTS
def test_every_class_against_all_others(scene, weights):
    logits = np.asarray(scene[0], np.float64)

    def loss(where, label):
        chance = 1 / (1 + np.exp(-logits[where]))
        return -np.mean([np.log(chance[c] if c == label else 1 - chance[c]) for c in range(3)])

    found = jax.jit(losses.binary_cross_entropy, static_argnums=2)(*scene, weights)
    assert found == pytest.approx(mean(loss, scene[1], weights), rel=1e-5)


def test_soft_dice_by_hand():
    # Two pixels with one-hot-like certainty, one undecided between the classes 0 and 1, one ignored; class 2 is absent.
    rows = [[50, 0, 0], [0, 50, 0], [0, 0, -50], [0, 0, 50]]
    logits = jnp.asarray(np.array(rows, np.float32).reshape(1, 2, 2, 3))
    mask = np.array([[[0, 0], [1, -1]]])
    # Class 0: overlap 1 + 0, predicted 1.5, present 2. Class 1: overlap 0.5, predicted 1.5, present 1.
    expected = 1 - (2 * 1 / 3.5 + 2 * 0.5 / 2.5) / 2
    dice = jax.jit(losses.soft_dice)
    assert dice(logits, jnp.asarray(mask)) == pytest.approx(expected, rel=1e-5)
    perfect = 50 * np.eye(3, dtype=np.float32)[mask]
    assert dice(jnp.asarray(perfect), jnp.asarray(mask)) == pytest.approx(0.0, abs=1e-6)


def lovasz(logits, mask):
    """Berman et al. 2018, algorithm 1 as it is written, a mean over classes: value, gradient by probabilities."""
    mask = np.asarray(mask)
    share, labels = softmax(logits)[mask >= 0], mask[mask >= 0]
    value, gradient = 0.0, np.zeros_like(share)
    for label in (present := np.unique(labels)):
        own = labels == label
        errors = np.where(own, 1 - share[:, label], share[:, label])
        order = np.argsort(-errors, kind="stable")
        sorted_own = own[order].astype(float)
        intersection = sorted_own.sum() - sorted_own.cumsum()
        union = sorted_own.sum() + (1 - sorted_own).cumsum()
        weights = 1 - intersection / union
        weights[1:] -= weights[:-1].copy()
        value += errors[order] @ weights / len(present)
        gradient[order, label] = weights / len(present)
        gradient[:, label] *= np.where(own, -1, 1)
    return value, gradient


def test_lovasz_softmax_is_that_of_the_paper(scene):
    logits, mask = scene
    expected, by_share = lovasz(logits, mask)
    value, gradient = GRADIENTS[LOSSES.index(losses.lovasz_softmax)](logits, mask)
    assert value == pytest.approx(expected, rel=1e-5)
    counts = np.asarray(mask) >= 0
    share = softmax(logits)[counts]
    by_logit = share * (by_share - (by_share * share).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(gradient)[counts], by_logit, rtol=1e-4, atol=1e-7)


def test_lovasz_softmax_of_certain_predictions_is_one_minus_the_mean_iou():
    random = np.random.default_rng(3)
    mask, guess = random.integers(-1, 4, (2, 6, 7)), random.integers(0, 5, (2, 6, 7))
    ious = []
    for label in range(4):
        own, found = mask == label, (guess == label) & (mask >= 0)
        ious.append((own & found).sum() / (own | found).sum())
    logits = jnp.asarray(100 * np.eye(5, dtype=np.float32)[guess])
    assert losses.lovasz_softmax(logits, jnp.asarray(mask)) == pytest.approx(1 - np.mean(ious), rel=1e-5)


def test_pixels_weigh_by_their_distance_from_a_border():
    # Columns 0 to 3 are class 0, the others class 1, but for column 9, which is ignored: it makes no border.
    mask = np.repeat(np.array([0] * 4 + [1] * 5 + [-1] + [0] * 15)[None, None], 3, 1)
    assert np.flatnonzero(borders(jnp.asarray(mask))[0, 1]).tolist() == [3, 4]
    weights = jax.jit(boundary_weights, static_argnums=(1, 2))(jnp.asarray(mask), 4.0, 2.0)[0]
    far = np.concatenate([[3, 2, 1, 0], np.arange(21)])
    np.testing.assert_allclose(weights[1], np.where(far <= 6, 1 + 4 * np.exp(-(far**2) / 8), 1), rtol=1e-5)
    assert (weights == weights[:1].repeat(3, 0)).all()
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 25, 2)), jnp.float32)
    pixel = np.asarray(boundary_weights(jnp.asarray(mask)))
    counts = mask >= 0
    entropy = -np.log(np.take_along_axis(softmax(logits), np.maximum(mask, 0)[..., None], -1)[..., 0])
    expected = np.average(entropy[counts], weights=pixel[counts])
    assert boundary(logits, jnp.asarray(mask)) == pytest.approx(expected, rel=1e-5)


def test_smooth_labels():
    logits = jnp.log(jnp.asarray([[[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]]]))
    mask = jnp.asarray([[[0, -1]]])
    smooth = losses.cross_entropy(logits, mask, None, 0.3)  # 0.8 on the label and 0.1 on the two others
    np.testing.assert_allclose(smooth, 0.8 * np.log(2) + 0.2 * np.log(4), rtol=1e-6)


@pytest.mark.parametrize("loss", GRADIENTS)
def test_ignored_pixels_reach_neither_losses_nor_gradients(loss, scene):
    logits, mask = scene
    wild = jnp.where((mask == -1)[..., None], 1e4, logits)
    value, gradient = loss(logits, mask)
    assert value > 0 and value == loss(wild, mask)[0]
    assert not np.asarray(gradient)[np.asarray(mask) == -1].any()
    assert np.asarray(gradient)[np.asarray(mask) != -1].any()


@pytest.mark.parametrize("loss", GRADIENTS)
def test_a_mask_without_pixels_costs_nothing(loss, scene):
    logits, mask = scene
    value, gradient = loss(logits, jnp.full_like(mask, -1))
    assert value == 0 and not np.asarray(gradient).any()


@pytest.mark.parametrize("loss", GRADIENTS)
def test_gradients_of_certain_predictions_are_finite(loss, scene):
    mask = scene[1]
    for certain in (1e4, -1e4):
        value, gradient = loss(certain * (2 * jax.nn.one_hot(mask, 3) - 1), mask)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert value == pytest.approx(0, abs=1e-6) if certain > 0 else value > 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_bfloat16_logits_are_summed_in_float32(loss, scene):
    logits, mask = (jnp.tile(x, (1, 16, 16) + (1,) * (x.ndim - 3)) for x in scene)
    rounded, loss = logits.astype(jnp.bfloat16), jax.jit(loss)
    assert loss(rounded, mask).dtype == jnp.float32
    assert loss(rounded, mask) == loss(rounded.astype(jnp.float32), mask)


def test_wrong_shapes_are_named(scene):
    logits, mask = scene
    for function in LOSSES[:-1]:
        with pytest.raises(ValueError, match=r"\(2, 4, 5, 3\).*\(2, 4, 4\)"):
            function.__wrapped__(logits, mask[:, :, :4])
    for function in (losses.cross_entropy, losses.focal, losses.binary_cross_entropy):
        with pytest.raises(ValueError, match=r"2 class weights.* 3 classes"):
            function(logits, mask, (1.0, 2.0))


@pytest.mark.optimised
@pytest.mark.parametrize("loss", LOSSES)
def test_a_thousand_classes_take_a_few_times_the_memory_of_their_logits(loss):
    logits = jax.ShapeDtypeStruct((2, 16, 24, 1000), jnp.float32)
    mask = jax.ShapeDtypeStruct((2, 16, 24), jnp.int32)
    size = logits.size * 4
    for function, times in ((loss, 3.1), (jax.grad(loss), 2.1)):
        taken = jax.jit(function).lower(logits, mask).compile().memory_analysis().temp_size_in_bytes
        assert taken < times * size
