"""Autoregressive images: a gated PixelCNN and a transformer over pixels; what is dynamic is how they are sampled.

python -m experiments.train mnist_pixelcnn --workdir runs/mnist_pixelcnn --data.path data/mnist
python -m experiments.evaluate --workdir runs/mnist_pixelcnn
python -m experiments.sample --workdir runs/mnist_pixelcnn --sampler fixed-point --n 64 --out samples

{digits,mnist,fashion,cifar10}_{pixelcnn,transformer}: digits of 16 values, MNIST in black and white, the others of all
256, as is mnist8bit_pixelcnn. digits_transformer_exits has a head after each block, and pixels that are sure leave.
Attention among all pixels is dear: the transformers of the larger pictures are small here. *_full want a GPU.
"""

import dataclasses

from dynjax.config import AugmentConfig, Config, LossConfig, ModelConfig, OptimizerConfig
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.models.pixeltransformer import PixelTransformerConfig
from experiments import labelled
from experiments.labelled import Row, make_row

AS_IT_IS = AugmentConfig(flip=False, crop=1.0, colour=0.0)
DATA = {
    "digits": dataclasses.replace(labelled.DATA["digits"], size=(8, 8), augment=AS_IT_IS),
    "mnist": dataclasses.replace(labelled.DATA["mnist"], size=None, augment=AS_IT_IS),
    "fashion": dataclasses.replace(
        labelled.DATA["mnist"], name="fashion_mnist", path="data/fashion_mnist", size=None, augment=AS_IT_IS
    ),
    "cifar10": dataclasses.replace(labelled.DATA["cifar10"], augment=dataclasses.replace(AS_IT_IS, flip=True)),
}
GREY, COLOUR = (28, 28, 1), (32, 32, 3)
ALL = dict(values=256, likelihood="logistic")
SHAPES: dict[str, dict] = {
    "digits": dict(shape=(8, 8, 1), values=16),
    "mnist": dict(shape=GREY, values=2),
    "mnist8bit": dict(shape=GREY, **ALL),
    "fashion": dict(shape=GREY, **ALL),
    "cifar10": dict(shape=COLOUR, **ALL),
}
WHAT = {
    "digits": "8x8 digits of 16 values",
    "mnist": "MNIST in black and white",
    "mnist8bit": "MNIST of 256 values",
    "fashion": "Fashion-MNIST of 256 values",
    "cifar10": "CIFAR-10",
}
STEPS = {"digits": 400, "cifar10": 1500}
"""Otherwise 2000. There are few digits: more steps learn them by heart."""


def config(data: str, name: str, model: ModelConfig, **changes: object) -> Config:
    """The configuration of a row that draws pictures of `data`, or gives them back."""
    row = Config(
        row=f"{data}_{name}",
        data=DATA[data.removesuffix("8bit")],
        model=model,
        loss=LossConfig(),
        optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=1e-4, ema=0.999),
        steps=STEPS.get(data, 2000),
        batch_size=64,
        checkpoint_every=500,
        evaluate_every=500,
    )
    return dataclasses.replace(row, **changes)


def row(data: str, name: str, what: str, model: ModelConfig, **changes: object) -> Row:
    """A row that draws pictures of `data`, whose shape and values `model` takes."""
    made = config(data, name, dataclasses.replace(model, **SHAPES[data]), **changes)
    protocol = f"{made.steps} steps of {made.batch_size}. Choose on val, report test, in bits per dimension."
    return make_row(made, f"{what}, {WHAT[data]}.", protocol)


TRANSFORMER = "Causal transformer over pixels"
SMALL = PixelTransformerConfig(features=32, layers=2, heads=2)
LONG = dict(checkpoint_every=2000, evaluate_every=5000)

ROWS = (
    *(row(data, "pixelcnn", "Gated PixelCNN", PixelCNNConfig(layers=7)) for data in SHAPES),
    row("digits", "transformer", TRANSFORMER, PixelTransformerConfig(), steps=800),
    row(
        "digits",
        "transformer_exits",
        f"{TRANSFORMER} that leaves early",
        PixelTransformerConfig(dynamics="exits"),
        steps=800,
    ),
    *(
        row(data, "transformer", TRANSFORMER, SMALL, steps=800, batch_size=16)
        for data in ("mnist", "fashion", "cifar10")
    ),
    row(
        "mnist",
        "transformer_full",
        f"{TRANSFORMER} that leaves early (GPU)",
        PixelTransformerConfig(features=256, layers=8, heads=8, dynamics="exits"),
        steps=50_000,
        **LONG,
    ),
    row("digits", "pixelcnn_labels", "Gated PixelCNN asked by label", PixelCNNConfig(layers=7, conditional=True)),
    row("mnist", "pixelcnn_labels", "Gated PixelCNN asked by label", PixelCNNConfig(layers=7, conditional=True)),
    row(
        "cifar10",
        "pixelcnn_full",
        "Gated PixelCNN at about the paper's size (GPU)",
        PixelCNNConfig(features=128, layers=15, components=10),
        steps=100_000,
        **LONG,
    ),
)
