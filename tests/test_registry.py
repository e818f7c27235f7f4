"""Families, backbones and heads that stand outside of the package."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_commands import last_scores

from dynjax import models
from dynjax.config import Config, DataConfig, UserError
from dynjax.models.blocks import Block, pixels
from dynjax.models.dense import BackboneConfig, DenseConfig, HeadConfig, StaticConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.registry import Family, built_by, kind_of
from dynjax.models.rules import Range
from dynjax.run import checkpoint, train
from dynjax.run.workdir import read_config, write_config


@dataclasses.dataclass(frozen=True)
class FlatConfig:
    family: Literal["flat"] = "flat"
    features: Annotated[int, Range(1, 64)] = 4


class Flat(nnx.Module):
    def __init__(self, config, classes, *, rngs):
        self.linear = nnx.Linear(3, config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, classes, rngs=rngs)

    def __call__(self, image):
        return self.head(nnx.relu(self.linear(pixels(image, jnp.float32).mean((1, 2)))))


@dataclasses.dataclass(frozen=True)
class OneMapConfig:
    family: Literal["one_map"] = "one_map"
    widths: tuple[int, ...] = (4,)
    blocks: tuple[int, ...] = (2,)


class OneMap(nnx.Module):
    def __init__(self, config, *, rngs):
        self.widths, self.strides = config.widths, (1,)
        self.stem = nnx.Conv(3, config.widths[0], (3, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.List([Block(config.widths[0], rngs=rngs) for _ in range(config.blocks[0])])])

    def __call__(self, image):
        x = self.stem(pixels(image, self.stem.kernel.dtype))
        for block in self.blocks[0]:
            x = block(x)
        return [x]


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    family: Literal["linear"] = "linear"


class LinearHead(nnx.Module):
    def __init__(self, config, backbone, classes, *, rngs):
        self.linear, self.blocks = nnx.Linear(backbone.widths[0], classes, rngs=rngs), ()

    def __call__(self, maps, size):
        return self.linear(maps[0]).astype(jnp.float32)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """As an import of their file would, but for this test alone."""
    for interface, families in list(models.registry.OPEN.items()):
        monkeypatch.setitem(models.registry.OPEN, interface, dict(families))
    models.register(Family(FlatConfig, built_by(Flat), twin=lambda config: config))
    models.register(Family(OneMapConfig, OneMap), BackboneConfig)
    models.register(Family(LinearConfig, LinearHead), HeadConfig)


def test_a_row_of_a_family_of_ones_own(tmp_path):
    data = DataConfig(name="digits8", size=(8, 8), examples=16)
    config = Config("mine", FlatConfig(), data, steps=2, batch_size=8, checkpoint_every=2)
    train.train(config, tmp_path / "w", quiet=True)
    assert 0 <= last_scores(tmp_path / "w")["accuracy"] <= 1
    assert checkpoint.load(tmp_path / "w")[0] == config
    with pytest.raises(UserError, match=r"--model\.features is 65: it must be from 1 to 64"):
        train.train(dataclasses.replace(config, model=FlatConfig(features=65)), tmp_path / "v", quiet=True)


def test_a_backbone_and_a_head_with_dynamics_of_the_house(tmp_path):
    model = DenseConfig(OneMapConfig(), LinearConfig(), SkipConfig())
    assert kind_of(Config("mine", model)).__args__[0].__args__ == (OneMapConfig, LinearConfig, SkipConfig)
    config = Config("mine", model)
    write_config(tmp_path, config, ("a", "b"))
    assert read_config(tmp_path)[0] == config
    assert models.static_twin(model) == dataclasses.replace(model, dynamics=StaticConfig())
    assert models.difference(models.static_twin(model), model) == ""
    wider = dataclasses.replace(model, backbone=OneMapConfig(widths=(6,)))
    assert models.difference(model, wider) == "model.backbone.widths is (4,) there and (6,) here"
    logits = nnx.eval_shape(lambda: models.build(model, 3, rngs=nnx.Rngs(0))(jnp.zeros((2, 5, 6, 3), jnp.uint8)))
    assert jax.tree.map(jnp.shape, logits) == (2, 5, 6, 3)


def test_a_name_is_taken_once():
    @dataclasses.dataclass(frozen=True)
    class Other:
        family: Literal["flat"] = "flat"

    with pytest.raises(ValueError, match="'flat' is already that of FlatConfig"):
        models.register(Family(Other, built_by(Flat)))
    with pytest.raises(UserError, match=r"model\.family flat \(Other\) is not registered"):
        models.task_of(Other())
