"""Few and weak labels: U-Nets with and without what pictures without labels teach them (`loss.consistency`).

python -m experiments.train digits_semi_static --workdir runs/digits_semi_static
python -m experiments.train camvid_semi8_static --workdir runs/camvid_semi8_static --data.path data/camvid
python -m experiments.evaluate --workdir runs/digits_semi_static

Rows of a set have the same steps and the same labelled pictures. camvid_* begin with weights of ImageNet (the extra
`pretrained`).
"""

import dataclasses

from dynjax.config import Config
from dynjax.models.backbones.efficientnet import EfficientNetLite0Config
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.heads.unet import UNetHeadConfig
from experiments.camvid_unet import SMALL
from experiments.digits_unet import STATIC
from experiments.labelled import Row, make_row

DIGITS = dataclasses.replace(
    STATIC,
    row="digits_few_static",
    data=dataclasses.replace(STATIC.data, size=(48, 48), labelled="1/8"),
    model=DenseConfig(ResidualConfig(widths=(24, 32, 48, 64)), UNetHeadConfig(), StaticConfig()),
)
CAMVID = dataclasses.replace(
    SMALL,
    model=DenseConfig(
        EfficientNetLite0Config(levels=4, weights="imagenet", frozen=2),
        UNetHeadConfig(blocks=(0, 1, 1)),
        StaticConfig(),
    ),
    steps=600,
)


def _row(row: Config, about: str, protocol: str, *, consistency: float = 0.0, **data: str) -> Row:
    """`row` with these labels."""
    row = dataclasses.replace(
        row,
        data=dataclasses.replace(row.data, **data),
        loss=dataclasses.replace(row.loss, consistency=consistency),
    )
    return make_row(row, about, protocol)


def _pair(row: Config, few: str, semi: str, wanted: str, what: str, protocol: str) -> tuple[Row, Row]:
    """Only the labelled pictures, and the others beside them."""
    share = f"{wanted} of the training pictures labelled"
    beside = f"as {few}, with the other training pictures beside: consistency 1, confidence 0.95."
    return (
        _row(dataclasses.replace(row, row=few), f"{share}, the others left out; {what}.", protocol, labelled=wanted),
        _row(
            dataclasses.replace(row, row=semi),
            f"{share}, the others without; {what}.",
            beside,
            consistency=1.0,
            labelled=wanted,
        ),
    )


WHERE, TOLD = (
    "a U-Net on EfficientNet-Lite0 with weights of ImageNet, CamVid 180x240",
    "600 steps of 8, else as camvid_small_static; from weights of ImageNet, of which the two finest levels stay.",
)
ROWS = (
    *_pair(
        DIGITS,
        "digits_few_static",
        "digits_semi_static",
        "1/8",
        "a U-Net, 48x48 digits",
        "as digits_unet_static at half the size.",
    ),
    *_pair(CAMVID, "camvid_few8_static", "camvid_semi8_static", "1/8", WHERE, TOLD),
    *_pair(CAMVID, "camvid_few4_static", "camvid_semi4_static", "1/4", WHERE, TOLD),
    _row(
        dataclasses.replace(CAMVID, row="camvid_points_static"),
        f"A point for each region of the training masks; {WHERE}.",
        f"{TOLD} Only the points count.",
        weak="points",
    ),
)
