"""Distances between sets of features, against SciPy, brute force and scikit-learn's neighbours."""

import numpy as np
import pytest
import scipy.linalg
from sklearn.neighbors import NearestNeighbors

from dynjax.config import UserError
from dynjax.tasks import distances
from dynjax.tasks.distances import Moments, frechet_distance, kernel_distance, manifolds


def drawn(number, features, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(number, features)) @ rng.normal(size=(features, features)) + shift


def test_moments_are_numpys_and_add_up():
    x = drawn(50, 4, shift=100)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean, x.mean(0))
    np.testing.assert_allclose(moments.covariance, np.cov(x.T))
    summed = Moments.of_sums(50, x.sum(0), x.T @ x)
    added = sum((Moments.of(x[start : start + 7]) for start in range(1, 50, 7)), Moments.of(x[:1]))
    for other in (summed, added):
        assert other.count == 50
        np.testing.assert_allclose(other.mean, moments.mean)
        np.testing.assert_allclose(other.covariance, moments.covariance, rtol=1e-8)


def test_frechet_distance_is_that_of_the_authors_formula():
    a, b = Moments.of(drawn(200, 6)), Moments.of(drawn(100, 6, seed=1, shift=0.3))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_known_gaussians():
    a = Moments(10, np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Moments(10, np.array([1.0, 0.0, 2.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4)  # squares of differences of deviations


def test_frechet_distance_of_singular_covariances():
    few = drawn(5, 20)  # a covariance of rank 4
    a, moved = Moments.of(few), Moments.of(few + 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, moved) == pytest.approx(20, rel=1e-9)
    nothing = Moments(2, np.zeros(20), np.zeros((20, 20)))
    assert frechet_distance(nothing, a) == pytest.approx((a.mean**2).sum() + np.trace(a.covariance))
    apart = np.zeros((20, 20))  # in directions that the other has not
    apart[0, 0] = 9
    other = np.zeros((20, 20))
    other[1, 1] = 4
    assert frechet_distance(Moments(2, np.zeros(20), apart), Moments(2, np.zeros(20), other)) == pytest.approx(13)


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = drawn(6, 3), drawn(6, 3, seed=1)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within = [sum(kernel(s[i], s[j]) for i in range(6) for j in range(6) if i != j) / 30 for s in (x, y)]
    expected = sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / 36
    mean, deviation = kernel_distance(x, y, subsets=3, size=100)
    assert mean == pytest.approx(expected)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased():
    x, y = drawn(3000, 4), drawn(3000, 4)[::-1]
    same = kernel_distance(x, y, subsets=50, size=100)
    assert abs(same.mean) < same.deviation  # around 0, below as well as above
    assert kernel_distance(x, y + 1, subsets=50, size=100).mean > 5 * same.deviation
    assert kernel_distance(x, y, subsets=5, size=100) == kernel_distance(x, y, subsets=5, size=100)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_manifolds_are_those_of_scikit_learns_neighbours(neighbours, monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 16)  # several parts
    real, fake = drawn(60, 5, shift=50), drawn(45, 5, shift=50.5, seed=0) * 1.001
    real[1] = real[0]  # one lies where another one does

    def balls(centres, points):
        """Whether each point lies in the ball of each centre."""
        found = NearestNeighbors(n_neighbors=neighbours + 1, algorithm="brute").fit(centres)
        radii = found.kneighbors(centres)[0][:, -1]
        return np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii[None]

    found, inside = manifolds(real, fake, neighbours), balls(real, fake)
    assert found.precision == pytest.approx(inside.any(1).mean())
    assert found.recall == pytest.approx(balls(fake, real).any(1).mean())
    assert found.density == pytest.approx(inside.sum() / (neighbours * 45))
    assert found.coverage == pytest.approx(inside.any(0).mean())
    assert 0 < found.coverage < 1


def test_manifolds_tell_few_modes_from_poor_pictures():
    real = drawn(400, 3)
    few = manifolds(real, drawn(400, 3)[:40].repeat(10, 0) + 1e-3 * drawn(400, 3, seed=1))
    assert few.precision == 1 and few.coverage < 0.6 and few.recall < 0.6
    far = manifolds(real, real + 1000)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_features_that_have_no_distance_are_refused():
    x = drawn(4, 2)
    with pytest.raises(UserError, match="features of 4 examples: 6 are needed at least"):
        manifolds(x, x)
    with pytest.raises(UserError, match="not finite"):
        Moments.of(np.full((3, 2), np.nan))
    with pytest.raises(UserError, match="features of 2 and of 3 numbers"):
        frechet_distance(Moments.of(x), Moments.of(drawn(4, 3)))
    with pytest.raises(UserError, match="features of 2 and of 3 numbers"):
        kernel_distance(x, drawn(4, 3))
    with pytest.raises(UserError, match="subsets of 1 examples"):
        kernel_distance(x, x, size=1)
    with pytest.raises(UserError, match="sums of 0 examples"):
        Moments.of_sums(0, np.zeros(2), np.zeros((2, 2)))
