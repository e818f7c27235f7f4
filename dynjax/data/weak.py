"""Weak labels: of a mask only a few pixels are left, as if somebody had clicked or drawn a stroke; the rest is ignored.

H, W are a picture's height and width in pixels.
"""

import numpy as np
from jaxtyping import Bool, Shaped

from dynjax.config import UserError

RADIUS = 2
"""Of the disc that a point is drawn as, in pixels."""
DISC = 13
"""Pixels of that disc: a region that has fewer gets a label only where its class has no larger one."""


def weaken(
    mask: Shaped[np.ndarray, "H W"], kind: str, ignored: int, rng: np.random.Generator
) -> Shaped[np.ndarray, "H W"]:
    """A point or a scribble in each connected region of each class, never outside it; what `rng` draws is where.

    points: a disc well inside. scribbles: a part of the region's skeleton, three pixels thick. tags: the classes of the
    mask, each at pixels that say nothing, so that they survive a crop and nothing else does. Raises UserError for
    another kind.
    """
    from skimage.measure import label, regionprops

    if kind == "tags":
        there = np.unique(mask[mask != ignored])
        return rng.choice(there, mask.shape) if there.size else mask
    if kind not in ("points", "scribbles"):
        raise UserError(f"data.weak={kind!r}: there are full, points, scribbles and tags")
    draw = _point if kind == "points" else _scribble
    found = np.full_like(mask, ignored)
    for each in np.unique(mask[mask != ignored]).tolist():
        regions = regionprops(label(mask == each))
        largest = max(region.area for region in regions)
        for region in regions:
            if region.area >= min(DISC, largest):
                # Regions lie in their frames; what is written there is only ever their own pixels.
                found[region.slice][draw(region.image, rng)] = each
    return found


def _point(region: Bool[np.ndarray, "h w"], rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """A disc around a pixel that is at least half as far from the border as any."""
    distances = _distances(region)
    y, x = rng.choice(np.argwhere(distances >= distances.max() / 2))
    rows, columns = np.ogrid[: region.shape[0], : region.shape[1]]
    return region & ((rows - y) ** 2 + (columns - x) ** 2 <= RADIUS**2)


def _scribble(region: Bool[np.ndarray, "h w"], rng: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """The skeleton of what is well inside, as far as it lies near one of its pixels."""
    from scipy.ndimage import binary_dilation
    from skimage.morphology import skeletonize

    inside = _distances(region) > RADIUS
    line = skeletonize(inside if inside.any() else region)
    y, x = rng.choice(np.argwhere(line))
    rows, columns = np.ogrid[: region.shape[0], : region.shape[1]]
    near = (rows - y) ** 2 + (columns - x) ** 2 <= (max(region.shape) / 2) ** 2
    return region & binary_dilation(line & near, np.ones((3, 3), bool))


def _distances(region: Bool[np.ndarray, "h w"]) -> np.ndarray:
    """How far each pixel is from the region's border, that of the picture included."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
