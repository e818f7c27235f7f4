"""The registry of model families: what it refuses, and what it says of configurations of parts."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
import pytest
from flax import nnx
from test_commands import last_scores

from dynjax import models
from dynjax.config import Config, DataConfig, UserError
from dynjax.core import convolve
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.blocks import pixels
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.heads.unet import UNetHeadConfig
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


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """As an import of their file would, but for this test alone."""
    for interface, families in list(models.registry.OPEN.items()):
        monkeypatch.setitem(models.registry.OPEN, interface, dict(families))
    models.register(Family(FlatConfig, built_by(Flat), twin=lambda config: config))


def test_a_row_of_a_family_of_ones_own(tmp_path):
    data = DataConfig(name="digits8", size=(8, 8), examples=16)
    config = Config("mine", FlatConfig(), data, steps=2, batch_size=8, checkpoint_every=2)
    train.train(config, tmp_path / "w", quiet=True)
    assert 0 <= last_scores(tmp_path / "w")["accuracy"] <= 1
    assert checkpoint.load(tmp_path / "w")[0] == config
    with pytest.raises(UserError, match=r"--model\.features is 65: it must be from 1 to 64"):
        train.train(dataclasses.replace(config, model=FlatConfig(features=65)), tmp_path / "v", quiet=True)


def test_a_model_of_parts(tmp_path):
    model = DenseConfig(ResidualConfig(widths=(4,), blocks=(2,)), UNetHeadConfig(blocks=()), SkipConfig())
    config = Config("mine", model)
    assert kind_of(config).__args__[0].__args__ == (ResidualConfig, UNetHeadConfig, SkipConfig)
    write_config(tmp_path, config, ("a", "b"))
    assert read_config(tmp_path)[0] == config
    assert models.static_twin(model) == dataclasses.replace(model, dynamics=StaticConfig())
    assert models.difference(models.static_twin(model), model) == ""
    wider = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, widths=(6,)))
    assert models.difference(model, wider) == "model.backbone.widths is (4,) there and (6,) here"


def test_layers_run_as_the_platform_wants_them_also_in_a_family_of_ones_own():
    flat = models.build(FlatConfig(), 3, rngs=nnx.Rngs(0))
    assert flat.linear.dot_general is convolve.dot_general
    parts = DenseConfig(ResidualConfig(widths=(4,), blocks=(2,)), UNetHeadConfig(blocks=()), SkipConfig())
    layers = [m for _, m in nnx.iter_modules(models.build(parts, 3, rngs=nnx.Rngs(0))) if isinstance(m, nnx.Conv)]
    assert layers and all(layer.conv_general_dilated is convolve.convolution for layer in layers)


def test_a_name_is_taken_once():
    @dataclasses.dataclass(frozen=True)
    class Other:
        family: Literal["flat"] = "flat"

    with pytest.raises(ValueError, match="'flat' is already that of FlatConfig"):
        models.register(Family(Other, built_by(Flat)))
    with pytest.raises(UserError, match=r"model\.family flat \(Other\) is not registered"):
        models.task_of(Other())
