"""Model families: one file, and one configuration in `dynjax.config`, each; all are built alike."""

import dataclasses
import importlib
from typing import TypeGuard

from flax import nnx

from dynjax.config import (
    CodesConfig,
    ModelConfig,
    NextScaleConfig,
    PixelCNNConfig,
    PixelTransformerConfig,
    UserError,
    VQVAEConfig,
)

OF_DYNAMICS = frozenset({"dynamics", "gate", "tiles", "tile", "groups", "kernels", "experts", "least"})
"""Fields of configurations that the static twin does not depend on."""

Drawing = PixelCNNConfig | PixelTransformerConfig | NextScaleConfig | CodesConfig
"""Models that draw pictures."""


def segments(config: ModelConfig) -> bool:
    """Whether the model predicts a class for every pixel, and not one for the picture."""
    return config.family == "unet" or getattr(config, "task", "") == "segmentation"


def generates(config: ModelConfig) -> TypeGuard[Drawing]:
    """Whether the model draws pictures, and predicts nothing about one."""
    return isinstance(config, Drawing)


def reconstructs(config: ModelConfig) -> TypeGuard[VQVAEConfig]:
    """Whether the model gives back the picture that it is given."""
    return isinstance(config, VQVAEConfig)


def build(config: ModelConfig, num_classes: int, *, rngs: nnx.Rngs, twin_params: nnx.State | None = None) -> nnx.Module:
    """The model of `config`, with the variables of a static twin under the wrappers if these are given.

    Raises UserError where a gate is asked for that the model has no place for.
    """
    if config.dynamics == "static" and config.gate != "learned":
        raise UserError(f"model.gate {config.gate} is a control of dynamics, and model.dynamics is static")
    family = importlib.import_module(f"dynjax.models.{config.family}")
    return family.build(config, num_classes, rngs=rngs, twin_params=twin_params)


def static_twin(config: ModelConfig) -> ModelConfig:
    """The same net without dynamics; of a model of codes, that of the model that predicts them."""
    if isinstance(config, CodesConfig):
        return dataclasses.replace(config, prior=dataclasses.replace(config.prior, dynamics="static", gate="learned"))
    return dataclasses.replace(config, dynamics="static", gate="learned")


def difference(there: ModelConfig, here: ModelConfig) -> str:
    """Why two configurations have no static twin in common, in words; empty where they have.

    A model of codes starts from the weights of its VQ-VAE.
    """
    here = getattr(here, "vqvae", here)
    if type(there) is not type(here):
        return f"model.family is {there.family} there and {here.family} here"
    for field in dataclasses.fields(here):
        theirs, ours = getattr(there, field.name), getattr(here, field.name)
        if theirs != ours and field.name not in OF_DYNAMICS:
            return f"model.{field.name} is {theirs} there and {ours} here"
    return ""
