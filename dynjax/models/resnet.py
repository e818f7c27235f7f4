"""A residual network for small pictures (He et al. 2016, arXiv:1512.03385, section 4.2), and dynamics put into it.

Deviation: a stage begins with a layer of its own that halves the resolution, so that every residual block keeps its
input's shape and can be skipped.

Letters: B examples, H W pixels, C channels, K classes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.core.controls import RandomGate
from dynjax.core.gates import ChannelGate
from dynjax.models import rules
from dynjax.models.blocks import Block, Down, batch_norm, gather_pixels, make_gate, pixels
from dynjax.models.exits import with_exits
from dynjax.models.registry import BUDGET, SOLVED, Family, filled, register
from dynjax.models.rules import Counts, Rule, Widths
from dynjax.ops import Channels, Skip, Slimmable, dynamize
from dynjax.ops.policy import PolicySkip


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A residual network for small pictures and the dynamics put into its blocks."""

    family: Literal["resnet"] = "resnet"
    stem_stride: int = 1
    """The first stage works at 1/stem_stride of the picture: 1 or 2."""
    widths: Widths = (16, 32, 64)
    """Channels of each stage; each further stage works at half the resolution of the one before."""
    blocks: Counts = (3, 3, 3)
    """Residual blocks of each stage."""
    dynamics: Literal["static", "skip", "policy", "reinforce", "channels", "slices", "exits"] = "static"
    """skip: a gate before each block; policy: one network decides all blocks, and reinforce is the same trained by
    REINFORCE; channels: groups of hidden channels; slices: one of several hidden widths; exits: a head after each
    stage. All per picture."""
    gate: Literal["learned", "random"] = "learned"
    groups: int = 4
    """Groups of hidden channels, or slices of the hidden width."""


class Stem(nnx.Module):
    """A 3x3 convolution, batch normalisation and ReLU; with a stride of 2 on every 2x2 pixels as one. Then half the
    resolution, `halvings` times."""

    def __init__(self, channels: int, stride: int, halvings: int = 0, *, rngs: nnx.Rngs):
        self.stride = stride
        self.conv = nnx.Conv(3 * stride**2, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = batch_norm(channels, rngs=rngs)
        self.down = nnx.List([Down(channels, channels, rngs=rngs) for _ in range(halvings)])

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        x = nnx.relu(self.norm(self.conv(gather_pixels(x) if self.stride == 2 else x)))
        for down in self.down:
            x = down(x)
        return x


class Stage(nnx.Module):
    """A change of resolution (or the stem) and residual blocks."""

    def __init__(self, entry: Stem | Down, channels: int, blocks: int, *, rngs: nnx.Rngs):
        self.entry = entry
        self.blocks = nnx.List([Block(channels, rngs=rngs) for _ in range(blocks)])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return x


class Head(nnx.Module):
    """Logits from the mean over the map."""

    def __init__(self, channels: int, classes: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        return self.linear(x.mean((1, 2))).astype(jnp.float32)


class ResNet(nnx.Module):
    """Logits for every picture: (B, H, W, 3) bytes to (B, K) float32.

    Args:
        widths: channels of each stage; the first works at 1/`stem_stride` of the picture's resolution, each further one
            at half of the one before.
        blocks: residual blocks of each stage.
    """

    def __init__(
        self, classes: int, widths: Sequence[int], blocks: Sequence[int], stem_stride: int = 1, *, rngs: nnx.Rngs
    ):
        entries: list[Stem | Down] = [Stem(widths[0], stem_stride, rngs=rngs)]
        entries += [Down(before, after, rngs=rngs) for before, after in itertools.pairwise(widths)]
        levels = zip(entries, widths, blocks, strict=True)
        self.stages = nnx.List([Stage(entry, w, n, rngs=rngs) for entry, w, n in levels])
        self.head = Head(widths[-1], classes, rngs=rngs)

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        x = pixels(image, self.head.linear.kernel.dtype)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class Shortcut(nnx.Module):
    """A residual block whose two layers are dynamic inside."""

    def __init__(self, body: Channels | Slimmable):
        self.body = body

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return nnx.relu(x + self.body(x))


class PolicyNet(nnx.Module):
    """A ResNet whose residual blocks one small network decides about, from the picture (BlockDrop)."""

    def __init__(self, model: ResNet, random: bool, *, straight_through: bool, rngs: nnx.Rngs):
        chain: list[nnx.Module] = [module for stage in model.stages for module in (stage.entry, *stage.blocks)]
        skip = [number for number, module in enumerate(chain) if isinstance(module, Block)]
        if random:
            gate: RandomGate | nnx.Sequential = RandomGate(0.5, units=len(skip), rngs=rngs)
        else:
            stem = model.stages[0].entry
            assert isinstance(stem, Stem)
            width = 2 * stem.conv.out_features
            look = [Stem(width // 2, 2, rngs=rngs), Down(width // 2, width, rngs=rngs)]
            gate = nnx.Sequential(*look, ChannelGate(width, len(skip), rngs=rngs))
        self.chain = PolicySkip(chain, gate, skip=skip, straight_through=straight_through)
        self.head = model.head

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        return self.head(self.chain(pixels(image, self.head.linear.kernel.dtype)))


def build(
    config: ResNetConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None
) -> nnx.Module:
    """The ResNet of `config`, with the dynamics that it says."""
    model = filled(ResNet(num_classes, config.widths, config.blocks, config.stem_stride, rngs=rngs), twin_params)
    if config.dynamics == "static":
        return model
    if config.dynamics == "exits":
        heads = [Head(width, num_classes, rngs=rngs) for width in config.widths[:-1]]
        return with_exits(model.stages, [*heads, model.head], config.gate)
    if config.dynamics in ("policy", "reinforce"):
        return PolicyNet(model, config.gate == "random", straight_through=config.dynamics == "policy", rngs=rngs)

    def skip(block: Block, channels: int, rngs: nnx.Rngs) -> Skip:
        return Skip(block, make_gate(config.gate, channels, rngs=rngs))

    def channels(block: Block, channels: int, rngs: nnx.Rngs) -> Shortcut:
        gate = make_gate(config.gate, channels, groups=config.groups, rngs=rngs)
        return Shortcut(Channels([block.conv1, block.norm1, nnx.relu], [block.conv2, block.norm2], gate))

    def slices(block: Block, channels: int, rngs: nnx.Rngs) -> Shortcut:
        widths = tuple((k + 1) / config.groups for k in range(config.groups))
        gate = make_gate(config.gate, channels, branches=config.groups, rngs=rngs)
        return Shortcut(
            Slimmable([block.conv1, block.norm1, nnx.relu], [block.conv2, block.norm2], gate, widths=widths)
        )

    wrap = {"skip": skip, "channels": channels, "slices": slices}[config.dynamics]
    return dynamize(model, {r"stages/\d+/blocks/\d+": wrap}, rngs=rngs)


def _rules(config: ResNetConfig) -> Iterator[Rule]:
    yield from rules.levels(config.widths, config.blocks, "stage")
    yield from rules.one_of("stem_stride", config.stem_stride, 1, 2)
    if config.dynamics not in ("static", "exits"):
        yield from rules.has_blocks(config.blocks, config.dynamics)
    wide = [width for width, count in zip(config.widths, config.blocks, strict=True) if count]
    if config.dynamics in ("channels", "slices"):
        most = min(wide, default=1)
        yield Rule("groups", config.groups, 1 <= config.groups <= most, f"from 1 to {most}")
    if config.dynamics == "channels":
        divides = all(width % config.groups == 0 for width in wide)
        wanted = f"a divisor of all --model.widths {' '.join(map(str, config.widths))}"
        yield Rule("groups", config.groups, divides, wanted)


def _uses(config: ResNetConfig) -> frozenset[str]:
    special = {
        "exits": SOLVED,
        # Of REINFORCE the reward says what blocks cost.
        "reinforce": SOLVED | {"loss.reinforce", "loss.wrong"},
        "slices": BUDGET | {"loss.load_balance"},
    }
    return special.get(config.dynamics, BUDGET)


FAMILY = register(
    Family(
        ResNetConfig,
        build,
        tiny=dict(widths=(4, 8), blocks=(1, 1), groups=2),
        rules=_rules,
        uses=_uses,
        apart=("groups",),
    )
)
