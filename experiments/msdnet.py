"""Multi-scale dense networks with exits (MSDNet, Huang et al. 2018, arXiv:1703.09844).

python -m experiments.train cifar10_msdnet_exits --workdir runs/cifar10_msdnet_exits --data.path data/cifar10
python -m experiments.evaluate --workdir runs/cifar10_msdnet_exits --budgets 0.25 0.5 0.75 1

budgeted.csv has 40 budgets, anytime.csv the exits. {digits,mnist,cifar10}_msdnet_* are sized for two CPU cores;
cifar10_msdnet7_* is the configuration that the paper's public code runs on CIFAR-10 and wants a GPU.
"""

import dataclasses

from dynjax.config import Config, OptimizerConfig
from dynjax.models.msdnet import MSDNetConfig
from experiments import labelled

SMALL = MSDNetConfig(channels=16, growth=8, blocks=4, base=2, step=2)


def _variant(row: Config, name: str, **model: object) -> Config:
    return dataclasses.replace(row, row=name, model=dataclasses.replace(row.model, **model))


def digits_msdnet_exits() -> Config:
    """Exits: MSDNet, 8x8 digits shown at 16x16.

    Protocol: 400 steps of 64; shifted by a pixel; all exits count alike. Thresholds are solved on val.
    """
    model = MSDNetConfig(scales=2, channels=8, growth=4, blocks=3, base=2, step=1, dynamics="exits")
    return labelled.config("digits_msdnet_exits", model)


def digits_msdnet_static() -> Config:
    """Static twin: the same MSDNet with its last exit alone, 8x8 digits shown at 16x16.

    Protocol: as digits_msdnet_exits.
    """
    return _variant(digits_msdnet_exits(), "digits_msdnet_static", dynamics="static")


def digits_msdnet_random() -> Config:
    """Control: digits_msdnet_exits that stops at random.

    Protocol: as digits_msdnet_exits.
    """
    return _variant(digits_msdnet_exits(), "digits_msdnet_random", gate="random")


def cifar10_msdnet_exits() -> Config:
    """Exits: MSDNet of 4 blocks, CIFAR-10 32x32.

    Protocol: 1500 steps of 64; flip, shifted by up to 4 pixels; all exits count alike. Thresholds are solved on val.
    """
    return labelled.config("cifar10_msdnet_exits", dataclasses.replace(SMALL, dynamics="exits"))


def cifar10_msdnet_static() -> Config:
    """Static twin: the same MSDNet with its last exit alone, CIFAR-10 32x32.

    Protocol: as cifar10_msdnet_exits.
    """
    return _variant(cifar10_msdnet_exits(), "cifar10_msdnet_static", dynamics="static")


def cifar10_msdnet_random() -> Config:
    """Control: cifar10_msdnet_exits that stops at random.

    Protocol: as cifar10_msdnet_exits.
    """
    return _variant(cifar10_msdnet_exits(), "cifar10_msdnet_random", gate="random")


def cifar10_msdnet7_exits() -> Config:
    """Exits: MSDNet of 7 blocks as the paper's public code trains it, CIFAR-10 32x32 (GPU).

    Protocol: 234000 steps of 64 (300 epochs); flip, shifted by up to 4 pixels; AdamW and a cosine instead of SGD.
    """
    return labelled.config(
        "cifar10_msdnet7_exits",
        MSDNetConfig(blocks=7, dynamics="exits"),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=5e-2, ema=0.999),
        steps=234_000,
        checkpoint_every=2000,
        evaluate_every=5000,
    )


ROWS = (
    digits_msdnet_exits,
    digits_msdnet_static,
    digits_msdnet_random,
    *labelled.variants("msdnet", "MSDNet of 4 blocks", SMALL, {"exits": "exits"}, sets=("mnist",), from_twin=False),
    cifar10_msdnet_exits,
    cifar10_msdnet_static,
    cifar10_msdnet_random,
    cifar10_msdnet7_exits,
)
