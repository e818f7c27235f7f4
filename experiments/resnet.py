"""Residual networks that skip blocks by a gate (SkipNet, Wang et al. 2018; ConvNet-AIG, Veit & Belongie 2018).

python -m experiments.train cifar10_resnet_static --workdir runs/cifar10_resnet_static --data.path data/cifar10
python -m experiments.train ROW --workdir runs/ROW --init-from runs/cifar10_resnet_static --data.path data/cifar10
python -m experiments.evaluate --workdir runs/ROW

{digits,mnist,cifar10}_resnet_* are sized for two CPU cores, cifar10_resnet26_* has twice the blocks at three quarters
of the width. cifar10_resnet110_* is the papers' size and wants a GPU: trained as long as He et al. 2016 do, by AdamW
and a cosine instead of SGD and two drops. The heads of exits count alike, and thresholds are solved on val.
"""

import dataclasses

from dynjax.config import OptimizerConfig
from dynjax.models.resnet import ResNetConfig
from experiments.labelled import variants

SMALL = ResNetConfig(stem_stride=2, widths=(32, 64, 128), blocks=(2, 2, 2))
"""As many MACs as widths of 16, 32, 64 at the full resolution, in shapes that two cores train twice as fast."""
DIGITS = dict(stem_stride=1, widths=(16, 32, 64))
GATES, SKIP = "a ResNet with a gate before each residual block", {"skip": "skip"}
HEADS = "a ResNet with a head after each stage"

ROWS = (
    *variants("resnet", GATES, SMALL, SKIP, small=DIGITS),
    variants("resnet", HEADS, SMALL, {"exits": "exits"}, small=DIGITS, from_twin=False, target=0.5)[1],
    *variants(
        "resnet26",
        GATES,
        dataclasses.replace(SMALL, widths=(24, 48, 96), blocks=(4, 4, 4)),
        SKIP,
        sets=("cifar10",),
        target=0.45,
        steps=2500,
        batch_size=128,
    ),
    *variants(
        "resnet110",
        "ResNet-110 with a gate before each residual block (GPU)",
        ResNetConfig(blocks=(18, 18, 18)),
        SKIP,
        sets=("cifar10",),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=5e-2, gate_learning_rate=1.0, ema=0.999),
        steps=64_000,
        batch_size=128,
        checkpoint_every=1000,
        evaluate_every=2000,
    )[:2],
)
