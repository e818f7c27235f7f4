"""Pictures from a latent: a first one, then one refinement step again and again, for as long as a picture needs it.

The generator draws a small map from the style that a latent and a class give, doubles its resolution a few times, and
refines it; a painter turns any of these maps into a picture. What is dynamic, by `dynamics`: how many steps a picture
takes (`Halt`, per picture or tile), how wide the blocks are (`Slimmable`), with which kernels they look (`HyperConv`
from the style, `CondConv`), at which resolution it stops (a painter at each), or what the discriminator looks at.

Letters: B examples, L latent, V style, H W pixels, h w places of a map, C channels, D those of a map that is painted.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from dynjax.models import rules
from dynjax.models.blocks import as_bytes, in_channels, leaky, make_gate, pixels, repeat_pixels, spread_pixels
from dynjax.models.discriminator import Discriminator, make_dynamic
from dynjax.models.frozen import freeze
from dynjax.models.halting import make_halt
from dynjax.models.registry import BUDGET, Family, register, without_dynamics
from dynjax.models.rules import Depth, Range, Rule, Width, Widths
from dynjax.ops.halting import Halt
from dynjax.ops.kernels import CondConv, HyperConv, with_kernels
from dynjax.ops.width import Slimmable

WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the hidden channels that a block of dynamic width may have."""


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """A generator that refines its picture in steps, and a discriminator."""

    family: Literal["gan"] = "gan"
    shape: tuple[int, int, int] = (32, 32, 1)
    """Height, width and channels (1: grey, 3: colours) of the pictures."""
    latent: Width = 64
    widths: Widths = (64, 32, 24)
    """Channels of the generator's maps, the coarsest first: each has twice the resolution of the one before."""
    hidden: Annotated[int, Range(1, 16)] = 1
    """Hidden channels of a block as a multiple of its channels."""
    fine: Annotated[int, Range(1, 8)] = 2
    """Every place of a map paints so many pixels to a side."""
    steps: Depth = 8
    """Most refinement steps; the static twin always takes as many."""
    discriminator: Widths = (24, 48, 64)
    """Channels of the discriminator's maps, the finest first."""
    conditional: bool = False
    """Pictures can be asked for by their label."""
    dynamics: Literal["static", "steps", "width", "kernels", "scales", "discriminator"] = "static"
    """steps: each picture, or tile, stops refining by itself; width: each has blocks of its own width; kernels: those
    of a block are generated from the style or mixed; scales: a small picture runs a part of the generator only;
    discriminator: what is dynamic is how it looks at pictures (DynamicD)."""
    kernel: Literal["generated", "mixed"] = "generated"
    """Of dynamic kernels: generated from latent and class, or a mixture by what is on the map."""
    tile: Annotated[int, Range(0, 4096)] = 0
    """Side of the tiles that stop refining by themselves, in places of the finest map; 0: whole pictures."""
    gate: Literal["learned", "random"] = "learned"


# Parts of the generator


def unit(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Every place at root mean square 1 (Karras et al. 2018, arXiv:1710.10196, section 4.2)."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


class Look(nnx.Module):
    """A 3x3 convolution, whose kernel may be generated from the style, and a linear layer."""

    def __init__(self, conv: nnx.Conv | CondConv | HyperConv, linear: nnx.Linear):
        self.conv, self.linear = conv, linear

    def __call__(self, x: Float[Array, "B h w C"], style: Float[Array, "B V"]) -> Float[Array, "B h w C"]:
        x = self.conv(x, style) if isinstance(self.conv, HyperConv) else self.conv(x)
        return self.linear(leaky(x))


class Block(nnx.Module):
    """A residual block whose input the style scales, channel by channel. Receptive radius 1.

    The last layer starts at zero, and so the block as the identity.
    """

    def __init__(self, channels: int, hidden: int, style: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Linear(style, channels, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.look: Look | Slimmable = Look(
            nnx.Conv(channels, hidden, (3, 3), rngs=rngs),
            nnx.Linear(hidden, channels, kernel_init=zeros, rngs=rngs),
        )

    def __call__(self, h: Float[Array, "B h w C"], style: Float[Array, "B V"]) -> Float[Array, "B h w C"]:
        x = unit(h) * (1 + self.scale(style))[:, None, None]
        return h + (self.look(x, style) if isinstance(self.look, Look) else self.look(x))


class Repeat(nnx.Module):
    """A block applied so many times to every picture: what `Halt` does without a gate."""

    def __init__(self, step: Block, steps: int):
        self.step, self.max_steps = step, steps

    def __call__(self, h: Float[Array, "B h w C"], style: Float[Array, "B V"]) -> Float[Array, "B h w C"]:
        for _ in range(self.max_steps):
            h = self.step(h, style)
        return h

    def predictions(self, h: Float[Array, "B h w C"], style: Float[Array, "B V"]) -> list[Array]:
        """The last state alone: no other is a picture."""
        return [self(h, style)]


class Painter(nnx.Module):
    """A picture of any map: a 3x3 convolution whose channels are pixels.

    The pixels of a place start alike, so that no pattern of them has to be unlearnt (Aitken et al. 2017,
    arXiv:1707.02937), and far from the ends of tanh.
    """

    def __init__(self, channels: int, colours: int, fine: int, *, rngs: nnx.Rngs):
        self.conv, self.fine = nnx.Conv(channels, colours * fine**2, (3, 3), rngs=rngs), fine
        one = 0.3 * nnx.initializers.lecun_normal()(rngs.params(), (3, 3, channels, colours))
        self.conv.kernel[...] = jnp.tile(one, (1, 1, 1, fine**2))

    def __call__(self, h: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        return jnp.tanh(spread_pixels(self.conv(leaky(unit(h))), self.fine))


class Generator(nnx.Module):
    """Latents (B, L) and labels to pictures (B, H, W, C) from -1 to 1."""

    def __init__(self, config: GanConfig, classes: int, *, rngs: nnx.Rngs):
        style, (first, *others) = config.latent, config.widths
        self.classes, self.map = classes, _smallest(config)
        self.mapping = nnx.Linear(config.latent + classes, style, rngs=rngs)
        self.enter = nnx.Linear(style, self.map[0] * self.map[1] * first, rngs=rngs)
        self.blocks = nnx.List([Block(c, config.hidden * c, style, rngs=rngs) for c in config.widths[:-1]])
        pairs = zip(config.widths, others, strict=False)
        self.wider = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        last = config.widths[-1]
        self.refine: Repeat | Halt = Repeat(Block(last, config.hidden * last, style, rngs=rngs), config.steps)
        painters = config.widths[::-1] if config.dynamics == "scales" else (last,)
        self.painters = nnx.List([Painter(c, config.shape[2], config.fine, rngs=rngs) for c in painters])

    def style(self, latent: Float[Array, "B L"], label: Int[Array, " B"] | None) -> Float[Array, "B V"]:
        """What latent and class come to."""
        z = latent.astype(self.mapping.kernel.dtype)
        z = z * jax.lax.rsqrt((z**2).mean(-1, keepdims=True) + 1e-6)
        if self.classes:
            if label is None:
                raise ValueError(f"this generator draws {self.classes} classes: give the labels (B,)")
            # One-hot and not a gather, whose gradient is slow on CPUs.
            z = jnp.concatenate([z, jax.nn.one_hot(label, self.classes, dtype=z.dtype)], -1)
        return leaky(self.mapping(z))

    def _maps(self, style: Float[Array, "B V"]) -> Iterator[Float[Array, "B h w C"]]:
        """The maps of growing resolution, of which the last is not refined yet."""
        h = self.enter(style).reshape(len(style), *self.map, -1)
        for block, wider in zip(self.blocks, self.wider, strict=True):
            h = block(h, style)
            yield h
            h = repeat_pixels(wider(leaky(h)))
        yield h

    def __call__(
        self, latent: Float[Array, "B L"], label: Int[Array, " B"] | None = None, *, size: int = 0
    ) -> Float[Array, "B H W C"]:
        """The picture at a `size`, which is how often it is halved: nothing beyond the map of that size is run.

        Raises ValueError for a size that has no painter.
        """
        if not 0 <= size < len(self.painters):
            raise ValueError(
                f"size={size}: there are painters of {len(self.painters)} sizes, 0 to {len(self.painters) - 1}"
            )
        style = self.style(latent, label)
        (h,) = itertools.islice(self._maps(style), len(self.blocks) - size, len(self.blocks) - size + 1)
        return self.painters[size](h if size else self.refine(h, style))

    def predictions(self, latent: Float[Array, "B L"], label: Int[Array, " B"] | None = None) -> list[Array]:
        """The picture after every step, if a picture may stop there; the last is that of all steps."""
        style = self.style(latent, label)
        *_, h = self._maps(style)
        return [self.painters[0](state) for state in self.refine.predictions(h, style)]

    def sizes(self, latent: Float[Array, "B L"], label: Int[Array, " B"] | None = None) -> list[Array]:
        """The picture at every size that has a painter, the full size first."""
        style = self.style(latent, label)
        *coarse, h = self._maps(style)
        states = [self.refine(h, style), *reversed(coarse)]
        return [paint(state) for paint, state in zip(self.painters, states, strict=False)]


def _smallest(config: GanConfig) -> tuple[int, int]:
    """Height and width of the coarsest map."""
    step = config.fine * 2 ** (len(config.widths) - 1)
    return config.shape[0] // step, config.shape[1] // step


# The two players together


class GAN(nnx.Module):
    """A generator and the discriminator that it learns from; called, it draws.

    Where pictures may stop after any step, `teacher` is the static twin that it started from: what every step is to
    come to for the same latent.
    """

    def __init__(self, config: GanConfig, classes: int = 0, *, rngs: nnx.Rngs):
        self.shape, self.latent = config.shape, config.latent
        self.classes = classes if config.conditional else 0
        self.generator = Generator(config, self.classes, rngs=rngs)
        self.discriminator = Discriminator(
            config.shape,
            config.discriminator,
            config.fine,
            self.classes,
            sizes=len(self.generator.painters),
            rngs=rngs,
        )
        self.teacher: Generator | None = freeze(nnx.clone(self.generator)) if config.dynamics == "steps" else None

    def __call__(self, latent: Float[Array, "B L"], label: Int[Array, " B"] | None = None) -> Float[Array, "B H W C"]:
        return self.generator(latent, label)

    @property
    def refines(self) -> bool:
        """Whether a picture may stop after any of the steps."""
        return isinstance(self.generator.refine, Halt)

    @property
    def heights(self) -> tuple[int, ...]:
        """Heights of the pictures that it draws, the full size first."""
        return tuple(self.shape[0] >> size for size in range(len(self.generator.painters)))

    def picture(
        self, noise: Float[Array, "B L"], label: Int[Array, " B"] | None = None, *, size: int = 0
    ) -> UInt8[Array, "B H W 3"]:
        """Pictures of bytes, at a size of those that there are."""
        return to_bytes(self.generator(noise, label, size=size))

    def noise(self, key: PRNGKeyArray) -> Float[Array, " L"]:
        """All that chance has to say of one picture."""
        return jax.random.normal(key, (self.latent,))

    def pixels(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W C"]:
        """Bytes as the generator draws: from -1 to 1; grey is the mean of the colours."""
        return in_channels(pixels(image, self.generator.mapping.kernel.dtype), self.shape[2])


def halved(image: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Half the height and width: means of 2x2 pixels."""
    batch, height, width, channels = image.shape
    return image.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def to_bytes(image: Float[Array, "B H W C"]) -> UInt8[Array, "B H W 3"]:
    """Numbers from -1 to 1 as bytes of three colours."""
    return as_bytes((image + 1) / 2)


# What is dynamic


def sorted_hidden(look: Look) -> None:
    """Order the hidden channels, the weightiest first, which changes nothing of what the block gives: the first of them
    are then the best narrow block (Anycost GAN, Lin et al. 2021, arXiv:2103.03243, section 3.2)."""
    assert isinstance(look.conv, nnx.Conv) and look.conv.bias is not None
    order = jnp.argsort(-jnp.abs(look.linear.kernel[...]).sum(1), stable=True)
    look.conv.kernel[...] = look.conv.kernel[...][..., order]
    look.conv.bias[...] = look.conv.bias[...][order]
    look.linear.kernel[...] = look.linear.kernel[...][order]


def _slimmable(look: Look, channels: int, gate: str, rngs: nnx.Rngs) -> Slimmable:
    sorted_hidden(look)
    decides = make_gate(gate, channels, branches=len(WIDTHS), rngs=rngs)
    return Slimmable(look.conv, [leaky, look.linear], decides, widths=WIDTHS)


def _with_kernels(look: Look, kind: str, style: int, gate: str, rngs: nnx.Rngs) -> Look:
    conv, random = look.conv, gate == "random"
    assert isinstance(conv, nnx.Conv) and conv.bias is not None
    shape = conv.in_features, conv.out_features, (3, 3)
    if kind == "mixed":
        mixed = with_kernels(look, {"conv": "condconv"}, random=random, rngs=rngs)
        assert isinstance(mixed, Look)
        return mixed
    new = HyperConv(*shape, condition=style, from_input=False, random=random, rngs=rngs)
    assert new.bias is not None
    new.kernel[...], new.bias[...] = conv.kernel[...], conv.bias[...]
    return Look(new, look.linear)


def build(config: GanConfig, classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> GAN:
    """Both players, which are dynamic where the configuration says so."""
    model = GAN(config, classes, rngs=rngs)
    if twin_params is not None:
        nnx.update(model, twin_params)
        model.teacher = freeze(nnx.clone(model.generator)) if model.teacher is not None else None
    generator, gate, last = model.generator, config.gate, config.widths[-1]
    assert isinstance(generator.refine, Repeat)
    step = generator.refine.step
    if config.dynamics == "steps":
        size = config.tile or None
        generator.refine = make_halt(step, gate, last, config.steps, size=size, kind="hard", rngs=rngs)
    if config.dynamics == "discriminator":
        make_dynamic(model.discriminator, gate, rngs=rngs)
    dress: Callable[[Look, int], Look | Slimmable]
    if config.dynamics == "width":
        dress = lambda look, channels: _slimmable(look, channels, gate, rngs)  # noqa: E731
    elif config.dynamics == "kernels":
        dress = lambda look, _: _with_kernels(look, config.kernel, config.latent, gate, rngs)  # noqa: E731
    else:
        return model
    for block, channels in zip([*generator.blocks, step], config.widths, strict=True):
        assert isinstance(block.look, Look)
        block.look = dress(block.look, channels)
    return model


def _rules(config: GanConfig) -> Iterator[Rule]:
    yield from rules.picture(config.shape)
    (height, width, _), levels = config.shape, len(config.widths)
    yield Rule("widths", config.widths, levels >= 1, "one number of channels for each map")
    step = config.fine * 2 ** (levels - 1)
    fits = height % step == 0 and width % step == 0
    yield Rule("widths", config.widths, fits, f"fewer: {height}x{width} pixels are no multiple of {step}")
    deep, side = len(config.discriminator), config.fine * 2 ** (len(config.discriminator) - 1)
    yield Rule("discriminator", config.discriminator, deep >= 1, "one number of channels for each map")
    halved = height % side == 0 and width % side == 0
    yield Rule(
        "discriminator", config.discriminator, halved, f"fewer: {height}x{width} pixels are no multiple of {side}"
    )
    several = config.dynamics != "scales" or levels > 1
    yield Rule("widths", config.widths, several, "two numbers or more: one for each size")
    same = config.dynamics != "scales" or deep == levels
    yield Rule("discriminator", config.discriminator, same, f"one number for each of the {levels} sizes")
    tiles = not config.tile or config.dynamics == "steps"
    yield Rule("tile", config.tile, tiles, "0: only pictures that are refined in steps have tiles")
    asked = config.dynamics != "scales" or config.gate != "random"
    yield Rule("gate", config.gate, asked, "learned: a size is asked for, and no gate decides about it")


def _twin(config: GanConfig) -> GanConfig:
    return dataclasses.replace(without_dynamics(config), tile=0)


def _tiny(config: GanConfig) -> dict[str, object]:
    return dict(shape=(8, 8, 1), latent=4, widths=(4, 4), steps=2, discriminator=(4, 4), tile=min(config.tile, 2))


FAMILY = register(
    Family(
        GanConfig,
        build,
        task="adversarial",
        tiny=_tiny,
        rules=_rules,
        uses=lambda config: BUDGET if config.dynamics in ("steps", "width", "discriminator") else frozenset(),
        twin=_twin,
        apart=("tile", "kernel"),
        base=lambda config: _twin(config) if config.dynamics == "steps" else config,
    )
)
