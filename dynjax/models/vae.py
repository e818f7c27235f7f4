"""A hierarchical VAE (VDVAE, Child 2021, arXiv:2011.10650) whose top-down groups are skipped picture by picture.

An encoder looks at the picture from fine to coarse. A decoder goes from coarse to fine in groups: each draws latents z,
from the prior p(z|h) of what is drawn so far or, of a picture that is known, from the posterior q(z|h, picture), and
adds them to the state h (section 2.2 and fig. 3). The gate of a group sees h alone: its decision is the same function
whether a picture is drawn or explained, so the bound is exact at every budget, and a group that is skipped has no
latents and a divergence of 0.

Deviations: the posterior is relative to the prior (NVAE, Vahdat & Kautz 2020, arXiv:2007.03898, section 3.2), in units
of its scale; resolutions change by linear layers over 2x2 pixels; there is one 3x3 convolution in each network.

Letters: B examples, H W pixels, h w pixels of a coarser map, F features, G groups, L latents of a pixel, N latents of
a picture, P parameters of a pixel.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from dynjax.core.controls import RandomGate
from dynjax.core.decision import Decision
from dynjax.core.gates import SampleGate
from dynjax.models import rules
from dynjax.models.blocks import gather_pixels, make_gate, spread_pixels
from dynjax.models.likelihoods import DrawnConfig, Noise, make_likelihood, to_bytes
from dynjax.models.registry import BUDGET, Family, filled, register
from dynjax.models.rules import HALVINGS, Counts, Rule, Width
from dynjax.ops.skip import Skip


@dataclasses.dataclass(frozen=True)
class VAEConfig(DrawnConfig):
    """Latents from coarse to fine, in groups that are skipped picture by picture."""

    family: Literal["vae"] = "vae"
    groups: Counts = (3, 3, 0)
    """Groups of latents at each resolution, from the coarsest to that of the picture; each has twice the rows and
    columns of the one before."""
    latents: Width = 4
    """Of a pixel, in each group."""
    features: Width = 32
    inner: Width = 16
    """Features inside of the networks, between which the 3x3 convolutions are."""
    beta: float = 1.0
    """Weight of the divergence in training (beta-VAE, Higgins et al. 2017); the bound that is reported has 1."""
    free_bits: float = 0.0
    """Bits that a group may take, in the mean over a batch, before training counts them (Kingma et al. 2016,
    arXiv:1606.04934, eq. 15); the bound that is reported counts all."""
    dynamics: Literal["static", "groups"] = "static"
    """groups: a gate before each group but the first, before which nothing is known of the picture."""
    gate: Literal["learned", "random"] = "learned"


class State(NamedTuple):
    """What goes from group to group, and what the group adds to the bound."""

    h: Float[Array, "B h w F"]
    kl: Float[Array, " B"]
    """Nats; 0 of a group that is skipped."""


class Parts(NamedTuple):
    """The noise of a picture, or of several, whose axis is then the first."""

    latents: Float[Array, "*B N"]
    """Of all groups, one after another."""
    pixels: Noise
    """What the likelihood draws from."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Explained:
    """What a picture comes to with latents drawn from the posterior."""

    params: Float[Array, "B H W P"]
    """Of every pixel's distribution."""
    kl: Float[Array, "B G"]
    """Divergence of each group's posterior from its prior, in nats."""


def relative_kl(shift: Float[Array, "*n"], log_width: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """KL(q|p) of normal distributions in nats: q's mean is `shift` scales of p from that of p, and its scale
    exp(log_width) of them."""
    return 0.5 * (shift**2 + jnp.expm1(2 * log_width)) - log_width


def bounded(x: Float[Array, "*n"], most: float = 4.0) -> Float[Array, "*n"]:
    """`x` bent so that it stays within `most`: a scale that is off by more makes short trainings diverge."""
    return most * jnp.tanh(x / most)


PLAIN = nnx.initializers.lecun_normal()
SMALL = nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
"""Of what is added to the state: many groups do (Child 2021, section 3)."""


class Net(nnx.Module):
    """A 3x3 convolution between two linear layers, each behind a ReLU."""

    def __init__(self, before: int, inner: int, after: int, init: Initializer = SMALL, *, rngs: nnx.Rngs):
        self.narrow = nnx.Linear(before, inner, rngs=rngs)
        self.conv = nnx.Conv(inner, inner, (3, 3), rngs=rngs)
        self.widen = nnx.Linear(inner, after, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return self.widen(nnx.relu(self.conv(nnx.relu(self.narrow(nnx.relu(x))))))


class Group(nnx.Module):
    """Latents of a resolution, and what follows from them (Child 2021, fig. 3)."""

    def __init__(self, features: int, inner: int, latents: int, *, rngs: nnx.Rngs):
        self.latents = latents
        self.prior = Net(features, inner, 2 * latents + features, rngs=rngs)
        # From the start it must tell pictures apart: else the latents are noise that the decoder learns to ignore.
        self.posterior = Net(2 * features, inner, 2 * latents, PLAIN, rngs=rngs)
        self.enter = nnx.Linear(latents, features, kernel_init=SMALL, rngs=rngs)
        self.mix = Net(features, inner, features, rngs=rngs)

    def __call__(
        self, state: State, noise: Float[Array, "B h w L"], seen: Float[Array, "B h w F"] | None = None
    ) -> State:
        """`seen` is what the encoder makes of the picture; without it latents are drawn from the prior."""
        h, n = state.h, self.latents
        mean, log_scale, more = jnp.split(self.prior(h), [n, 2 * n], -1)
        unit, kl = noise.astype(h.dtype), jnp.zeros_like(state.kl)
        if seen is not None:
            shift, log_width = jnp.split(self.posterior(jnp.concatenate([h, seen], -1)), 2, -1)
            log_width = bounded(log_width)
            unit = shift + jnp.exp(log_width) * unit
            kl = relative_kl(shift.astype(kl.dtype), log_width.astype(kl.dtype)).sum((1, 2, 3))
        h = h + more + self.enter(mean + jnp.exp(bounded(log_scale)) * unit)
        return State(h + self.mix(h), kl)


class TopDown(nnx.Module):
    """A gate that sees of a group's input what is drawn so far."""

    def __init__(self, gate: SampleGate | RandomGate):
        self.gate = gate

    def __call__(self, state: State) -> Decision:
        return self.gate(state.h)


class Look(nnx.Module):
    """The encoder's step to a resolution: half that of the one before (not of the first), and a residual network where
    there are groups that use it."""

    def __init__(self, features: int, inner: int, first: bool, used: bool, *, rngs: nnx.Rngs):
        self.down = None if first else nnx.Linear(4 * features, features, rngs=rngs)
        self.net = Net(features, inner, features, rngs=rngs) if used else None

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B h w F"]:
        x = x if self.down is None else self.down(gather_pixels(nnx.relu(x)))
        return x if self.net is None else x + self.net(x)


class VAE(nnx.Module):
    """Pictures of integers: what one comes to under noise of its latents, and pictures that noise makes.

    The same noise gives the same picture, however the model is executed.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        (height, width, channels), f, inner = config.shape, config.features, config.inner
        last = len(config.groups) - 1
        self.shape, self.latents = config.shape, config.latents
        self.likelihood = make_likelihood(config.likelihood, config.values, channels, config.components)
        self.sides = tuple((height >> last - k, width >> last - k) for k in range(last + 1))
        self.enter = nnx.Conv(channels, f, (3, 3), rngs=rngs)
        fine_first = reversed(config.groups)
        self.look = nnx.List([Look(f, inner, k == 0, used > 0, rngs=rngs) for k, used in enumerate(fine_first)])
        self.start = nnx.Param(jnp.zeros((*self.sides[0], f)))
        made: list[list[Group | Skip]] = [
            [Group(f, inner, config.latents, rngs=rngs) for _ in range(count)] for count in config.groups
        ]
        self.groups = nnx.List([nnx.List(each) for each in made])
        self.up = nnx.List([nnx.Linear(f, 4 * f, rngs=rngs) for _ in range(last)])
        self.leave = nnx.Linear(f, self.likelihood.parameters, rngs=rngs)

    def noise(self, key: PRNGKeyArray) -> Parts:
        """All that one picture is drawn from."""
        first, second = jax.random.split(key)
        number = sum(len(groups) * h * w for (h, w), groups in zip(self.sides, self.groups, strict=True))
        drawn = jax.random.normal(first, (number * self.latents,))
        return Parts(drawn, self.likelihood.noise(second, self.shape[:2]))

    def _seen(self, x: Array) -> list[Array]:
        """Features of pictures at every resolution, from the coarsest."""
        scaled = 2 * x.astype(self.enter.kernel.dtype) / (self.likelihood.values - 1) - 1
        found = [self.enter(scaled)]
        for look in self.look:
            found.append(look(found[-1]))
        return found[:0:-1]

    def _descend(
        self, noise: Float[Array, "B N"], seen: Sequence[Array] | None = None
    ) -> tuple[Float[Array, "B H W P"], list[Float[Array, " B"]]]:
        """Parameters of every pixel and the divergence of each group, with latents of the posterior or the prior."""
        examples, start = noise.shape[0], 0
        h = jnp.broadcast_to(self.start[...], (examples, *self.start.shape))
        nothing, divergences = jnp.zeros((examples,), jnp.float32), []
        for number, (groups, side) in enumerate(zip(self.groups, self.sides, strict=True)):
            h = spread_pixels(self.up[number - 1](nnx.relu(h)), 2) if number else h
            given = () if seen is None else (seen[number],)
            for group in groups:
                end = start + side[0] * side[1] * self.latents
                h, kl = group(State(h, nothing), noise[:, start:end].reshape(examples, *side, -1), *given)
                divergences.append(kl)
                start = end
        return self.leave(nnx.relu(h)), divergences

    def __call__(self, x: Int[Array, "B H W C"], noise: Float[Array, "B N"]) -> Explained:
        """`noise` is that of the latents."""
        params, divergences = self._descend(noise, self._seen(x))
        return Explained(params, jnp.stack(divergences, 1))

    def generate(self, noise: Parts) -> Int[Array, "B H W C"]:
        """The picture of each example's noise."""
        return self.likelihood.draw(self._descend(noise.latents)[0], noise.pixels)

    @property
    def classes(self) -> int:
        """Pictures are not asked for by class."""
        return 0

    @property
    def heights(self) -> tuple[int, ...]:
        """Pictures are of one size."""
        return (self.shape[0],)

    def picture(self, noise: Parts, label: Array | None = None, *, size: int = 0) -> UInt8[Array, "B H W 3"]:
        """The picture of each example's noise in bytes; there are no labels and no other sizes."""
        return to_bytes(self.generate(noise), self.likelihood.values)

    def likeliest(self, params: Float[Array, "B H W P"]) -> Int[Array, "B H W C"]:
        """A picture of parameters without chance: of a mixture the middle of the weightiest component."""
        noise = jax.eval_shape(lambda: self.likelihood.noise(jax.random.key(0), params.shape[:3]))
        return self.likelihood.draw(params, jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), noise))


def build(config: VAEConfig, classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> VAE:
    """The model of `config`, with a gate before each group if it says so."""
    model = filled(VAE(config, rngs=rngs), twin_params)
    if config.dynamics == "groups":
        for number, groups in enumerate(model.groups):
            for place in range(number == 0, len(groups)):
                gate = make_gate(config.gate, config.features, rngs=rngs)
                assert isinstance(gate, SampleGate | RandomGate)
                groups[place] = Skip(groups[place], TopDown(gate))
    return model


def _rules(config: VAEConfig) -> Iterator[Rule]:
    yield from rules.drawn(config.shape, config.likelihood)
    yield Rule("conditional", config.conditional, not config.conditional, "False: pictures are not asked for by label")
    (height, width, _), many, least = config.shape, len(config.groups), 1 + (config.dynamics == "groups")
    yield Rule("groups", config.groups, 1 <= many <= HALVINGS + 1, f"1 to {HALVINGS + 1} numbers, one a resolution")
    halved = height % 2 ** (many - 1) == 0 and width % 2 ** (many - 1) == 0
    wanted = f"so few that {height}x{width} pixels can be halved for each but the last"
    yield Rule("groups", config.groups, halved, wanted)
    yield Rule("groups", config.groups, config.groups[0] >= 1, "1 or more at the first, the coarsest resolution")
    yield Rule("groups", config.groups, sum(config.groups) >= least, f"{least} or more in all: the first has no gate")
    for name in ("beta", "free_bits"):
        value = vars(config)[name]
        yield Rule(name, value, 0 <= value < math.inf, "0 or more")


def _tiny(config: VAEConfig) -> dict[str, object]:
    return dict(shape=(8, 8, config.shape[2]), groups=(1, 1), latents=2, features=4, inner=4)


FAMILY = register(
    Family(
        VAEConfig,
        build,
        task="variational",
        tiny=_tiny,
        rules=_rules,
        uses=BUDGET,
        apart=("beta", "free_bits"),
    )
)
