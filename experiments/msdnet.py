"""Multi-scale dense networks with exits (MSDNet, Huang et al. 2018, arXiv:1703.09844).

python -m experiments.train cifar10_msdnet_exits --workdir runs/cifar10_msdnet_exits --data.path data/cifar10
python -m experiments.evaluate --workdir runs/cifar10_msdnet_exits --budgets 0.25 0.5 0.75 1

All exits count alike, and thresholds are solved on val. budgeted.csv has 40 budgets, anytime.csv the exits.
{digits,mnist,cifar10}_msdnet_* are sized for two CPU cores; cifar10_msdnet7_* is the configuration that the paper's
public code runs on CIFAR-10 and wants a GPU.
"""

from dynjax.config import OptimizerConfig
from dynjax.models.msdnet import MSDNetConfig
from experiments import labelled

SMALL = MSDNetConfig(channels=16, growth=8, blocks=4, base=2, step=2)
WHAT, EXITS = "MSDNet of 4 blocks", {"exits": "exits"}
TINY = MSDNetConfig(scales=2, channels=8, growth=4, blocks=3, base=2, step=1)
"""Of digits."""

ROWS = (
    *labelled.variants("msdnet", "MSDNet", TINY, EXITS, sets=("digits",), from_twin=False, target=0.5),
    *labelled.variants("msdnet", WHAT, SMALL, EXITS, sets=("mnist",), from_twin=False),
    *labelled.variants("msdnet", WHAT, SMALL, EXITS, sets=("cifar10",), from_twin=False, target=0.5),
    labelled.make_row(
        labelled.config(
            "cifar10_msdnet7_exits",
            MSDNetConfig(blocks=7, dynamics="exits"),
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=5e-2, ema=0.999),
            steps=234_000,
            checkpoint_every=2000,
            evaluate_every=5000,
        ),
        "exits: MSDNet of 7 blocks as the paper's public code trains it, CIFAR-10 32x32 (GPU).",
        "234000 steps of 64 (300 epochs); flip, shifted by up to 4 pixels; AdamW and a cosine instead of SGD.",
    ),
)
