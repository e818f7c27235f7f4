"""Dense prediction: a backbone gives maps of a picture, a head makes logits of its pixels, and dynamics go into the
blocks of both.

Each is a file of its own with a configuration that is registered under its interface, and knows none of the others:

    register(Family(MyConfig, build=..., rules=..., tiny=...), BackboneConfig)

`build` of a backbone is `(config, *, rngs)`, of a head `(config, backbone, classes, *, rngs)`, and of dynamics
`(config, model, *, rngs)`, which returns the `Dense` model with its blocks changed; the `rules` of heads and dynamics
take the backbone's configuration too.

Letters: B examples, H W pixels, K classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dynjax.config import ModelConfig
from dynjax.models import registry, rules
from dynjax.models.blocks import ClassifyingHead
from dynjax.models.registry import Family, filled, register
from dynjax.models.rules import Rule


@runtime_checkable
class BackboneConfig(ModelConfig, Protocol):
    """Of a backbone; `widths` are those of its maps, the finest first."""

    @property
    def widths(self) -> tuple[int, ...]: ...


@runtime_checkable
class HeadConfig(ModelConfig, Protocol):
    """Of a head."""


@runtime_checkable
class DynamicsConfig(ModelConfig, Protocol):
    """Of dynamics."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where dynamics go: a module that keeps the shape of its map."""

    modules: nnx.List
    number: int
    """Of the module in that list."""
    channels: int
    level: int
    """Of the map of the backbone whose resolution it works at, 0 the finest."""


def sites_of(blocks: Sequence[nnx.List], channels: Sequence[int]) -> Iterator[Site]:
    """All modules of a list for each level, which has so many channels."""
    for level, (modules, width) in enumerate(zip(blocks, channels, strict=False)):
        yield from (Site(modules, number, width, level) for number in range(len(modules)))


@runtime_checkable
class Backbone(Protocol):
    """Maps of a picture (B, H, W, 3) of bytes, the finest first."""

    widths: tuple[int, ...]
    """Channels of each map."""
    strides: tuple[int, ...]
    """Pixels of the picture, along a side, to one of each map; odd sizes are rounded up."""

    def __call__(self, image: Array, /) -> list[jax.Array]: ...
    def sites(self) -> Iterable[Site]:
        """In the order in which they run."""

    @property
    def tail(self) -> nnx.List:
        """Modules that run one after the other and give the coarsest map: its sites may be replaced, and more added."""


@runtime_checkable
class Peels(Protocol):
    """A backbone whose coarsest level can be taken from it."""

    def peel(self) -> nnx.Module:
        """Take the coarsest level away and return it: from the map before it to its map. At least one stays."""


@runtime_checkable
class Head(Protocol):
    """Logits (B, H, W, K), float32, of every pixel of a picture of `size`, from the maps of a backbone."""

    def __call__(self, maps: Sequence[Array], size: tuple[int, int], /) -> jax.Array: ...
    def sites(self) -> Iterable[Site]: ...


@runtime_checkable
class Fuses(Protocol):
    """A head that sums, or puts side by side, what several modules make of maps at several scales."""

    def scales(self) -> Iterable[Site]:
        """Those of them that may be left out, each with the channels that it takes."""


B = TypeVar("B", bound=BackboneConfig)
H = TypeVar("H", bound=HeadConfig)
D = TypeVar("D", bound=DynamicsConfig)


@dataclasses.dataclass(frozen=True)
class StaticConfig:
    """No dynamics: the twin."""

    family: Literal["static"] = "static"


@dataclasses.dataclass(frozen=True)
class DenseConfig(Generic[B, H, D]):
    """A class for every pixel: a backbone, a head and dynamics."""

    backbone: B
    head: H
    dynamics: D
    family: Literal["dense"] = "dense"


class Dense(nnx.Module):
    """Logits for every pixel: (B, H, W, 3) bytes to (B, H, W, K) float32."""

    def __init__(self, backbone: Backbone, head: Head):
        self.backbone, self.head = backbone, head
        self.coarser: Callable[[Array], list[jax.Array]] | None = nnx.data(None)
        """The maps that come after the backbone's, from the last of these."""

    def maps(self, image: UInt8[Array, "B H W 3"]) -> list[Float[Array, "B _ _ _"]]:
        """What the head is given, the finest first."""
        maps = self.backbone(image)
        return maps if self.coarser is None else [*maps, *self.coarser(maps[-1])]

    def __call__(self, image: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W K"]:
        return self.head(self.maps(image), (image.shape[1], image.shape[2]))

    def largest(self, image: UInt8[Array, "B H W 3"]) -> Int[Array, "B H W"]:
        """The class of each pixel's largest logit, where the head can without an array of all logits."""
        maps, size = self.maps(image), (image.shape[1], image.shape[2])
        if isinstance(self.head, ClassifyingHead):
            return self.head.largest(maps, size)
        return self.head(maps, size).argmax(-1)

    def wrap(self, wrapper: Callable[[nnx.Module, int, int], nnx.Module], levels: int | None = None) -> "Dense":
        """The model itself with `wrapper(module, channels, level)` in the place of every site of the finest `levels`,
        of all by default: the head's before the backbone's. Raises ValueError where there is none."""
        most = len(self.backbone.widths) if levels is None else levels
        sites = [site for part in (self.head, self.backbone) for site in part.sites() if site.level < most]
        if not sites:
            parts = f"{type(self.backbone).__name__} and {type(self.head).__name__}"
            raise ValueError(f"{parts} have no block at the finest {most} levels that dynamics could go into")
        for site in sites:
            site.modules[site.number] = wrapper(site.modules[site.number], site.channels, site.level)
        return self

    def coarsest(self, blocks: Sequence[nnx.Module]) -> "Dense":
        """The model itself with `blocks`, of its coarsest map's channels, in the place of that map's sites."""
        tail = self.backbone.tail
        replaced = {site.number for site in self.backbone.sites() if site.modules is tail}
        kept = [module for number, module in enumerate(tail) if number not in replaced]
        while len(tail):
            tail.pop()
        tail.extend([*kept, *blocks])
        return self


def build(config: DenseConfig, classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The model of `config`, with the variables of a static twin under its dynamics if these are given."""
    backbone = registry.family_of(config.backbone).build(config.backbone, rngs=rngs)
    assert isinstance(backbone, Backbone), f"{type(backbone).__name__} is no dynjax.models.dense.Backbone"
    head = registry.family_of(config.head).build(config.head, backbone, classes, rngs=rngs)
    assert isinstance(head, Head), f"{type(head).__name__} is no dynjax.models.dense.Head"
    model = filled(Dense(backbone, head), twin_params)
    return registry.family_of(config.dynamics).build(config.dynamics, model, rngs=rngs)


def _rules(config: DenseConfig) -> Iterator[Rule]:
    yield from rules.within("backbone", registry.rules_of(config.backbone))
    yield from rules.within("head", registry.rules_of(config.head, config.backbone))
    yield from rules.within("dynamics", registry.rules_of(config.dynamics, config.backbone))


register(Family(StaticConfig, lambda config, model, *, rngs: model), DynamicsConfig)
FAMILY = register(
    Family(
        DenseConfig,
        build,
        task="segmentation",
        tiny=lambda config: {part: registry.tiny(getattr(config, part)) for part in ("backbone", "head", "dynamics")},
        rules=_rules,
        uses=lambda config: registry.uses(config.dynamics),
        dynamics=lambda config: config.dynamics.family,
        twin=lambda config: dataclasses.replace(config, dynamics=StaticConfig()),
        weights=lambda config: registry.family_of(config.backbone).weights(config.backbone),
        begin=lambda config, model: registry.family_of(config.backbone).begin(config.backbone, model.backbone),
    )
)
