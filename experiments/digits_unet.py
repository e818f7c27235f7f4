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
from dynjax.models.dynamics.kernels import KernelsConfig
from dynjax.models.dynamics.select import SelectConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.models.heads.unet import UNetHeadConfig
from experiments.labelled import Row, make_row

STATIC = Config(
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


def _dynamic(dynamics: DynamicsConfig, about: str, protocol: str = "as digits_unet_tiles.", target: float = 0.5) -> Row:
    """The twin's row with dynamics, meant to start from the trained twin: gates learn as fast as the rest."""
    row = dataclasses.replace(
        STATIC,
        row=f"digits_unet_{dynamics.family}",
        model=dataclasses.replace(STATIC.model, dynamics=dynamics),
        budget=BudgetConfig(target=target),
        optimizer=dataclasses.replace(STATIC.optimizer, gate_learning_rate=1.0),
        steps=STATIC.steps * 2 // 3,
    )
    return make_row(row, about, protocol)


def _deep(dynamics: DynamicsConfig, about: str, protocol: str, **loss: float) -> Row:
    """The twin's row with four blocks at the coarsest level, or what `dynamics` puts into their place, from nothing."""
    backbone = dataclasses.replace(STATIC.model.backbone, blocks=(1, 1, 1, 4))
    row = dataclasses.replace(
        STATIC,
        row=f"digits_unet_{dynamics.family}",
        model=dataclasses.replace(STATIC.model, backbone=backbone, dynamics=dynamics),
        budget=BudgetConfig(target=0.95),
        loss=dataclasses.replace(STATIC.loss, **loss),
    )
    return make_row(row, about, protocol)


ROWS = (
    make_row(
        STATIC,
        "Static twin: the U-Net without dynamics, 96x96 digits.",
        "2000 training, 200 val, 200 test scenes, difficulty 0.5; 1200 steps of 8; choose on val, report test.",
    ),
    _dynamic(
        TilesConfig(),
        "Tiles: blocks run only where their gate keeps a tile; 96x96 digits. The demo.",
        "800 steps from digits_unet_static (--init-from); a budget from [0.5, 1] is drawn at every step.",
    ),
    _dynamic(SkipConfig(), "Skip: whole blocks run or not, per picture; 96x96 digits."),
    _dynamic(
        SelectConfig(),
        "Select: one of several blocks for each picture or tile (dynamic kernel selection); 96x96 digits.",
    ),
    _dynamic(
        KernelsConfig(tiles=(6, 3)),
        "Kernels by content: each tile takes 1x1, 3x3, dilated or 5x5 ones; 96x96 digits.",
        "800 steps from digits_unet_static (--init-from); a budget from [0.25, 1] of 5x5 everywhere is drawn.",
        target=0.25,
    ),
    _deep(
        ExpertsConfig(),
        "Experts: in the place of the coarsest level's blocks, its pixels are the tokens; 96x96 digits.",
        "as digits_unet_static, from nothing; a budget from [0.95, 1] is drawn at every step.",
        load_balance=0.01,
        router_z=0.001,
    ),
    _deep(
        HaltStepConfig(),
        "Halting: one step at the coarsest level, up to four times per picture (ACT); 96x96 digits.",
        "as digits_unet_experts.",
    ),
)
