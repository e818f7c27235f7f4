"""From coarse to fine: every scale adds the pixels between those of the coarser one, in three parallel steps (Reed et
al. 2017, arXiv:1703.03664; all of a scale at once: VAR, Tian et al. 2024, arXiv:2404.02905), coarse where plain and
fine where complex.

A coarser picture has every other row and column of the finer one, so log-likelihoods of the scales add up to that of
the picture. For each step a plain network predicts all its pixels; where a gate, which sees the entropy of that, says
so, a rich network predicts them anew. Gates decide from what is drawn already: bits per dimension are exact at every
budget. Deviation from Reed et al.: both networks look at a pixel's neighbourhood once and are then 1x1 convolutions,
so that a tile needs no border and what is left out is saved in full; and the pixel in the middle of four comes first.

Letters: B examples, H W pixels, h w pixels of the next coarser picture, C channels, K numbers in a neighbourhood,
P parameters of a pixel.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynjax.core.controls import GridGate, RandomGate
from dynjax.core.gates import EntropyGate
from dynjax.models import rules
from dynjax.models.likelihoods import DrawnConfig, make_likelihood
from dynjax.models.pixelcnn import PixelCNN, PixelCNNConfig
from dynjax.models.registry import Family, built_by, register
from dynjax.models.rules import HALVINGS, Count, Depth, Range, Rule, Side, Width
from dynjax.ops import sampling
from dynjax.ops.doubt import Refine


@dataclasses.dataclass(frozen=True)
class NextScaleConfig(DrawnConfig):
    """A picture from coarse to fine: the coarsest pixel by pixel, a finer one in three steps, rich or plain by tile."""

    family: Literal["nextscale"] = "nextscale"
    scales: Annotated[int, Range(2, HALVINGS + 1)] = 3
    """Resolutions; each coarser one has every other row and column of the next finer one."""
    coarse_features: Width = 24
    """Of the PixelCNN that draws the coarsest."""
    coarse_layers: Depth = 4
    reach: Annotated[int, Range(0, 64)] = 3
    """Both networks look at so many pixels of the coarser picture to every side."""
    features: Width = 96
    """Of the rich network."""
    blocks: Count = 3
    """Residual blocks of the rich network."""
    plain: Width = 16
    """Hidden features of the plain network."""
    dynamics: Literal["static", "tiles"] = "tiles"
    """static: the rich network everywhere, and no plain one; tiles: the gate decides for each tile."""
    gate: Literal["learned", "random", "grid"] = "learned"
    """learned: the rich network goes where the plain one's prediction has the most entropy; random: anywhere; grid: to
    tiles spread evenly."""
    tile: Side = 2
    """Side of a tile in pixels of the coarser picture."""


GIVEN, STEPS = (0, 0), ((1, 1), (0, 1), (1, 0))
"""Of every 2x2 pixels, the row and column of the one that the coarser picture has, and of those that are added."""


class Rich(nnx.Module):
    """Residual blocks of 1x1 convolutions on what is around each pixel: (B, h, w, K) to (B, h, w, P)."""

    def __init__(self, before: int, features: int, blocks: int, after: int, *, rngs: nnx.Rngs):
        self.enter = nnx.Linear(before, features, rngs=rngs)
        self.first = nnx.List([nnx.Linear(features, features, rngs=rngs) for _ in range(blocks)])
        self.second = nnx.List([nnx.Linear(features, features, rngs=rngs) for _ in range(blocks)])
        self.head = nnx.Linear(features, after, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w K"]) -> Float[Array, "B h w P"]:
        h = self.enter(x)
        for first, second in zip(self.first, self.second, strict=True):
            h = h + second(nnx.relu(first(nnx.relu(h))))
        return self.head(nnx.relu(h))


class Plain(nnx.Module):
    """One small hidden layer on the same numbers."""

    def __init__(self, before: int, features: int, after: int, *, rngs: nnx.Rngs):
        self.enter, self.head = nnx.Linear(before, features, rngs=rngs), nnx.Linear(features, after, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w K"]) -> Float[Array, "B h w P"]:
        return self.head(nnx.relu(self.enter(x)))


def neighbourhood(x: Float[Array, "B h w C"], reach: int) -> Float[Array, "B h w K"]:
    """For each pixel all numbers of the pixels at most `reach` rows and columns away; 0 outside of the map."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    offsets = range(2 * reach + 1)
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in offsets for j in offsets], -1)


def interleave(parts: dict[tuple[int, int], Array], height: int, width: int) -> Array:
    """The map (B, H, W, ...) whose pixels of the four places of every 2x2 are the parts (B, h, w, ...)."""
    rows = [jnp.stack([parts[i, 0], parts[i, 1]], 3) for i in range(2)]
    whole = jnp.stack(rows, 2)
    shape = whole.shape
    return whole.reshape(shape[0], 2 * shape[1], 2 * shape[3], *shape[5:])[:, :height, :width]


def _every(tree: Any, step: int) -> Any:
    """Every so many rows and columns of all arrays (B, H, W, ...)."""
    return jax.tree.map(lambda a: a[:, ::step, ::step], tree)


def _place(tree: Any, place: tuple[int, int]) -> Any:
    """The pixels of one place of every 2x2 of all arrays; where the picture ends before it, zeros."""

    def one(a: Array) -> Array:
        height, width = (-(-n // 2) for n in a.shape[1:3])
        part = a[:, place[0] :: 2, place[1] :: 2]
        missing = ((0, 0), (0, height - part.shape[1]), (0, width - part.shape[2]))
        return jnp.pad(part, (*missing, *((0, 0),) * (a.ndim - 3)))

    return jax.tree.map(one, tree)


class NextScale(nnx.Module):
    """Pictures from coarse to fine: parameters of every pixel's distribution given those that are drawn before it.

    The label is known to the coarsest picture alone.

    Args:
        classes: number of labels that pictures can be asked for by, where they are conditional.
    """

    def __init__(self, config: NextScaleConfig, classes: int = 0, *, rngs: nnx.Rngs):
        shape, classes = config.shape, classes if config.conditional else 0
        self.shape, self.classes, self.reach = shape, classes, config.reach
        self.likelihood = make_likelihood(config.likelihood, config.values, shape[2], config.components)
        self.strides = tuple(2**k for k in reversed(range(config.scales)))
        smallest = (*(-(-n // self.strides[0]) for n in shape[:2]), shape[2])
        coarse = PixelCNNConfig(
            shape=smallest,
            values=config.values,
            likelihood=config.likelihood,
            components=config.components,
            features=config.coarse_features,
            layers=config.coarse_layers,
            conditional=config.conditional,
        )
        self.coarsest = PixelCNN(coarse, classes, rngs=rngs)

        def make(known: int) -> Refine:
            before = known * shape[2] * (2 * config.reach + 1) ** 2 + 2
            after = self.likelihood.parameters
            rich = Rich(before, config.features, config.blocks, after, rngs=rngs)
            if config.dynamics == "static":
                return Refine(rich, None, None, self.likelihood)
            gates = {
                "learned": lambda: EntropyGate(config.tile),
                "grid": lambda: GridGate(config.tile),
                "random": lambda: RandomGate(0.5, size=config.tile, rngs=rngs),
            }
            return Refine(rich, Plain(before, config.plain, after, rngs=rngs), gates[config.gate](), self.likelihood)

        finer = range(config.scales - 1)
        self.finer = nnx.List([nnx.List([make(known) for known in (1, 2, 3)]) for _ in finer])

    def _look(self, known: dict[tuple[int, int], Array], height: int, width: int) -> Float[Array, "B h w K"]:
        """What the networks of a step are given, from the pixels that are known of a picture of `height` x `width`."""
        kind = self.coarsest.head.kernel.dtype
        seen = []
        for (row, column), x in known.items():
            scaled = 2 * x.astype(kind) / (self.likelihood.values - 1) - 1
            inside = (np.arange(x.shape[1])[:, None] * 2 + row < height) & (
                np.arange(x.shape[2])[None] * 2 + column < width
            )
            seen.append(scaled * jnp.asarray(inside[None, :, :, None], kind))
        near = neighbourhood(jnp.concatenate(seen, -1), self.reach)
        rows, columns = (jnp.linspace(-1, 1, n, dtype=kind) for n in near.shape[1:3])
        here = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1)[None]
        return jnp.concatenate([near, jnp.broadcast_to(here, (*near.shape[:3], 2))], -1)

    def _predict(self, x: Array, label: Array | None, ways: list[Callable[[Refine, Array], Array]]) -> list[Array]:
        """Parameters (B, H, W, P) of a picture in each of several ways to run the steps."""
        coarse = _every(x, self.strides[0])
        params = [self.coarsest(coarse, label) if self.classes else self.coarsest(coarse)] * len(ways)
        for stride, steps in zip(self.strides[1:], self.finer, strict=True):
            fine = _every(x, stride)
            known, parts = {GIVEN: _place(fine, GIVEN)}, [{GIVEN: each} for each in params]
            for place, refine in zip(STEPS, steps, strict=True):
                seen = self._look(known, *fine.shape[1:3])
                for part, way in zip(parts, ways, strict=True):
                    part[place] = way(refine, seen)
                known[place] = _place(fine, place)
            params = [interleave(part, *fine.shape[1:3]) for part in parts]
        return params

    def __call__(self, x: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None) -> Float[Array, "B H W P"]:
        return self._predict(x, label, [lambda refine, seen: refine(seen)[0]])[0]

    def predictions(
        self, x: Int[Array, "B H W C"], label: Int[Array, " B"] | None = None
    ) -> list[Float[Array, "B H W P"]]:
        """What the plain networks give of every pixel, and what the rich ones give: both are trained, on all pixels."""
        ways = [lambda refine, seen: refine.plain(seen), lambda refine, seen: refine.rich(seen)]
        return self._predict(x, label, ways[self.finer[0][0].plain is None :])

    def draw(
        self, noise: Any, label: Int[Array, " B"] | None = None, known: sampling.Known | None = None
    ) -> tuple[Int[Array, "B H W C"], Int[Array, " B"], Int[Array, "B H W"], list[Int[Array, "B H W C"]]]:
        """Pictures, how many tiles of each were refined, how often each pixel was predicted (1 plainly, 2 richly), and
        how they came to be: the coarsest, and the three steps of each finer scale, all at full size.

        Pixels of `known` are not drawn; those that only a finer scale has are not seen before it.
        """
        at = lambda tree, stride: None if tree is None else _every(tree, stride)  # noqa: E731
        first = self.strides[0]
        x = sampling.cached(self.coarsest, at(noise, first), label=label, known=at(known, first)).image
        visits, refined = jnp.ones(x.shape[:3], jnp.int32), jnp.zeros(x.shape[0], jnp.int32)
        moments = [self._enlarge(x, first)]
        for stride, steps in zip(self.strides[1:], self.finer, strict=True):
            height, width = (-(-n // stride) for n in self.shape[:2])
            own, fixed = at(noise, stride), at(known, stride)
            seen, visited = {GIVEN: x}, {GIVEN: visits}
            for place, refine in zip(STEPS, steps, strict=True):
                params, rich = refine(self._look(seen, height, width))
                drawn = self.likelihood.draw(params, _place(own, place))
                if fixed is not None:
                    there = _place(fixed, place)
                    drawn = jnp.where(there.where[..., None], there.image, drawn)
                seen[place], visited[place] = drawn, (1 + rich).astype(jnp.int32)
                refined += rich[:, :: refine.tile, :: refine.tile].sum((1, 2)).astype(jnp.int32)
                # Where a pixel is not drawn yet, the one of the coarser picture is shown.
                moments.append(self._enlarge(interleave(dict.fromkeys(STEPS, x) | seen, height, width), stride))
            x, visits = interleave(seen, height, width), interleave(visited, height, width)
        return x, refined, visits, moments

    def _enlarge(self, x: Array, stride: int) -> Array:
        """A picture of a coarser scale at full size."""
        return jnp.repeat(jnp.repeat(x, stride, 1), stride, 2)[:, : self.shape[0], : self.shape[1]]


def _rules(config: NextScaleConfig) -> Iterator[Rule]:
    yield from rules.drawn(config.shape, config.likelihood)
    height, width, _ = config.shape
    fits = 2**config.scales <= min(height, width)
    wanted = f"so few that the coarsest of {height}x{width} pixels has 2 rows and columns"
    yield Rule("scales", config.scales, fits, wanted)


def _tiny(config: NextScaleConfig) -> dict[str, object]:
    small = dict(scales=2, coarse_features=4, coarse_layers=1, reach=1, features=8, blocks=1, plain=4)
    return small | dict(shape=(8, 8, config.shape[2]))


BUILD = built_by(NextScale)
FAMILY = register(Family(NextScaleConfig, BUILD, task="autoregressive", tiny=_tiny, rules=_rules, apart=("tile",)))
