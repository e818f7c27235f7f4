"""A supernet of scales and layers, through which every example takes its own way.

Letters: B examples, H W pixels, C channels of the finest scale.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.ops.routing import Cell, Flow


class Supernet(nnx.Module):
    """Layers of cells, one cell for each scale, whose paths lead to the next layer: up, keep and down.

    The routing space of Li et al. 2020 (arXiv:2003.10401, section 3.1): the first layer has one cell, at the finest
    scale, and each further layer reaches at most one scale more; the last has no paths up or down. Which paths a cell
    has is up to the cell; each has its own gate, so a supernet is steered by the gates' thresholds and trained with
    soft gates (`PathGate`), by sampling (`SampledPaths`), or with all paths open (no gates).

    Args:
        layers: cells, the finest scale first.

    Raises:
        ValueError: if a path leads to no cell, or no path leads to a cell.
    """

    def __init__(self, layers: Sequence[Sequence[Cell]]):
        _check(layers)
        self.layers = nnx.List([nnx.List(cells) for cells in layers])

    def __call__(self, x: Float[Array, "B H W C"]) -> list[Array]:
        """Features of every scale, the finest first; zeros for examples that did not reach it."""
        inputs = [[Flow(x, jnp.ones(x.shape[:1], jnp.float32))]]
        for cells in self.layers:
            outputs = [cell(*flows) for cell, flows in zip(cells, inputs, strict=True)]
            inputs = [[] for _ in range(len(cells) + 1)]
            for scale, out in enumerate(outputs):
                if "up" in out:
                    # An odd size of the finer scale has rows and columns too much.
                    height, width = outputs[scale - 1]["keep"].features.shape[1:3]
                    inputs[scale - 1].append(Flow(out["up"].features[:, :height, :width], out["up"].arrived))
                inputs[scale].append(out["keep"])
                if "down" in out:
                    inputs[scale + 1].append(out["down"])
            inputs = [flows for flows in inputs if flows]
        return [flow.features for (flow,) in inputs]


def _check(layers: Sequence[Sequence[Cell]]) -> None:
    sizes = [len(cells) for cells in layers]
    if not sizes or sizes[0] != 1:
        raise ValueError(f"layers have {sizes} cells; the first layer must have one, at the finest scale")
    for number, (cells, after) in enumerate(zip(layers, [*sizes[1:], 0], strict=True)):
        for scale, cell in enumerate(cells):
            where = f"the cell at layers[{number}][{scale}]"
            if not after and cell.paths != ("keep",):
                raise ValueError(f"{where} is in the last layer, so up and down lead nowhere; leave them out")
            if cell.up is not None and scale == 0:
                raise ValueError(f"{where} has a path up, and is at the finest scale; leave it out")
            if after and cell.down is not None and scale + 1 >= after:
                raise ValueError(f"{where} has a path down, and layers[{number + 1}] has only {after} scales")
        reached = len(cells) + (cells[-1].down is not None)
        if after and not len(cells) <= after <= reached:
            raise ValueError(
                f"layers[{number + 1}] has {after} cells; from the {len(cells)} before it, of which the last "
                f"{'has a' if reached > len(cells) else 'has no'} path down, come {len(cells)} to {reached}"
            )
