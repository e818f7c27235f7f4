"""Generators that refine their picture in steps, and stop where it is good enough; and the discriminators beside them.

python -m experiments.train mnist_gan_static --workdir runs/mnist_gan_static --data.path data/mnist
python -m experiments.train mnist_gan_steps --workdir runs/mnist_gan_steps --data.path data/mnist
python -m experiments.train mnist_gan_width --workdir runs/width --data.path data/mnist \\
    --init-from runs/mnist_gan_static
python -m experiments.evaluate --workdir runs/mnist_gan_steps --twin runs/mnist_gan_static
python -m experiments.sample --workdir runs/mnist_gan_steps --n 64 --budget 0.5 --out samples

{digits,mnist,fashion,cifar10}_gan_{static,steps,steps_random,scales,width,kernels,dynamicd}, asked for by class; all
but static start from the trained twin (--init-from). digits are shown at 16x16; digits8_gan_{static,steps} draws them
at 8x8, without classes. *_full want a GPU, and pictures64_gan_* a folder of pictures by class (--data.path).
"""

import dataclasses
from collections.abc import Iterator

from dynjax.config import AugmentConfig, BudgetConfig, Config, DataConfig, LossConfig, OptimizerConfig
from dynjax.models.gan import GanConfig
from experiments.labelled import Row, make_row

AS_IT_IS = AugmentConfig(flip=False, crop=1.0, colour=0.0)
DATA = {
    "digits": DataConfig(name="digits8", size=(16, 16), augment=AS_IT_IS),
    "digits8": DataConfig(name="digits8", size=(8, 8), augment=AS_IT_IS),
    "mnist": DataConfig(name="mnist", path="data/mnist", size=(32, 32), augment=AS_IT_IS),
    "fashion": DataConfig(name="fashion_mnist", path="data/fashion_mnist", size=(32, 32), augment=AS_IT_IS),
    "cifar10": DataConfig(name="cifar10", path="data/cifar10", augment=dataclasses.replace(AS_IT_IS, flip=True)),
}
WHAT = {
    "digits": "8x8 digits shown at 16x16",
    "digits8": "8x8 digits",
    "mnist": "MNIST at 32x32",
    "fashion": "Fashion-MNIST at 32x32",
    "cifar10": "CIFAR-10 32x32",
    "pictures64": "pictures of a folder at 64x64",
}
MODELS = {
    "digits": GanConfig(shape=(16, 16, 1), widths=(48, 24), discriminator=(32, 64), conditional=True),
    "digits8": GanConfig(shape=(8, 8, 1), widths=(48, 24), fine=1, discriminator=(32, 64)),
    "mnist": GanConfig(conditional=True),
    "fashion": GanConfig(conditional=True),
    "cifar10": GanConfig(shape=(32, 32, 3), widths=(96, 48, 32), discriminator=(32, 64, 96), conditional=True, steps=6),
}
STEPS = {"digits": 1500, "digits8": 1500, "mnist": 1600, "fashion": 1600, "cifar10": 1600}
"""Of rows that start from nothing; those that start from the static twin have half as many."""
SMALL = dict(augment=0.5)
"""Of the loss, for few pictures: a discriminator learns a thousand of them by heart."""
KINDS = {
    "static": ("static", "Static twin: all refinement steps, always"),
    "steps": ("steps", "Each picture stops refining by itself"),
    "steps_random": ("steps", "Control: pictures stop refining at random"),
    "scales": ("scales", "One generator of several sizes: a small picture runs a part of it"),
    "width": ("width", "Each picture has blocks of its own width"),
    "kernels": ("kernels", "Kernels generated from latent and class"),
    "dynamicd": ("discriminator", "Each picture is looked at as deep and wide as it needs (DynamicD)"),
}


def config(data: str, kind: str) -> Config:
    """The configuration of a row."""
    dynamics = KINDS[kind][0]
    model = dataclasses.replace(
        MODELS[data], dynamics=dynamics, gate="random" if kind.endswith("random") else "learned"
    )
    return Config(
        row=f"{data}_gan_{kind}",
        data=DATA[data],
        model=model,
        budget=BudgetConfig(target=0.3 if dynamics in ("steps", "width", "discriminator") else 0.5),
        loss=LossConfig(
            distillation=30.0 if dynamics == "steps" else 10.0, **(SMALL if data.startswith("digits") else {})
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup=0.02,
            weight_decay=0.0,
            gate_learning_rate=1.0,
            clip=float("inf"),
            momentum=0.0,
            decay=0.9,
            ema=0.995,
            falls=False,
        ),
        steps=STEPS[data] if dynamics == "static" else STEPS[data] // 2,
        batch_size=64,
        checkpoint_every=250,
        evaluate_every=500,
    )


def row(made: Config, kind: str, data: str, where: str = "") -> Row:
    """A row that draws pictures of `data`."""
    twin = made.row.replace(f"_gan_{kind}", "_gan_static")
    begin = "nothing" if kind == "static" else f"the weights of {twin} (--init-from)"
    protocol = f"{made.steps} steps of {made.batch_size} from {begin}. Report test: as many pictures as it has."
    return make_row(made, f"{KINDS[kind][1]}; {WHAT[data]}{where}.", protocol)


def full(data: str, kind: str, pictures: DataConfig, widths: tuple[int, ...]) -> Row:
    """A row of a GPU's size."""
    small = config("cifar10", kind)
    model = dataclasses.replace(
        small.model, shape=(*pictures.size, 3), widths=widths, discriminator=widths[::-1], latent=128, steps=8
    )
    long = dict(
        steps=100_000 if kind == "static" else 50_000, batch_size=256, checkpoint_every=2000, evaluate_every=5000
    )
    made = dataclasses.replace(small, row=f"{data}_gan_{kind}_full", data=pictures, model=model, **long)
    return row(made, kind, data, " (GPU)")


def _rows() -> Iterator[Row]:
    for data in ("digits", "mnist", "fashion", "cifar10"):
        yield from (row(config(data, kind), kind, data) for kind in KINDS)
    yield from (row(config("digits8", kind), kind, "digits8") for kind in ("static", "steps"))
    folder = DataConfig(name="class_folder", path="data/pictures", size=(64, 64), augment=DATA["cifar10"].augment)
    for kind in ("static", "steps"):
        yield full("cifar10", kind, dataclasses.replace(DATA["cifar10"], size=(32, 32)), (256, 128, 96))
        yield full("pictures64", kind, folder, (256, 192, 128, 64))


ROWS = tuple(_rows())
