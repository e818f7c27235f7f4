"""Adaptive U-Nets on the embedded digits scenes (96x96, 11 classes; no download).

python -m experiments.train digits_unet_static --workdir runs/digits_unet_static
python -m experiments.train ROW --workdir runs/ROW --init-from runs/digits_unet_static
python -m experiments.evaluate --workdir runs/ROW
"""

import dataclasses

from dynjax.config import AugmentConfig, BudgetConfig, Config, DataConfig, LossConfig, OptimizerConfig
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, DynamicsConfig, StaticConfig
from dynjax.models.dynamics.experts import ExpertsConfig
from dynjax.models.dynamics.halt import HaltStepConfig
from dynjax.models.dynamics.select import SelectConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.models.heads.unet import UNetHeadConfig


def digits_unet_static() -> Config:
    """Static twin: the U-Net without dynamics, 96x96 digits.

    Protocol: 2000 training, 200 val, 200 test scenes, difficulty 0.5; 1200 steps of 8; choose on val, report test.
    """
    return Config(
        row="digits_unet_static",
        data=DataConfig(name="digits", augment=AugmentConfig(crop=0.8)),
        model=DenseConfig(ResidualConfig(widths=(24, 32, 48, 64)), UNetHeadConfig(), StaticConfig()),
        loss=LossConfig(class_weights="sqrt"),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        steps=1200,
        batch_size=8,
        checkpoint_every=200,
        evaluate_every=400,
    )


def _dynamic(name: str, dynamics: DynamicsConfig) -> Config:
    """The twin's row with dynamics, meant to start from the trained twin: gates learn as fast as the rest."""
    row = digits_unet_static()
    return dataclasses.replace(
        row,
        row=name,
        model=dataclasses.replace(row.model, dynamics=dynamics),
        optimizer=dataclasses.replace(row.optimizer, gate_learning_rate=1.0),
        steps=row.steps * 2 // 3,
    )


def digits_unet_tiles() -> Config:
    """Tiles: blocks run only where their gate keeps a tile; 96x96 digits. The demo.

    Protocol: 800 steps from digits_unet_static (--init-from); a budget from [0.5, 1] is drawn at every step.
    """
    return _dynamic("digits_unet_tiles", TilesConfig())


def digits_unet_skip() -> Config:
    """Skip: whole blocks run or not, per picture; 96x96 digits.

    Protocol: as digits_unet_tiles.
    """
    return _dynamic("digits_unet_skip", SkipConfig())


def digits_unet_select() -> Config:
    """Select: one of several blocks for each picture or tile (dynamic kernel selection); 96x96 digits.

    Protocol: as digits_unet_tiles.
    """
    return _dynamic("digits_unet_select", SelectConfig())


def _deep(name: str, dynamics: DynamicsConfig, target: float, **loss: float) -> Config:
    """The twin's row with four blocks at the coarsest level, or what `dynamics` puts into their place, from nothing."""
    row = digits_unet_static()
    return dataclasses.replace(
        row,
        row=name,
        model=dataclasses.replace(
            row.model, backbone=dataclasses.replace(row.model.backbone, blocks=(1, 1, 1, 4)), dynamics=dynamics
        ),
        budget=BudgetConfig(target=target),
        loss=dataclasses.replace(row.loss, **loss),
    )


def digits_unet_experts() -> Config:
    """Experts: in the place of the coarsest level's blocks, its pixels are the tokens; 96x96 digits.

    Protocol: as digits_unet_static, from nothing; a budget from [0.95, 1] is drawn at every step.
    """
    return _deep("digits_unet_experts", ExpertsConfig(), 0.95, load_balance=0.01, router_z=0.001)


def digits_unet_halt() -> Config:
    """Halting: one step at the coarsest level, up to four times per picture (ACT); 96x96 digits.

    Protocol: as digits_unet_experts.
    """
    return _deep("digits_unet_halt", HaltStepConfig(), 0.95)


ROWS = (
    digits_unet_static,
    digits_unet_tiles,
    digits_unet_skip,
    digits_unet_select,
    digits_unet_experts,
    digits_unet_halt,
)
