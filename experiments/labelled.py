"""What the rows of classification share: data, augmentation and length of training, by data set.

Not a row file: families take these and say the model. Paths are under data/, or given as --data.path.
"""

from dynjax.config import AugmentConfig, Config, DataConfig, LossConfig, ModelConfig, OptimizerConfig

DATA = {
    "digits": DataConfig(name="digits8", size=(16, 16), augment=AugmentConfig(False, 1.0, 0.0, pad=1)),
    "mnist": DataConfig(name="mnist", path="data/mnist", size=(32, 32), augment=AugmentConfig(False, 1.0, 0.0, pad=2)),
    "cifar10": DataConfig(name="cifar10", path="data/cifar10", augment=AugmentConfig(True, 1.0, 0.0, pad=4)),
}
STEPS = {"digits": 400, "mnist": 500, "cifar10": 1500}


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
