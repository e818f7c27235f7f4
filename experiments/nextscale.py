"""Pictures from coarse to fine, with a dial: the rich network only where the plain one is uncertain.

python -m experiments.train mnist_nextscale --workdir runs/mnist_nextscale --data.path data/mnist
python -m experiments.evaluate --workdir runs/mnist_nextscale
python -m experiments.sample --workdir runs/mnist_nextscale --sampler coarse-to-fine --budget 0.5 --n 64 --out samples
python -m benchmarks.refinement --workdir runs/mnist_nextscale

{digits,mnist,fashion,cifar10}_nextscale: data and values as in experiments/autoregressive.py. Both networks are trained
on every pixel (the loss is the mean of the two), so one checkpoint serves every budget and every gate: controls need no
row of their own.
"""

from dynjax.models.nextscale import NextScaleConfig
from experiments.autoregressive import row

MODELS = {
    "digits": NextScaleConfig(reach=2, features=64, blocks=2),
    "mnist": NextScaleConfig(),
    "fashion": NextScaleConfig(),
    "cifar10": NextScaleConfig(reach=2, blocks=2),
}
STEPS = {"digits": 600, "cifar10": 1200}
ROWS = tuple(
    row(data, "nextscale", "Coarse to fine", model, steps=STEPS.get(data, 2500), batch_size=32)
    for data, model in MODELS.items()
)
