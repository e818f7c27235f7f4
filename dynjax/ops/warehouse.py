"""Kernels of the example, assembled from cells that the layers of a stage share (Li and Yao 2024, arXiv:2406.07879).

Letters: B examples, H W pixels, h w pixels of the output, C D channels in and out, I channels of a group, F features,
P parts of a layer's kernel, N cells of the warehouse.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core.geometry import Sides
from dynjax.ops.attention import Attention
from dynjax.ops.kernels import ConvOptions, ExampleConv, mean_of

Shape = tuple[int, int, int, int]
"""Of a kernel, or of a cell: height, width, channels in (of a group) and out."""
RELEASED = 0.1
"""Share of the training in which the attention comes free of where it begins."""


class Warehouse(nnx.Module):
    """The cells of several layers' kernels: N = b times the parts that all these kernels are cut into.

    By default a cell is a pixel of a kernel with as many channels as divide those of all layers (kernel partition). A
    part begins as one cell alone, whose numbers are those that its layer's kernel would begin with.

    Args:
        kernels: shapes of the kernels, in the order of the layers.
        budget: b, the warehouse's parameters as a multiple of those of `kernels`; N is rounded down, but at least 1.
        cell: another shape of the cells.

    Raises:
        ValueError: for no kernels, a budget that is not positive, or a cell that does not divide a kernel.
    """

    def __init__(self, kernels: Sequence[Shape], budget: float = 1.0, *, cell: Shape | None = None, rngs: nnx.Rngs):
        if not kernels:
            raise ValueError("kernels=[]: a warehouse needs the shapes of the kernels that are assembled from it")
        if not budget > 0:
            raise ValueError(f"budget={budget} must be positive: parameters as a multiple of those of the kernels")
        self.kernels = tuple(map(tuple, kernels))
        self.cell = cell or (1, 1, math.gcd(*(kernel[2] for kernel in kernels)), math.gcd(*(k[3] for k in kernels)))
        for kernel in self.kernels:
            if any(side % part for side, part in zip(kernel, self.cell, strict=True)):
                raise ValueError(f"a kernel of shape {kernel} cannot be cut into cells of shape {self.cell}")
        parts = [math.prod(self._grid(layer)) for layer in range(len(kernels))]
        self.first = tuple(sum(parts[:layer]) for layer in range(len(parts) + 1))
        self.size = max(int(self.first[-1] * budget), 1)
        own = np.searchsorted(self.first, np.arange(self.size) * self.first[-1] // self.size, side="right") - 1
        deviation = np.asarray([math.prod(kernel[:3]) ** -0.5 for kernel in self.kernels], np.float32)[own]
        numbers = jax.random.normal(rngs.params(), (self.size, *self.cell))
        self.cells = nnx.Param(numbers * deviation.reshape(-1, 1, 1, 1, 1))

    def _grid(self, layer: int) -> Shape:
        a, b, c, d = (side // part for side, part in zip(self.kernels[layer], self.cell, strict=True))
        return a, b, c, d

    def assembly(self, layer: int) -> "Assembly":
        """Of the kernel of a layer."""
        return Assembly(self._grid(layer), self.cell)

    def beginning(self, layer: int) -> Float[np.ndarray, "P N"]:
        """The binary attention that the layer begins with: a cell of its own for each part, and where there are fewer
        cells than parts, each cell for one of several parts, and no cell for the others."""
        total, parts = self.first[-1], np.arange(self.first[-1])
        cells = parts * self.size // total
        # Of the parts that would have one cell, the first, then the second, and so on: not always the same taps.
        places = parts - np.searchsorted(cells, cells)
        chosen = places == cells % np.bincount(cells)[cells]
        beta = np.zeros((total, self.size), np.float32)
        beta[parts[chosen], cells[chosen]] = 1
        return beta[self.first[layer] : self.first[layer + 1]]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """How a kernel is put together, for `convolve.generated`: a number of parts along each of its axes, and a cell's
    shape."""

    grid: Shape
    cell: Shape

    def __call__(self, weights: Float[Array, "P N"], cells: Float[Array, "N kh kw I D"]) -> Float[Array, "_h _w _i _d"]:
        parts = (weights @ cells.reshape(len(cells), -1)).reshape(*self.grid, *self.cell)
        shape = [number * side for number, side in zip(self.grid, self.cell, strict=True)]
        return parts.transpose(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)


class Held(nnx.Variable):
    """Share of the attention that is still the one it began with. A variable, as `Temperature` is."""


class Contrast(Attention):
    """Attention of each part to all cells, of either sign: tau beta + (1 - tau) z / sum |z| (the contrasting-driven
    attention function).

    z has an entry for each cell and one for a cell of zeros, which is part of the sum. A small number is added to the
    sum, as in the authors' code.

    beta is binary, and what training begins with. `hidden` and `random` are as in `Attention`; what is drawn is z, from
    -1 to 1.
    """

    def __init__(self, features: int, parts: int, cells: int, *, hidden: int, random: bool = False, rngs: nnx.Rngs):
        super().__init__(features, [(parts * (cells + 1), "linear")], hidden=hidden, random=random, rngs=rngs)
        self.held = Held(jnp.zeros(()))

    def schedule(self, progress: Float[Array, ""] | float) -> None:
        """Let tau fall from 1 to 0 in a line, in a tenth of the training, as in `Attention`.

        The authors' code takes 20 of 300 epochs unless told otherwise.
        """
        self.held[...] = 1 - jnp.clip(jnp.asarray(progress, jnp.float32) / RELEASED, 0.0, 1.0)

    def weights(self, features: Float[Array, "B F"], beta: Float[np.ndarray, "P N"]) -> Float[Array, "B P N"]:
        """Float32; of each part the absolute values sum to at most 1."""
        (z,) = self(features)
        tau = self.held[...]
        z = (2 * z - 1 if self.random else z).reshape(len(z), len(beta), -1)
        contrast = z / (jnp.abs(z).sum(-1, keepdims=True) + 1e-3)
        return tau * beta[None] + (1 - tau) * contrast[..., :-1]


class WarehouseConv(ExampleConv):
    """KernelWarehouse: a convolution whose kernel's parts are mixtures of cells that other layers mix too (Li and Yao
    2024, arXiv:2406.07879).

    Part i of the kernel is sum_j a_ij e_j with the cells e of the warehouse and `Contrast` a of the mean of x over the
    map, behind a hidden layer with ReLU. With tau = 1 and a budget from 1 the layer is the static convolution with its
    own cells for a kernel. What is recorded is how much of the kernel each cell makes, mean over parts of |a|.
    Deviations: no batch normalisation in the attention (its hidden layer has a bias instead), so that an example's
    kernel depends on no other; cells begin as the parts of a kernel would.
    MACs: the static convolution, N kh kw I D per example for its kernel, and A (C + P (N + 1)) of the attention, whose
    hidden layer has A = max(C / reduction, 16) units.

    Args:
        warehouse: shared with other layers.
        layer: whose kernel this is, a place in `warehouse.kernels`.
        reduction: by which the attention's hidden layer is smaller than the input.

    Raises:
        ValueError: if the warehouse has no such layer, or one with another kernel.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sides,
        strides: Sides = 1,
        *,
        warehouse: Warehouse,
        layer: int,
        reduction: int = 16,
        random: bool = False,
        rngs: nnx.Rngs,
        **conv: Unpack[ConvOptions],
    ):
        super().__init__(in_features, out_features, kernel_size, strides, rngs=rngs, **conv)
        if not 0 <= layer < len(warehouse.kernels):
            raise ValueError(
                f"layer={layer} must be one of the {len(warehouse.kernels)} that the warehouse is made for"
            )
        if warehouse.kernels[layer] != self.kernel_shape:
            raise ValueError(
                f"layer={layer} of the warehouse has a kernel of shape {warehouse.kernels[layer]}, "
                f"and this one is {self.kernel_shape}"
            )
        self.warehouse, self.layer = warehouse, layer
        parts, cells = warehouse.beginning(layer).shape
        hidden = max(in_features // reduction, 16)
        self.attention = Contrast(in_features, parts, cells, hidden=hidden, random=random, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        weights = self.attention.weights(mean_of(x), self.warehouse.beginning(self.layer))
        cells = self.warehouse.cells[...]
        self._record(jnp.abs(weights).mean(1))
        y = self._convolve(x, weights.astype(cells.dtype), cells, self.warehouse.assembly(self.layer))
        return self._with_bias(y)
