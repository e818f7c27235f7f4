"""Residual networks that skip blocks by a gate (SkipNet, Wang et al. 2018; ConvNet-AIG, Veit & Belongie 2018).

python -m experiments.train cifar10_resnet_static --workdir runs/cifar10_resnet_static --data.path data/cifar10
python -m experiments.train ROW --workdir runs/ROW --init-from runs/cifar10_resnet_static --data.path data/cifar10
python -m experiments.evaluate --workdir runs/ROW

{digits,mnist,cifar10}_resnet_* are sized for two CPU cores; cifar10_resnet110_* is the papers' size and wants a GPU.
"""

import dataclasses

from dynjax.config import Config, OptimizerConfig
from dynjax.models.resnet import ResNetConfig
from experiments import labelled

SMALL = ResNetConfig(stem_stride=2, widths=(32, 64, 128), blocks=(2, 2, 2))
"""As many MACs as widths of 16, 32, 64 at the full resolution, in shapes that two cores train twice as fast."""


def digits_resnet_static() -> Config:
    """Static twin: a ResNet without dynamics, 8x8 digits shown at 16x16.

    Protocol: 400 steps of 64; shifted by a pixel. Choose on val, report test.
    """
    return labelled.config("digits_resnet_static", dataclasses.replace(SMALL, stem_stride=1, widths=(16, 32, 64)))


def digits_resnet_skip() -> Config:
    """Skip: a gate before each residual block, per picture; 8x8 digits shown at 16x16.

    Protocol: two thirds of the static twin's steps, from its weights (--init-from); a budget from [0.4, 1] is drawn at
    every step.
    """
    return labelled.adaptive(digits_resnet_static(), "digits_resnet_skip", dynamics="skip")


def digits_resnet_random() -> Config:
    """Control: digits_resnet_skip with gates that keep blocks at random.

    Protocol: as digits_resnet_skip.
    """
    return labelled.adaptive(digits_resnet_static(), "digits_resnet_random", dynamics="skip", gate="random")


def digits_resnet_exits() -> Config:
    """Exits: a head after each stage, per picture; 8x8 digits shown at 16x16.

    Protocol: as digits_resnet_static; all heads count alike. Thresholds are solved on val.
    """
    row = digits_resnet_static()
    return dataclasses.replace(row, row="digits_resnet_exits", model=dataclasses.replace(row.model, dynamics="exits"))


def cifar10_resnet_static() -> Config:
    """Static twin: a ResNet without dynamics, CIFAR-10 32x32.

    Protocol: 1500 steps of 64; flip, shifted by up to 4 pixels. Choose on val, report test.
    """
    return labelled.config("cifar10_resnet_static", SMALL)


def cifar10_resnet_skip() -> Config:
    """Skip: a gate before each residual block, per picture; CIFAR-10 32x32.

    Protocol: 1000 steps from the weights of cifar10_resnet_static (--init-from); a budget from [0.4, 1] is drawn at
    every step.
    """
    return labelled.adaptive(cifar10_resnet_static(), "cifar10_resnet_skip", dynamics="skip")


def cifar10_resnet_random() -> Config:
    """Control: cifar10_resnet_skip with gates that keep blocks at random.

    Protocol: as cifar10_resnet_skip.
    """
    return labelled.adaptive(cifar10_resnet_static(), "cifar10_resnet_random", dynamics="skip", gate="random")


def cifar10_resnet26_static() -> Config:
    """Static twin: twice the blocks of cifar10_resnet_static at three quarters of its width, CIFAR-10 32x32.

    Protocol: 2500 steps of 128; flip, shifted by up to 4 pixels. Choose on val, report test.
    """
    model = dataclasses.replace(SMALL, widths=(24, 48, 96), blocks=(4, 4, 4))
    return labelled.config("cifar10_resnet26_static", model, steps=2500, batch_size=128)


def cifar10_resnet26_skip() -> Config:
    """Skip: a gate before each of twelve residual blocks, per picture; CIFAR-10 32x32.

    Protocol: two thirds of the steps of cifar10_resnet26_static, from its weights (--init-from); a budget from
    [0.45, 1] is drawn at every step.
    """
    return labelled.adaptive(cifar10_resnet26_static(), "cifar10_resnet26_skip", 0.45, dynamics="skip")


def cifar10_resnet26_random() -> Config:
    """Control: cifar10_resnet26_skip with gates that keep blocks at random.

    Protocol: as cifar10_resnet26_skip.
    """
    row = cifar10_resnet26_skip()
    return dataclasses.replace(row, row="cifar10_resnet26_random", model=dataclasses.replace(row.model, gate="random"))


def cifar10_resnet110_static() -> Config:
    """Static twin at the papers' size: ResNet-110, CIFAR-10 32x32 (GPU).

    Protocol: 64000 steps of 128, as He et al. 2016 train; AdamW and a cosine instead of SGD and two drops.
    """
    return labelled.config(
        "cifar10_resnet110_static",
        ResNetConfig(blocks=(18, 18, 18)),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=5e-2, gate_learning_rate=1.0, ema=0.999),
        steps=64_000,
        batch_size=128,
        checkpoint_every=1000,
        evaluate_every=2000,
    )


def cifar10_resnet110_skip() -> Config:
    """Skip at the papers' size: ResNet-110 with a gate before each block, CIFAR-10 32x32 (GPU).

    Protocol: two thirds of the steps of cifar10_resnet110_static, from its weights (--init-from).
    """
    return labelled.adaptive(cifar10_resnet110_static(), "cifar10_resnet110_skip", dynamics="skip")


ROWS = (
    digits_resnet_static,
    digits_resnet_skip,
    digits_resnet_random,
    digits_resnet_exits,
    *labelled.variants("resnet", "a ResNet with gates", SMALL, {"skip": "skip"}, sets=("mnist",)),
    cifar10_resnet_static,
    cifar10_resnet_skip,
    cifar10_resnet_random,
    cifar10_resnet26_static,
    cifar10_resnet26_skip,
    cifar10_resnet26_random,
    cifar10_resnet110_static,
    cifar10_resnet110_skip,
)
