"""What the rows of classification share: data, augmentation and length of training, by data set.

No rows here: families take these and say the model. Paths are under data/, or given as --data.path.
"""

import dataclasses
from collections.abc import Callable

from dynjax.config import AugmentConfig, BudgetConfig, Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig

Row = Callable[[], Config]

DATA = {
    "digits": DataConfig(name="digits8", size=(16, 16), augment=AugmentConfig(False, 1.0, 0.0, pad=1)),
    "mnist": DataConfig(name="mnist", path="data/mnist", size=(32, 32), augment=AugmentConfig(False, 1.0, 0.0, pad=2)),
    "cifar10": DataConfig(name="cifar10", path="data/cifar10", augment=AugmentConfig(True, 1.0, 0.0, pad=4)),
}
SHOWN = {"digits": "8x8 digits shown at 16x16", "mnist": "MNIST at 32x32", "cifar10": "CIFAR-10 32x32"}
STEPS = {"digits": 400, "mnist": 500, "cifar10": 1500}
AUGMENTED = {
    "digits": "shifted by up to a pixel",
    "mnist": "shifted by up to 2 pixels",
    "cifar10": "flip, shifted by up to 4 pixels",
}


def config(row: str, model: ModelConfig, **changes: object) -> Config:
    """The configuration of a row, whose name begins with its data set. Batches of 64, choose on val, report test."""
    data = row.split("_")[0]
    fields: dict = dict(
        row=row,
        data=DATA[data],
        model=model,
        loss=LossConfig(label_smoothing=0.1 if data == "cifar10" else 0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-2, gate_learning_rate=1.0),
        steps=STEPS[data],
        batch_size=64,
        checkpoint_every=250,
        evaluate_every=500,
    )
    return Config(**fields | changes)


def make_row(config: Config, about: str, protocol: str) -> Row:
    """A row that gives `config`, with its name and a docstring."""

    def row() -> Config:
        return config

    row.__name__ = row.__qualname__ = config.row
    row.__doc__ = f"{about}\n\n    Protocol: {protocol}\n    "
    return row


def variants(
    family: str,
    what: str,
    model: ModelConfig,
    kinds: dict[str, str],
    *,
    sets: tuple[str, ...] = ("digits", "mnist", "cifar10"),
    small: dict[str, object] | None = None,
    from_twin: bool = True,
    target: float = 0.4,
    length: float = 2 / 3,
    loss: dict[str, object] | None = None,
    **changes: object,
) -> tuple[Row, ...]:
    """Rows SET_FAMILY_static, SET_FAMILY_KIND for each of `kinds`, and the control SET_FAMILY_random of the first.

    Args:
        what: the network, in a few words.
        kinds: the row's last word to the model's `dynamics`.
        sets: data sets; `small` has the model's fields where they differ on digits.
        from_twin: whether dynamic rows start from the trained twin (--init-from); then `length` is their steps as a
            share of the twin's.
        target: lowest budget that is trained for.
        loss: fields of the loss that differ in dynamic rows.
        changes: fields of all rows that differ from `config`.
    """
    rows = []
    for data in sets:
        shape = dataclasses.replace(model, **(small or {})) if data == "digits" else model
        static = config(f"{data}_{family}_static", dataclasses.replace(shape, dynamics="static"), **changes)
        where, first = f"{what}, {SHOWN[data]}", next(iter(kinds))
        told = f"{static.steps} steps of {static.batch_size}; {AUGMENTED[data]}. Choose on val, report test."
        rows.append(make_row(static, f"Static twin of {where}.", told))
        steps, told = static.steps, f"as {static.row}, from nothing."
        if from_twin:
            steps = int(static.steps * length)
            told = f"{steps} steps from {static.row} (--init-from); a budget from [{target}, 1] is drawn at every step."
        for kind, dynamics in {**kinds, "random": kinds[first]}.items():
            gate = "random" if kind == "random" else "learned"
            # Chance has no logits that could grow.
            more = {each: weight for each, weight in (loss or {}).items() if gate == "learned" or each != "router_z"}
            row = dataclasses.replace(
                static,
                row=f"{data}_{family}_{kind}",
                model=dataclasses.replace(shape, dynamics=dynamics, gate=gate),
                budget=BudgetConfig(target=target),
                loss=dataclasses.replace(static.loss, **more),
                steps=steps,
            )
            control = f"Control: {data}_{family}_{first} that chooses at random."
            rows.append(make_row(row, control if kind == "random" else f"{kind}: {where}.", told))
    return tuple(rows)
