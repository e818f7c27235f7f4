"""Where the classes of a mask meet: weights of pixels near a border, and how well predicted borders lie on true ones.

Masks hold class numbers, and -1 where a pixel is ignored. Axis letters: B batch, H W pixels, C classes.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from dynjax.core.decision import Decision

TOLERANCE = 0.0075
"""Share of a picture's diagonal by which a predicted border may be off (Csurka et al. 2013)."""


def borders(mask: Int[Array, "B H W"]) -> Bool[Array, "B H W"]:
    """Pixels with a neighbour, of four, of another class; where either of the two is ignored they do not meet.

    The edge of the picture is no border, nor is one that is ignored itself, as those of Pascal VOC's masks are.
    """
    height, width = mask.shape[1:]
    padded = jnp.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    found = jnp.zeros(mask.shape, bool)
    for row, column in ((0, 1), (2, 1), (1, 0), (1, 2)):
        beside = padded[:, row : row + height, column : column + width]
        found |= (beside >= 0) & (beside != mask)
    return found & (mask >= 0)


def boundary_weights(mask: Int[Array, "B H W"], strength: float = 10.0, sigma: float = 5.0) -> Float[Array, "B H W"]:
    """1 + strength exp(-d^2 / (2 sigma^2)), d the pixels from here to the nearest border, up to three sigma; then 1.

    After Ronneberger et al. 2015 (U-Net, equation 2), whose weights have d1 + d2, the distances to the two nearest
    cells, instead of d: they are of instances, and classes have none. Distances here are those of the larger
    coordinate, since they are dilations by 3x3 pixels, and the balance of classes is `class_weights`'.
    """
    radius = math.floor(3 * sigma)
    values = [strength * math.exp(-(distance**2) / (2 * sigma**2)) for distance in range(radius + 1)] + [0.0]
    reached, weights = borders(mask)[..., None].astype(jnp.float32), jnp.ones((*mask.shape, 1), jnp.float32)
    # What is reached at a distance is reached at all larger ones: these differences add up to the value at the first.
    for value, further in itertools.pairwise(values):
        weights += (value - further) * reached
        reached = nnx.max_pool(reached, (3, 3), padding="SAME")
    return weights[..., 0]


def boundary_counts(guess: Int[Array, "B H W"], mask: Int[Array, "B H W"], classes: int) -> Int[Array, "{classes} 4"]:
    """For each class: pixels on its predicted borders, those of them within the tolerance of a true border pixel of the
    class, pixels on its true borders, and those of them within the tolerance of a predicted one; int32.

    What is predicted of ignored pixels is ignored. The tolerance is 0.75% of the diagonal, at least a pixel. ValueError
    where the shapes disagree.
    """
    if guess.shape != mask.shape:
        raise ValueError(f"predictions {guess.shape} and the mask {mask.shape} must be of one shape")
    radius = max(1.0, TOLERANCE * math.hypot(*mask.shape[1:]))
    guess = jnp.where(mask >= 0, guess, -1)
    # A map holds the class of border pixels and -1 elsewhere, so that all classes are compared at once.
    found, true = (jnp.where(borders(labels), labels, -1) for labels in (guess, mask))
    counts = []
    for own, others in ((found, true), (true, found)):
        near = (own >= 0) & _nearby(own, others, radius)
        pixels = jnp.stack([jnp.ones_like(own), near], -1).reshape(-1, 2)
        # Pixels that are on no border go to a row more.
        place = jnp.where(own >= 0, own, classes).reshape(-1)
        counts.append(jnp.zeros((classes + 1, 2), jnp.int32).at[place].add(pixels.astype(jnp.int32))[:-1])
    return jnp.concatenate(counts, 1)


def boundary_scores(counts: Num[np.ndarray, "C 4"]) -> dict[str, Any]:
    """`boundary_f1`, and the list `class_boundary_f1` (one a class), of the sum of `boundary_counts`.

    Csurka et al. 2013 (BMVC): 2 P R / (P + R), precision P the share of predicted border pixels near a true
    one, recall R the share of true ones near a predicted one. They score every picture and take the mean; here the
    counts are summed over the split first, as those of the IoU are. A class without a border in truth or prediction is
    nan and is left out of the mean, nan where there is none.
    """
    predicted, right, true, found = np.asarray(counts, np.float64).T
    seen = predicted + true > 0
    precision, recall = right / np.maximum(predicted, 1), found / np.maximum(true, 1)
    both = precision + recall
    each = np.where(seen, 2 * precision * recall / np.where(both > 0, both, 1), np.nan)
    return {
        "boundary_f1": float(each[seen].mean()) if seen.any() else np.nan,
        "class_boundary_f1": each.tolist(),
    }


def _nearby(own: Int[Array, "B H W"], others: Int[Array, "B H W"], radius: float) -> Bool[Array, "B H W"]:
    """Whether somewhere within `radius` pixels `others` is what `own` is here; one offset after the other, so that the
    memory is that of two maps whatever the radius and the number of classes."""
    reach = math.floor(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    offsets = jnp.asarray(np.argwhere(rows**2 + columns**2 <= radius**2), jnp.int32)
    padded = jnp.pad(others, ((0, 0), (reach, reach), (reach, reach)), constant_values=-1)

    def look(index: Array, near: Array) -> Array:
        row, column = offsets[index]
        return near | (own == jax.lax.dynamic_slice(padded, (0, row, column), own.shape))

    return jax.lax.fori_loop(0, len(offsets), look, jnp.zeros(own.shape, bool))


@dataclasses.dataclass(frozen=True)
class Kept:
    """How much of a layer's tiles was kept where classes meet and elsewhere; of one of several kinds of work, how many
    took another than the cheapest."""

    layer: str
    border: float
    """Share of the tiles with a border of classes in them; nan where there is none."""
    plain: float
    """Share of the others."""
    tiles_with_border: float
    """Share of the tiles."""


def kept_at_borders(masks: Int[np.ndarray, "B H W"], decisions: Mapping[str, Decision]) -> list[Kept]:
    """Of every decision about tiles; masks are of the same examples."""
    edges = np.asarray(borders(jnp.asarray(masks)))
    found = []
    for path, decision in decisions.items():
        keep = np.asarray(decision.keep)
        if decision.place != "tile":
            continue
        chosen = keep if keep.ndim == 3 else _rich(keep, decision)
        tile = decision.tile or (1 / chosen.shape[1], 1 / chosen.shape[2])
        has = _tiles_with(edges, tile, chosen.shape[1:])
        border, plain = (float(chosen[where].mean()) if where.any() else math.nan for where in (has, ~has))
        found.append(Kept(path, border, plain, float(has.mean())))
    return found


def _rich(keep: np.ndarray, decision: Decision) -> np.ndarray:
    """Of several kinds: whether it is another than the first, or of stages the share beyond the first."""
    return keep[..., 1:].sum(-1) if decision.rule.most is not None else keep[..., 1:].mean(-1)


def _tiles_with(
    edges: Bool[np.ndarray, "B H W"], tile: tuple[float, float], grid: tuple[int, ...]
) -> Bool[np.ndarray, "B h w"]:
    """Tiles, of so large a share of the picture's sides, in which there is an edge."""
    rows, columns = (
        np.minimum((np.arange(pixels) + 0.5) / pixels / side, tiles - 1).astype(int)
        for pixels, side, tiles in zip(edges.shape[1:], tile, grid, strict=True)
    )
    found = np.zeros((len(edges), *grid), bool)
    examples, y, x = np.nonzero(edges)
    found[examples, rows[y], columns[x]] = True
    return found
