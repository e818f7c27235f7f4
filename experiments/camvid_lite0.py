"""CamVid with a backbone that was trained on ImageNet (EfficientNet-Lite0, the extra `pretrained`).

python -m experiments.train camvid_lite0_static --workdir runs/lite0 --data.path data/camvid
python -m experiments.train camvid_lite0_tiles --workdir W --data.path data/camvid --init-from runs/lite0
python -m experiments.evaluate --workdir W

SegNet's split (train 367, val 101, test 233; 11 classes, void ignored) at 180x240; camvid_lite0_*_full is 360x480 and
wants a GPU. Exits and kernels move about a tenth of the MACs: evaluate them with --budgets 0.9 0.95 1.0; recursion
with 0.85 0.9 1.0, levels with 0.42 0.5 0.75 1.0.
camvid_lite0_{fcn,segnet,unet,deeplab,pspnet,attention,recursive} are heads on one backbone, of which only the two
coarsest levels learn.
"""

import dataclasses

from dynjax.config import BudgetConfig, Config, ModelConfig, OptimizerConfig
from dynjax.models.backbones.efficientnet import EfficientNetLite0Config
from dynjax.models.dense import DenseConfig, DynamicsConfig, HeadConfig, StaticConfig
from dynjax.models.dynamics.exits import DecoderExitsConfig
from dynjax.models.dynamics.kernels import KernelsConfig
from dynjax.models.dynamics.levels import LevelsConfig
from dynjax.models.dynamics.recursion import RecursionConfig
from dynjax.models.dynamics.scales import ScalesConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.dynamics.tiles import TilesConfig
from dynjax.models.heads.attention import AttentionHeadConfig
from dynjax.models.heads.deeplab import DeepLabHeadConfig
from dynjax.models.heads.fcn import FCNHeadConfig
from dynjax.models.heads.pspnet import PSPNetHeadConfig
from dynjax.models.heads.recursive import RecursiveHeadConfig
from dynjax.models.heads.segnet import SegNetHeadConfig
from dynjax.models.heads.unet import UNetHeadConfig
from experiments import camvid_unet
from experiments.labelled import Row, make_row

BACKBONE = EfficientNetLite0Config(weights="imagenet", frozen=2)
STATIC = dataclasses.replace(
    camvid_unet.SMALL,
    row="camvid_lite0_static",
    model=DenseConfig(BACKBONE, UNetHeadConfig(blocks=(0, 1, 1, 0)), StaticConfig()),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    steps=1200,
)
EQUAL = dataclasses.replace(
    STATIC,
    row="camvid_lite0_equal",
    model=dataclasses.replace(
        STATIC.model, backbone=dataclasses.replace(BACKBONE, levels=4), head=UNetHeadConfig(blocks=(0, 0, 0))
    ),
)
FULL = dataclasses.replace(
    STATIC,
    row="camvid_lite0_static_full",
    data=dataclasses.replace(STATIC.data, size=(360, 480)),
    model=dataclasses.replace(STATIC.model, backbone=dataclasses.replace(BACKBONE, frozen=0)),
    optimizer=dataclasses.replace(STATIC.optimizer, ema=0.999),
    steps=10_000,
    batch_size=16,
    checkpoint_every=500,
    evaluate_every=1000,
    precision="bfloat16",
)
TILES = TilesConfig(tiles=(16, 15, 12, 15, 8))
HEADS: dict[str, HeadConfig] = {
    "fcn": FCNHeadConfig(),
    "segnet": SegNetHeadConfig(blocks=(1, 1, 1, 1)),  # what is unpooled has holes, which blocks fill
    "unet": UNetHeadConfig(blocks=(0, 1, 1, 0)),
    "deeplab": DeepLabHeadConfig(features=64, rates=(1, 2, 3), stride=8),
    "pspnet": PSPNetHeadConfig(features=48),
    "attention": AttentionHeadConfig(),
    "recursive": RecursiveHeadConfig(features=40),
}
"""Of the comparison; each on all five maps."""
NAMES = {
    "fcn": "FCN-8s",
    "segnet": "SegNet's decoder",
    "unet": "the U-Net's decoder",
    "deeplab": "DeepLabv3+'s head",
    "pspnet": "PSPNet's head",
    "attention": "a decoder of self-attention",
    "recursive": "a recursive decoder",
}
PRETRAINED = "EfficientNet-Lite0 pre-trained on ImageNet, CamVid"
SMALL, LARGE = "180x240", "360x480 (GPU)"
ABOUT: dict[str, tuple[DynamicsConfig, str]] = {
    "tiles": (TILES, "Tiles: blocks run only where their gate keeps a tile"),
    "random": (dataclasses.replace(TILES, gate="random"), "Control: camvid_lite0_tiles with gates that keep at random"),
    "skip": (SkipConfig(), "Skip: whole blocks run or not, per picture"),
    "exits": (DecoderExitsConfig(tile=4), "Exits along the decoder: tiles stop where they are sure"),
    "exits_random": (
        DecoderExitsConfig(tile=4, gate="random"),
        "Control: camvid_lite0_exits that stops by chance",
    ),
    "levels": (LevelsConfig(), "Scales: each picture has as many levels of the backbone as it needs"),
    "levels_random": (LevelsConfig(gate="random"), "Control: camvid_lite0_levels that selects by chance"),
    "kernels": (KernelsConfig(tiles=(8, 5, 3)), "Kernels by content: each tile takes 1x1, 3x3, dilated or 5x5 ones"),
}
OF_HEADS: dict[str, tuple[str, DynamicsConfig, str]] = {
    "scales_tiles": ("pspnet", ScalesConfig(tile=6), "Fusion: each tile selects its scales"),
    "recursion": ("recursive", RecursionConfig(), "Recursion: each picture stops by itself"),
    "recursion_tiles": ("recursive", RecursionConfig(tile=6), "Recursion: each tile stops by itself"),
}


def _dynamic(twin: Config, row: str, dynamics: DynamicsConfig, about: str, size: str = SMALL) -> Row:
    """`twin` with dynamics, meant to start from its weights: all levels learn, gates faster, over fewer steps."""
    model: ModelConfig = dataclasses.replace(
        twin.model, dynamics=dynamics, backbone=dataclasses.replace(twin.model.backbone, frozen=0)
    )
    # Kernels move a quarter of the MACs with 5x5 everywhere, and below all tiles would take the cheapest.
    target = 0.8 if dynamics.family == "kernels" else 0.4
    budget = BudgetConfig() if dynamics.family == "exits" else BudgetConfig(target=target)
    made = dataclasses.replace(
        twin,
        row=row,
        model=model,
        budget=budget,
        optimizer=dataclasses.replace(twin.optimizer, gate_learning_rate=2.0),
        steps=twin.steps // 2,
    )
    drawn = (
        "all exits count alike" if dynamics.family == "exits" else f"a budget from [{target}, 1] is drawn at every step"
    )
    return make_row(
        made, f"{about}, {PRETRAINED} {size}.", f"{made.steps} steps from {twin.row} (--init-from); {drawn}."
    )


def head(name: str) -> Config:
    """The configuration of a head's row."""
    model = dataclasses.replace(STATIC.model, backbone=dataclasses.replace(BACKBONE, frozen=3), head=HEADS[name])
    return dataclasses.replace(STATIC, row=f"camvid_lite0_{name}", model=model, steps=500, evaluate_every=250)


_PROTOCOL = "1200 steps of 8, the two finest levels frozen; flip, crop, colour; weights 1/sqrt(frequency)."
ROWS = (
    make_row(STATIC, f"Static twin: the U-Net's decoder behind {PRETRAINED} 180x240.", _PROTOCOL),
    make_row(EQUAL, f"Control: a static net of fewer MACs, {PRETRAINED} 180x240.", "as camvid_lite0_static."),
    *(_dynamic(STATIC, f"camvid_lite0_{kind}", *each) for kind, each in ABOUT.items()),
    make_row(FULL, f"Static twin, {PRETRAINED} {LARGE}.", "as camvid_lite0_static, all learn, 10000 steps of 16."),
    _dynamic(FULL, "camvid_lite0_tiles_full", TILES, ABOUT["tiles"][1], LARGE),
    *(
        make_row(
            head(name),
            f"{what[0].upper()}{what[1:]} behind {PRETRAINED} 180x240.",
            "500 steps of 8, the three finest levels frozen.",
        )
        for name, what in NAMES.items()
    ),
    *(_dynamic(head(behind), f"camvid_lite0_{kind}", *each) for kind, (behind, *each) in OF_HEADS.items()),
)
