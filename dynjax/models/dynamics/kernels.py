"""Kernels by content: of copies of a block with other kernels each tile takes one, rich at edges, plain elsewhere.

Letters: B examples, H W pixels, C D channels.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynjax.core import modules
from dynjax.models.blocks import make_gate
from dynjax.models.dense import BackboneConfig, Dense, DynamicsConfig
from dynjax.models.dynamics.tiles import TiledConfig, tiled
from dynjax.models.registry import BUDGET, Family, register
from dynjax.models.rules import Rule
from dynjax.ops import Select

KINDS = {"1x1": (1, 1), "3x3": (3, 1), "3x3 dilated": (3, 2), "5x5": (5, 1)}
"""Side and dilation, the cheapest first."""


@dataclasses.dataclass(frozen=True)
class KernelsConfig(TiledConfig):
    """A choice among kernels, per tile."""

    family: Literal["kernels"] = "kernels"
    kinds: tuple[Literal["1x1", "3x3", "3x3 dilated", "5x5"], ...] = ("1x1", "3x3", "3x3 dilated", "5x5")
    """Kernels of the block's convolutions, the cheapest first."""


def with_kernel(block: nnx.Module, side: int, dilation: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """A copy of `block` whose convolutions of more than one pixel have square kernels of `side` pixels.

    They begin as the block's: with its taps around the centre as far as there is room, and 0 around those.
    """
    copy = nnx.clone(block)
    new = {}
    for _, conv in nnx.iter_modules(copy):
        if isinstance(conv, nnx.Conv) and max(conv.kernel_size) > 1 and conv.kernel_size != (side, side):
            new[id(conv)] = _resized(conv, side, dilation, rngs)
        elif isinstance(conv, nnx.Conv) and max(conv.kernel_size) > 1:
            conv.kernel_dilation = (dilation, dilation)
    modules.replace(copy, new)
    return copy


def _resized(conv: nnx.Conv, side: int, dilation: int, rngs: nnx.Rngs) -> nnx.Conv:
    made = nnx.Conv(
        conv.in_features,
        conv.out_features,
        (side, side),
        kernel_dilation=(dilation, dilation),
        feature_group_count=conv.feature_group_count,
        use_bias=conv.bias is not None,
        rngs=rngs,
    )
    made.kernel[...] = recut(conv.kernel[...], side)
    if conv.bias is not None and made.bias is not None:
        made.bias[...] = conv.bias[...]
    return made


def recut(kernel: Float[Array, "h w I D"], side: int) -> Float[Array, "{side} {side} I D"]:
    """The middle of a kernel of odd sides, with zeros around it where it is smaller."""
    for axis in (0, 1):
        more = (side - kernel.shape[axis]) // 2
        if more >= 0:
            kernel = jnp.pad(kernel, [(more, more) if each == axis else (0, 0) for each in range(4)])
        else:
            kernel = jnp.take(kernel, jnp.arange(-more, kernel.shape[axis] + more), axis)
    return kernel


def build(config: KernelsConfig, model: Dense, *, rngs: nnx.Rngs) -> Dense:
    def wrapper(block: nnx.Module, channels: int, level: int) -> Select:
        blocks = [with_kernel(block, *KINDS[kind], rngs=rngs) for kind in config.kinds]
        return Select(
            blocks, make_gate(config.gate, channels, size=config.tiles[level], branches=len(blocks), rngs=rngs)
        )

    return model.wrap(wrapper, len(config.tiles))


def _rules(config: KernelsConfig, backbone: BackboneConfig) -> Iterator[Rule]:
    yield from tiled(config, backbone)
    wanted = f"two or more of {', '.join(KINDS)}, each once and in this order"
    order = [kind for kind in KINDS if kind in config.kinds]
    yield Rule("kinds", config.kinds, len(order) > 1 and list(config.kinds) == order, wanted)


FAMILY = register(
    Family(
        KernelsConfig,
        build,
        tiny=dict(tiles=(4,), kinds=("1x1", "3x3", "3x3 dilated")),
        rules=_rules,
        uses=BUDGET | {"loss.load_balance"},
    ),
    DynamicsConfig,
)
