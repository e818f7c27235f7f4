"""A small vision transformer whose MLPs are mixtures of experts (after V-MoE, Riquelme et al. 2021, arXiv:2106.05974).

Deviations: every block has experts, and no token is dropped. Positions are fixed sines and cosines, so any size of
picture goes.

Letters: B examples, H W pixels, T tokens, C features, K classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynjax.models import rules
from dynjax.models.blocks import gather_pixels, pixels
from dynjax.models.registry import BUDGET, Family, filled, register
from dynjax.models.rules import Depth, Range, Rule, Width
from dynjax.ops import Experts, RandomRouter, Router


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A small vision transformer whose MLPs are mixtures of experts."""

    family: Literal["moe"] = "moe"
    patch: Annotated[int, Range(1, 1024)] = 4
    """Side in pixels of the patches that are the tokens."""
    width: Width = 64
    """Features of a token."""
    depth: Depth = 4
    """Blocks of attention and experts."""
    heads: Depth = 4
    hidden: Width = 128
    """Hidden features of an expert; the static twin's MLP has `top` times as many."""
    experts: Depth = 8
    top: Depth = 2
    """The most experts that a token takes."""
    least: Depth = 1
    """The experts that a token takes at any budget; with `top`, every token costs the same."""
    dynamics: Literal["static", "experts"] = "static"
    gate: Literal["learned", "random"] = "learned"


class Block(nnx.Module):
    """Attention and an MLP, each behind a layer normalisation and around a shortcut (Dosovitskiy et al. 2021)."""

    def __init__(self, features: int, heads: int, mlp: nnx.Sequential | Experts, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)
        self.mlp = mlp

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchClassifier(nnx.Module):
    """Logits for every picture: (B, H, W, 3) bytes to (B, K) float32; its patches are the tokens.

    A picture is padded with its edge to whole patches of `patch` pixels.
    """

    def __init__(self, classes: int, config: MoEConfig, *, rngs: nnx.Rngs):
        self.patch = config.patch
        self.embed = nnx.Linear(3 * config.patch**2, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config.width, config.heads, mlp(config, rngs=rngs), rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, rngs=rngs)

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B K"]:
        patches = gather_pixels(pixels(image, self.embed.kernel.dtype), self.patch)
        x = self.embed(patches)
        x = x + positions(*x.shape[1:]).astype(x.dtype)[None]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1)).astype(jnp.float32)


def mlp(config: MoEConfig, *, rngs: nnx.Rngs) -> nnx.Sequential | Experts:
    """The MLP of a block: experts, or for the static twin one network that does the work of `top` experts."""
    if config.dynamics == "static":
        hidden = config.top * config.hidden
        up, down = nnx.Linear(config.width, hidden, rngs=rngs), nnx.Linear(hidden, config.width, rngs=rngs)
        return nnx.Sequential(up, nnx.gelu, down)
    router = make_router(config.gate, config.width, config.experts, config.top, config.least, rngs=rngs)
    return Experts(config.width, config.hidden, config.experts, gate=router, rngs=rngs)


def make_router(
    gate: str, features: int, experts: int, top: int, least: int, *, rngs: nnx.Rngs
) -> RandomRouter | Router:
    """What chooses experts for tokens of `features` numbers."""
    if gate == "random":
        return RandomRouter(experts, top=top, least=least, rngs=rngs)
    return Router(features, experts, top=top, least=least, rngs=rngs)


def positions(height: int, width: int, features: int) -> Float[Array, "h w C"]:
    """Sines and cosines of the row and of the column, a quarter of the features each.

    Vaswani et al. 2017 (arXiv:1706.03762, section 3.5) in two dimensions, as Beyer et al. 2022 (arXiv:2205.01580) do.
    """
    rates = 1e4 ** -np.linspace(0, 1, features // 4)
    angles = [np.arange(side)[:, None] * rates for side in (height, width)]
    rows, columns = (np.concatenate([np.sin(a), np.cos(a)], 1) for a in angles)
    shape = (height, width, features // 2)
    parts = [np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)]
    return jnp.asarray(np.concatenate(parts, -1), jnp.float32)


def build(config: MoEConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The classifier of `config`.

    `twin_params`: variables of a static twin. Its MLPs become experts: expert e starts as the hidden features of part
    e mod top of the `top` that they are cut into. Those of a token's experts are averaged, so a token whose experts
    have different parts and equal weights has the twin's MLP. After the upcycling of Komatsuzaki et al. 2023
    (arXiv:2212.05055), where every expert is the whole MLP.
    """
    model = PatchClassifier(num_classes, config, rngs=rngs)
    if twin_params is None or config.dynamics == "static":
        return filled(model, twin_params)
    shared, mlps = nnx.split_state(twin_params, lambda path, _: "mlp" not in path, ...)
    nnx.update(model, shared)
    for number, block in enumerate(model.blocks):
        experts = block.mlp
        assert isinstance(experts, Experts)
        layers: Mapping[int, Mapping[str, nnx.Variable]] = mlps["blocks"][number]["mlp"]["layers"]
        up, down = layers[0], layers[2]
        part = jnp.arange(config.experts) % config.top
        parts = (config.top, config.hidden)
        experts.up[...] = jnp.moveaxis(up["kernel"][...].reshape(-1, *parts), 1, 0)[part]
        experts.up_bias[...] = up["bias"][...].reshape(parts)[part]
        experts.down[...] = config.top * down["kernel"][...].reshape(*parts, -1)[part]
        experts.down_bias[...] = jnp.broadcast_to(down["bias"][...][None], experts.down_bias.shape)
    return model


def _rules(config: MoEConfig) -> Iterator[Rule]:
    yield Rule("width", config.width, config.width % 4 == 0, "a multiple of 4")
    yield from rules.heads_share("width", config.width, config.heads)
    if config.dynamics == "experts":
        yield from rules.routed(config.experts, config.top, config.least)


def router_uses(gate: str) -> frozenset[str]:
    """Options that training with experts looks at."""
    return BUDGET | {"loss.load_balance"} | ({"loss.router_z"} if gate == "learned" else set())


FAMILY = register(
    Family(
        MoEConfig,
        build,
        tiny=dict(width=8, depth=1, heads=2, hidden=8, experts=2),
        rules=_rules,
        uses=lambda config: router_uses(config.gate),
        apart=("experts", "least"),
    )
)
