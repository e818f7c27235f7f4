"""How far drawn pictures are from real ones, by features of both.

All of it is NumPy in float64: features come from `dynjax.tasks.features`. Every estimate depends on how many pictures
there are, so numbers are compared for the same number only. Letters: N M examples, D features, S a subset's examples.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from dynjax.config import UserError

Features = Num[np.ndarray, "_ _"]
"""Of every example (first axis) as many numbers."""
ROWS = 1024
"""Examples whose distances to all others are in memory at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of features; those of two sets are added for the set of both."""

    count: int
    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    """Divided by count - 1; zeros for a single example."""

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Raises UserError for features that are none, or not finite."""
        x = _checked(features, 1)
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).T @ (x - mean) / max(len(x) - 1, 1))

    @classmethod
    def of_sums(cls, count: int | float, total: Num[np.ndarray, " D"], outer: Num[np.ndarray, "D D"]) -> "Moments":
        """From the number of examples, their sum and the sum of their outer products, which must be sums in float64:
        the covariance is a small difference of large numbers. Raises UserError."""
        total, outer = np.asarray(total, np.float64), np.asarray(outer, np.float64)
        if count < 1 or not (np.isfinite(total).all() and np.isfinite(outer).all()):
            raise UserError(f"sums of {count:g} examples' features: there must be some, and all finite")
        mean = total / count
        covariance = (outer - count * np.outer(mean, mean)) / max(count - 1, 1)
        return cls(round(count), mean, (covariance + covariance.T) / 2)

    def __add__(self, other: "Moments") -> "Moments":
        """Chan et al. 1979: nothing large is subtracted."""
        count, step = self.count + other.count, other.mean - self.mean
        spread = max(self.count - 1, 0) * self.covariance + max(other.count - 1, 0) * other.covariance
        spread = spread + np.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), spread / max(count - 1, 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    With C = R Rᵀ from the eigenvalues of each, the trace of the root is the sum of the singular values of R_aᵀ R_b:
    the roots of the eigenvalues of the symmetric R_bᵀ C_a R_b. Deviation: the authors take the root of the matrix
    C_a C_b, which is not symmetric, drop an imaginary part and add 1e-6 to the diagonals where it fails. It is biased:
    the fewer examples, the larger. Raises UserError for features that are not of the same number.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {a.mean.size} and of {b.mean.size} numbers: they must be of the same extractor")
    both = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    apart = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * both
    return float(max(apart, 0.0))


def _root(covariance: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D E"]:
    """R with R Rᵀ = covariance, and a column for each eigenvalue that is more than rounding."""
    values, vectors = np.linalg.eigh(covariance)
    large = values > np.finfo(np.float64).eps * len(values) * max(values[-1], 0.0)
    return vectors[:, large] * np.sqrt(values[large])


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the subsets' estimates."""

    mean: float
    deviation: float


def kernel_distance(
    real: Features, drawn: Features, subsets: int = 100, size: int = 1000, *, seed: int = 0
) -> KernelDistance:
    """Squared maximum mean discrepancy under the kernel (x·y / D + 1)³, the unbiased estimate (Bińkowski et al. 2018,
    arXiv:1801.01401, section 4 and eq. 4), which may be negative.

    Args:
        subsets: of `size` examples of each set, drawn without replacement; the authors take 100 of 1,000.
        size: no more are drawn than the smaller set has.

    Raises:
        UserError: where a subset has fewer than two examples.
    """
    x, y = _checked(real, 2), _checked(drawn, 2)
    _alike(x, y)
    size = min(size, len(x), len(y))
    if size < 2 or subsets < 1:
        raise UserError(f"{subsets} subsets of {size} examples: there must be 1 subset, of 2, at least")
    rng = np.random.default_rng(seed)

    def draw(features: Features) -> Features:
        return features[rng.choice(len(features), size, replace=False)]

    found = [_discrepancy(draw(x), draw(y)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def _discrepancy(x: Float[np.ndarray, "S D"], y: Float[np.ndarray, "S D"]) -> float:
    """The unbiased estimate of the squared discrepancy: pairs of an example with itself are left out."""
    size, features = x.shape
    within = [((each @ each.T / features + 1) ** 3) for each in (x, y)]
    between = ((x @ y.T / features + 1) ** 3).mean()
    return sum((k.sum() - np.trace(k)) / (size * (size - 1)) for k in within) - 2 * between


@dataclasses.dataclass(frozen=True)
class Manifolds:
    """How two sets of features cover each other. All are 1 where both are drawn alike, but for small sets."""

    precision: float
    """Share of the drawn that lie in a ball around a real example."""
    recall: float
    """Share of the real that lie in a ball around a drawn one."""
    density: float
    """In how many of the real examples' balls a drawn one lies, as a multiple of `neighbours`; may exceed 1."""
    coverage: float
    """Share of the real examples whose ball has a drawn one in it."""


def manifolds(real: Features, drawn: Features, neighbours: int = 5) -> Manifolds:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2) and density and coverage (Naeem
    et al. 2020, arXiv:2002.09797, eq. 3 and 4).

    The ball of an example reaches to its nearest neighbour number `neighbours` in its own set, itself not counted. The
    former take 3 of 50,000 examples, the latter 5 of 10,000; here it is one number for all four. Raises UserError.
    """
    x, y = _checked(real, neighbours + 1), _checked(drawn, neighbours + 1)
    _alike(x, y)
    if neighbours < 1:
        raise UserError(f"neighbours={neighbours}: there must be 1 at least")
    # Distances do not change when both are moved, and are the more exact the nearer to 0 the features are.
    centre = x.mean(0)
    x, y = x - centre, y - centre
    around_real, around_drawn = _radii(x, neighbours), _radii(y, neighbours)
    precise, covered, recalled, balls = np.zeros(len(y), bool), [], [], 0
    for start in range(0, len(x), ROWS):
        part = slice(start, start + ROWS)
        apart = _squares(x[part], y)
        inside = apart <= around_real[part, None]
        precise |= inside.any(0)
        covered.append(inside.any(1))
        recalled.append((apart <= around_drawn[None]).any(1))
        balls += int(inside.sum())
    return Manifolds(
        precision=float(precise.mean()),
        recall=float(np.concatenate(recalled).mean()),
        density=balls / (neighbours * len(y)),
        coverage=float(np.concatenate(covered).mean()),
    )


def _radii(x: Float[np.ndarray, "N D"], neighbours: int) -> Float[np.ndarray, " N"]:
    """Squared distance to the neighbour of that number in the same set."""
    found = []
    for start in range(0, len(x), ROWS):
        apart = _squares(x[start : start + ROWS], x)
        own = np.arange(len(apart))
        apart[own, start + own] = -1.0  # itself comes first, also before an equal one
        found.append(np.partition(apart, neighbours, 1)[:, neighbours])
    return np.concatenate(found)


def _squares(x: Float[np.ndarray, "N D"], y: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "N M"]:
    """Squared distances, by one product of matrices."""
    lengths = (x**2).sum(1)[:, None] + (y**2).sum(1)[None]
    return np.maximum(lengths - 2 * (x @ y.T), 0.0)


def _checked(features: Features, least: int) -> Float[np.ndarray, "_ _"]:
    x = np.asarray(features, np.float64)
    if len(x) < least:
        raise UserError(f"features of {len(x)} examples: {least} are needed at least")
    if not np.isfinite(x).all():
        raise UserError("features that are not finite have no distances")
    return x


def _alike(x: Features, y: Features) -> None:
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and of {y.shape[1]} numbers: they must be of the same extractor")
