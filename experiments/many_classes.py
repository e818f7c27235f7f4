"""U-Nets for many classes: digits in colours and textures (96x96, 201 or 1,001 classes; no download).

python -m experiments.train digits200_unet_static --workdir runs/digits200_unet_static
python -m experiments.train digits200_unet_shortlist --workdir runs/digits200_unet_shortlist \\
    --init-from runs/digits200_unet_static
python -m experiments.evaluate --workdir runs/digits200_unet_shortlist --budgets 0.7 0.8 1.0
python -m benchmarks.many_classes

The same with 1000 in the place of 200, and budgets from 0.3. The smallest budget that can be met is the share of the
MACs before the last layer: 0.67 with 201 classes, 0.29 with 1,001.
"""

import dataclasses

from dynjax.config import AugmentConfig, BudgetConfig, Config, DataConfig, OptimizerConfig
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamics.shortlist import ShortlistConfig
from dynjax.models.heads.unet import UNetHeadConfig
from experiments.labelled import Row, make_row


def _static(classes: int, steps: int) -> Config:
    """The twin of so many classes and the background. Colours of pictures stay as they are: they are classes."""
    return Config(
        row=f"digits{classes}_unet_static",
        data=DataConfig(name="digits", classes=classes + 1, examples=4000, augment=AugmentConfig(crop=0.8, colour=0.0)),
        model=DenseConfig(ResidualConfig(widths=(24, 32, 48, 64)), UNetHeadConfig(), StaticConfig()),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        steps=steps,
        batch_size=8,
        checkpoint_every=200,
        evaluate_every=600,
    )


def _shortlist(static: Config, name: str, dynamics: ShortlistConfig, about: str) -> Row:
    """The twin's row with a shortlist, meant to start from the trained twin. The target says from which probability on
    a class is on the list that is scored while it trains, 0.05; any budget may be asked for afterwards."""
    row = dataclasses.replace(
        static,
        row=static.row.replace("static", name),
        model=dataclasses.replace(static.model, dynamics=dynamics),
        budget=BudgetConfig(target=0.95),
        optimizer=dataclasses.replace(static.optimizer, gate_learning_rate=1.0),
        steps=static.steps // 2,
    )
    return make_row(row, about, f"{row.steps} steps from {static.row} (--init-from); all logits are trained.")


def _rows(classes: int, steps: int, control: bool) -> tuple[Row, ...]:
    static, what = _static(classes, steps), f"96x96 digits of {classes + 1:,} classes"
    length = f"4000 training, 400 val, 400 test scenes, difficulty 0.5; {steps} steps of 8; choose on val, report test."
    return (
        make_row(static, f"Static twin: the U-Net without dynamics, {what}.", length),
        _shortlist(static, "shortlist", ShortlistConfig(), f"Shortlist: logits of the classes in a picture; {what}."),
        *(
            [_shortlist(static, "random", ShortlistConfig(gate="random"), f"Control: a shortlist by chance; {what}.")]
            if control
            else []
        ),
    )


ROWS = (*_rows(200, 2400, control=True), *_rows(1000, 2400, control=False))
