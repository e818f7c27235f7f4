"""A hierarchical VAE, whose groups of latents are skipped picture by picture.

python -m experiments.train mnist_vae_static --workdir runs/mnist_vae_static --data.path data/mnist
python -m experiments.train mnist_vae_groups --workdir runs/vae --data.path data/mnist --init-from runs/mnist_vae_static
python -m experiments.evaluate --workdir runs/vae

{digits,mnist,cifar10}_vae_{static,groups,random}: digits of 16 values, MNIST in black and white, CIFAR-10 of all 256.
The bound is on bits per dimension; drawn.png has pictures that were drawn at the middle budget.
"""

import dataclasses

from dynjax.config import BudgetConfig
from dynjax.models.vae import VAEConfig
from experiments.autoregressive import SHAPES, WHAT, config
from experiments.labelled import Row, make_row

MODELS = {
    "digits": VAEConfig(groups=(2, 5, 0), free_bits=1.0),
    "mnist": VAEConfig(groups=(3, 4, 0), free_bits=1.0),
    "cifar10": VAEConfig(groups=(2, 3, 4, 0), components=3, free_bits=1.0),
}
STEPS = {"digits": 2000, "mnist": 3000, "cifar10": 2000}
FROM_TWIN = 1 / 2
"""Steps of a dynamic row, which starts from the trained twin, as a share of the twin's."""


def _rows(data: str) -> tuple[Row, ...]:
    model = dataclasses.replace(MODELS[data], **SHAPES[data])
    static = config(data, "vae_static", model, steps=STEPS[data])
    budget, dynamic = BudgetConfig(target=0.4), dataclasses.replace(model, dynamics="groups")
    gates = config(data, "vae_groups", dynamic, steps=int(static.steps * FROM_TWIN), budget=budget)
    chance = dataclasses.replace(gates, row=f"{data}_vae_random", model=dataclasses.replace(dynamic, gate="random"))
    report = "Choose on val, report test, a bound in bits per dimension."
    second = f"{gates.steps} steps from {static.row} (--init-from); a budget from [{budget.target}, 1] at every step."
    return (
        make_row(
            static,
            f"Static twin of a hierarchical VAE, {WHAT[data]}.",
            f"{static.steps} steps of {static.batch_size}. {report}",
        ),
        make_row(
            gates,
            f"Hierarchical VAE whose groups of latents are skipped per picture, {WHAT[data]}.",
            f"{second} {report}",
        ),
        make_row(chance, f"Control: {gates.row} that chooses at random.", f"{second} {report}"),
    )


ROWS = tuple(row for data in MODELS for row in _rows(data))
