"""What tiles with a border of classes took, beside the others."""

import math

import jax.numpy as jnp
import numpy as np
from PIL import Image

from dynjax.core.decision import EACH, ONE, PREFIX, Decision
from dynjax.show import kernels
from dynjax.tasks import segmentation
from dynjax.tasks.borders import kept_at_borders


def test_tiles_with_and_without_a_border():
    mask = np.zeros((2, 8, 12), np.int32)
    mask[0, :, 6:] = 1  # a border between columns 5 and 6: of tiles of 4 pixels the middle ones
    mask[1, :2] = -1  # an ignored row makes none
    keep = np.zeros((2, 2, 3), np.float32)
    keep[0, :, 1] = [1, 0]
    keep[1, 0, 0] = 1
    kinds = np.zeros((2, 2, 3, 3), np.float32)
    kinds[..., 0] = 1
    kinds[0, 0, 1] = [0, 0, 1]
    stages = np.stack([np.ones_like(keep), keep], -1)
    tile = (4 / 8, 4 / 12)
    decisions = {
        "tiles": Decision(keep, keep, "tile", EACH, tile=tile),
        "kinds": Decision(kinds, kinds, "tile", ONE, tile=tile),
        "stages": Decision(stages, stages, "tile", PREFIX, tile=tile),
        "examples": Decision(keep[:, 0, 0], keep[:, 0, 0], "example"),
    }
    found = {each.layer: each for each in kept_at_borders(mask, decisions)}
    assert list(found) == ["tiles", "kinds", "stages"]
    assert all(each.tiles_with_border == 2 / 12 for each in found.values())
    assert (found["tiles"].border, found["tiles"].plain) == (1 / 2, np.float32(1 / 10))
    assert (found["kinds"].border, found["kinds"].plain) == (1 / 2, 0)
    assert (found["stages"].border, found["stages"].plain) == (1 / 2, np.float32(1 / 10))
    (nothing,) = kept_at_borders(np.zeros_like(mask), {"tiles": decisions["tiles"]})
    assert math.isnan(nothing.border) and nothing.tiles_with_border == 0


def test_tiles_that_reach_over_the_picture():
    mask = np.zeros((1, 5, 5), np.int32)
    mask[0, 4, 4] = 1
    keep = np.arange(4, dtype=np.float32).reshape(1, 2, 2) == 3
    (found,) = kept_at_borders(mask, {"x": Decision(keep.astype(np.float32), keep, "tile", tile=(4 / 5, 4 / 5))})
    # The pixel itself and its two neighbours, in three tiles of four.
    assert found.tiles_with_border == 3 / 4 and found.border == np.float32(1 / 3)


def test_the_picture_of_kinds(tmp_path):
    random = np.random.default_rng(0)
    examples = [
        kernels.Chosen(
            name,
            random.integers(0, 256, (24, 36, 3), dtype=np.uint8),
            random.integers(-1, 3, (24, 36)),
            random.integers(0, 4, (3, 5)),
            (8 / 24, 8 / 36),
        )
        for name in ("easiest", "hardest")
    ]
    kernels.plot_kinds(tmp_path / "kinds.png", examples, 4, 3, title="kinds")
    with Image.open(tmp_path / "kinds.png") as picture:
        assert picture.width > 800


def test_the_layer_that_chooses_most_evenly_is_shown():
    def choosing(*kinds: int) -> Decision:
        keep = jnp.eye(3)[jnp.asarray(kinds)].reshape(1, 1, len(kinds), 3)
        return Decision(keep, keep, "tile", ONE)

    one_kind, two, three = choosing(0, 0, 0, 0, 0, 0), choosing(0, 1, 1, 0), choosing(0, 1, 2)
    assert max((one_kind, two, three), key=segmentation._evenness) is three
    assert max((one_kind, two), key=segmentation._evenness) is two
