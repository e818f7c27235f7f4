"""VQ-VAE, and an autoregressive model of its codes, which every exact sampler draws.

python -m experiments.train mnist_vqvae --workdir runs/mnist_vqvae --data.path data/mnist
python -m experiments.train mnist_codes --workdir runs/mnist_codes --data.path data/mnist --init-from runs/mnist_vqvae
python -m experiments.evaluate --workdir runs/mnist_codes
python -m experiments.sample --workdir runs/mnist_codes --sampler fixed-point --n 64 --out samples

{digits,mnist,fashion,cifar10}_{vqvae,codes,codes_exits}: a gated PixelCNN of the codes, and a transformer in which
codes that are sure leave early. {digits,mnist}_codes_labels is a larger PixelCNN that is asked by label. Bits per
dimension of codes are bits per code.
"""

import dataclasses

from dynjax.models.codes import CodesConfig
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.models.pixeltransformer import PixelTransformerConfig
from dynjax.models.vqvae import VQVAEConfig
from experiments.autoregressive import SHAPES, config
from experiments.labelled import Row, make_row

MODELS = {
    "digits": VQVAEConfig(halvings=1, codes=32, blocks=0),
    "mnist": VQVAEConfig(),
    "fashion": VQVAEConfig(),
    "cifar10": VQVAEConfig(codes=256, code_features=16, features=48),
}
WHAT = {"digits": "8x8 digits", "mnist": "MNIST", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10"}
STEPS = {"digits": 600, "mnist": 3000}
"""Of a VQ-VAE; otherwise 1500."""
CODE_STEPS = {"digits": 300, "mnist": 4000}
"""Of a model of codes; otherwise 1500."""
LABELS = ("digits", "mnist")
"""Sets whose codes are drawn by label too."""


def _rows(data: str) -> tuple[Row, ...]:
    coder = dataclasses.replace(MODELS[data], shape=SHAPES[data]["shape"])
    vqvae = config(data, "vqvae", coder, steps=STEPS.get(data, 1500))
    steps = CODE_STEPS.get(data, 1500)
    prior = CodesConfig(vqvae=coder, prior=PixelCNNConfig(features=48, layers=5))
    codes = config(data, "codes", prior, steps=steps)
    transformer = CodesConfig(vqvae=coder, prior=PixelTransformerConfig(features=64, layers=6, dynamics="exits"))
    exits = config(data, "codes_exits", transformer, steps=steps)
    protocol = f"{codes.steps} steps of {vqvae.batch_size}. Choose on val, report test"
    larger = dataclasses.replace(prior, prior=PixelCNNConfig(features=64, layers=7, conditional=True))
    labels = make_row(
        config(data, "codes_labels", larger, steps=steps),
        f"Gated PixelCNN of the codes of {data}_vqvae (--init-from), asked by label.",
        f"{protocol}, in bits per code.",
    )
    return (
        make_row(
            vqvae,
            f"VQ-VAE, {WHAT[data]}.",
            f"{vqvae.steps} steps of {vqvae.batch_size}. Choose on val, report test, in dB of PSNR.",
        ),
        make_row(
            codes, f"Gated PixelCNN of the codes of {data}_vqvae (--init-from).", f"{protocol}, in bits per code."
        ),
        make_row(
            exits,
            f"Causal transformer of the codes of {data}_vqvae (--init-from) that leaves early.",
            f"{protocol}, in bits per code; all heads count alike.",
        ),
        *([labels] if data in LABELS else []),
    )


ROWS = tuple(row for data in MODELS for row in _rows(data))
