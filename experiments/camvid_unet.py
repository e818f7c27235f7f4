"""Adaptive U-Nets on CamVid (SegNet's split: train 367, val 101, test 233; 11 classes, void ignored; no pre-training).

python -m experiments.train ROW --workdir runs/ROW --data.path data/camvid
python -m experiments.train camvid_small_tiles --workdir W --data.path data/camvid --init-from runs/camvid_small_static
python -m experiments.evaluate --workdir runs/ROW

camvid_small_* is 180x240 and sized for two CPU cores; camvid_unet_* is the protocol's 360x480 and wants a GPU.
"""

import dataclasses

from dynjax.config import AugmentConfig, BudgetConfig, Config, DataConfig, LossConfig, OptimizerConfig
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, DynamicsConfig, StaticConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.models.heads.unet import UNetHeadConfig
from experiments.labelled import Row, make_row

SMALL = Config(
    row="camvid_small_static",
    data=DataConfig(name="camvid", path="data/camvid", size=(180, 240), augment=AugmentConfig(crop=0.6)),
    model=DenseConfig(ResidualConfig(), UNetHeadConfig(), StaticConfig()),
    loss=LossConfig(class_weights="sqrt"),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    steps=1500,
    batch_size=8,
    checkpoint_every=200,
    evaluate_every=300,
)
EQUAL = dataclasses.replace(
    SMALL,
    row="camvid_small_equal",
    model=dataclasses.replace(SMALL.model, backbone=ResidualConfig(widths=(24, 32, 40, 64))),
)
UNET = dataclasses.replace(
    SMALL,
    row="camvid_unet_static",
    data=dataclasses.replace(SMALL.data, size=(360, 480)),
    model=DenseConfig(
        ResidualConfig(widths=(48, 96, 192, 256), blocks=(1, 2, 2, 2)), UNetHeadConfig(blocks=(1, 2, 2)), StaticConfig()
    ),
    optimizer=dataclasses.replace(SMALL.optimizer, ema=0.999),
    steps=20_000,
    batch_size=16,
    checkpoint_every=500,
    evaluate_every=1000,
    precision="bfloat16",
)
TILES = TilesConfig(tiles=(15, 12, 8))
WHAT_TILES, WHAT_SKIP = (
    "Tiles: blocks run only where their gate keeps a tile",
    "Skip: whole blocks run or not, per picture",
)
FROM_TWIN = "800 steps from camvid_small_static (--init-from); a budget from [0.35, 1] is drawn at every step."


def _dynamic(row: Config, name: str, dynamics: DynamicsConfig, about: str, protocol: str) -> Row:
    """`row` with dynamics, meant to start from its trained twin: gates learn faster than the rest, over fewer steps."""
    row = dataclasses.replace(
        row,
        row=name,
        model=dataclasses.replace(row.model, dynamics=dynamics),
        budget=BudgetConfig(target=0.35),
        optimizer=dataclasses.replace(row.optimizer, gate_learning_rate=2.0),
        steps=row.steps * 8 // 15,
    )
    size = "CamVid 180x240." if name.startswith("camvid_small") else "CamVid 360x480 (GPU)."
    return make_row(row, f"{about}, {size}", protocol)


ROWS = (
    make_row(
        SMALL,
        "Static twin: the U-Net without dynamics, CamVid 180x240.",
        "1500 steps of 8; flip, crop, colour; cross-entropy weighted by 1/sqrt(frequency). Chosen on val.",
    ),
    _dynamic(SMALL, "camvid_small_tiles", TILES, WHAT_TILES, FROM_TWIN),
    _dynamic(SMALL, "camvid_small_skip", SkipConfig(), WHAT_SKIP, "as camvid_small_tiles."),
    _dynamic(
        SMALL,
        "camvid_small_random",
        dataclasses.replace(TILES, gate="random"),
        "Control: camvid_small_tiles with gates that keep tiles at random",
        "as camvid_small_tiles.",
    ),
    make_row(
        EQUAL,
        "Control: a static net of about half the MACs of camvid_small_static, CamVid 180x240.",
        "as camvid_small_static. Narrower at every level.",
    ),
    make_row(
        UNET,
        "Static twin: the U-Net without dynamics, CamVid 360x480 (GPU).",
        "as camvid_small_static at the full protocol size, wider, 20000 steps of 16.",
    ),
    _dynamic(
        UNET,
        "camvid_unet_tiles",
        TILES,
        WHAT_TILES,
        "as camvid_unet_static; budget drawn from [0.35, 1] at every step.",
    ),
    _dynamic(UNET, "camvid_unet_skip", SkipConfig(), WHAT_SKIP, "as camvid_unet_tiles."),
)
