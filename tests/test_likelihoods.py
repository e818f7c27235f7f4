"""Likelihoods of pixels: they sum to 1, agree with a calculation by hand, and draws follow them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynjax.models import likelihoods
from dynjax.models.likelihoods import Categorical, Logistic, make_likelihood, quantise, to_bytes

KINDS = {
    "binary": Categorical(2),
    "categorical": Categorical(5),
    "grey logistic": Logistic(4, 1, 2),
    "colour logistic": Logistic(3, 3, 2),
}


def every_value(kind):
    """All values of a pixel (N, C)."""
    return jnp.asarray(list(itertools.product(range(kind.values), repeat=kind.channels)))


def some_params(kind, seed=0):
    return jax.random.normal(jax.random.key(seed), (kind.parameters,))


@pytest.mark.parametrize("name", KINDS)
def test_probabilities_sum_to_one(name):
    kind = KINDS[name]
    x = every_value(kind)
    params = jnp.broadcast_to(some_params(kind), (len(x), kind.parameters))
    assert float(jnp.exp(kind.log_prob(params, x)).sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_draws_follow_the_probabilities(name):
    kind, number = KINDS[name], 40_000
    x = every_value(kind)
    params = some_params(kind, 1)
    wanted = jnp.exp(kind.log_prob(jnp.broadcast_to(params, (len(x), params.size)), x))
    noise = kind.noise(jax.random.key(2), (number,))
    drawn = np.asarray(kind.draw(jnp.broadcast_to(params, (number, params.size)), noise))
    assert drawn.min() >= 0 and drawn.max() < kind.values
    code = drawn @ kind.values ** np.arange(kind.channels)[::-1]
    found = np.bincount(code, minlength=len(x)) / number
    np.testing.assert_allclose(found, wanted, atol=0.012)  # five standard deviations at most


def test_logistic_by_hand():
    """One component of 4 values: bins of half-width 1/3 around -1, -1/3, 1/3, 1, the outer ones with the tails."""
    mean, scale = 0.2, 0.5
    sigmoid = lambda edge: 1 / (1 + np.exp(-(edge - mean) / scale))  # noqa: E731
    inner = [sigmoid(edge) for edge in (-2 / 3, 0, 2 / 3)]
    wanted = np.diff([0, *inner, 1])
    params = jnp.tile(jnp.array([3.0, mean, np.log(scale)], jnp.float32), (4, 1))
    found = jnp.exp(Logistic(4, 1, 1).log_prob(params, jnp.arange(4)[:, None]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_later_colour_follows_the_one_before():
    """The mean of the second channel is its own plus tanh(coefficient) times the first."""
    kind = Logistic(256, 2, 1)
    params = jnp.array([[0.0, 0.0, 0.1, -7.0, -7.0, 0.5]])
    noise = {"component": jnp.zeros((1, 1)), "value": jnp.zeros((1, 2))}
    first, second = np.asarray(kind.draw(params, noise))[0]
    scaled = 2 * first / 255 - 1
    assert second == round((0.1 + np.tanh(0.5) * scaled + 1) / 2 * 255)


def test_a_narrow_bin_has_a_finite_gradient():
    """Far from the mean, and with the smallest scale."""
    kind = Logistic(256, 1, 1)
    value = lambda p: kind.log_prob(p, jnp.array([200]))  # noqa: E731
    found, slope = jax.value_and_grad(value)(jnp.array([0.0, -1.0, -9.0]))
    assert np.isfinite(found) and np.isfinite(slope).all()


def test_entropy_of_a_softmax():
    params = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 1e-9, 1e-9]]))
    np.testing.assert_allclose(Categorical(3).entropy(params), [1.5 * np.log(2), 0], atol=1e-6)


@pytest.mark.parametrize(("values", "of_128"), [(2, 1), (16, 8), (256, 128)])
def test_bytes_become_integers_and_bytes_again(values, of_128):
    image = jnp.broadcast_to(jnp.array([0, 127, 128, 255], jnp.uint8)[None, None, :, None], (1, 1, 4, 3))
    x = quantise(image, values, 1)
    assert x.shape == (1, 1, 4, 1) and x[0, 0, 2, 0] == of_128 and x.max() == values - 1
    np.testing.assert_array_equal(quantise(likelihoods.to_bytes(x, values), values, 1), x)
    assert to_bytes(x, values).shape == (1, 1, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaussian", 2, 1), "likelihood='gaussian'"),
        (("categorical", 1, 1), "values=1"),
        (("categorical", 2, 3), "channels=3"),
    ],
)
def test_another_likelihood(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_likelihood(*arguments)


@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 0.0, 3.0, 100.0])
@pytest.mark.parametrize("mean", [-3000.0, -30.0, 0.3, 30.0, 3000.0])
def test_logistic_far_outside(mean, log_scale):
    """Beside double precision, in which the width of a value in scales is no difference of two large numbers either."""
    values = np.array([0, 1, 128, 254, 255])
    found = Logistic(256, 1, 1).log_prob(
        jnp.tile(jnp.array([0.0, mean, log_scale]), (5, 1)), jnp.asarray(values)[:, None]
    )
    centred, inverse = 2 * values / 255 - 1 - mean, np.exp(-log_scale)
    log_sigmoid = lambda x: -np.logaddexp(0, -x)  # noqa: E731
    above, below = log_sigmoid(inverse * (centred + 1 / 255)), log_sigmoid(-inverse * (centred - 1 / 255))
    wanted = above + below + np.log(-np.expm1(-inverse * 2 / 255))
    wanted = np.where(values == 0, above, np.where(values == 255, below, wanted))
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=3e-6)
