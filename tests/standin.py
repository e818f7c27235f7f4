"""A tiny model, task and loader for tests of the training loop; run as a script it trains and writes the model."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from made import Made

from dynjax.config import AugmentConfig, Config, OptimizerConfig
from dynjax.data import make_loader
from dynjax.data.source import picture_spec
from dynjax.models.resnet import ResNetConfig
from dynjax.run import mesh, train
from dynjax.run.arrays import named_arrays
from dynjax.tasks import Player


class Net(nnx.Module):
    """Convolution, BatchNorm, noise from a stream of its own, something called a gate, a list. Smooth: where rounding
    takes a number over a kink, two runs that differ in the order of their sums would part."""

    def __init__(self, rngs: nnx.Rngs, *, noise: bool = True, norm: bool = True):
        self.conv = nnx.Conv(3, 8, (3, 3), use_bias=not norm, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs) if norm else None
        self.drop = nnx.Dropout(0.3 if noise else 0.0, rngs=nnx.Rngs(dropout=7))
        self.gate = nnx.Linear(8, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(8, 8, (1, 1), rngs=rngs) for _ in range(2)])
        self.head = nnx.Conv(8, 4, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = self.conv(x.astype(self.head.kernel.dtype) / 127.5 - 1)
        x = nnx.silu(x if self.norm is None else self.norm(x))
        x = self.drop(x) * nnx.sigmoid(self.gate(x))
        for block in self.blocks:
            x = x + nnx.silu(block(x))
        return self.head(x).astype(jnp.float32)


def is_gate(path, variable):
    return "gate" in path


class Task:
    """Cross-entropy, with a little noise from the step's key if wanted."""

    def __init__(self, noise: float = 0.1):
        self.noise = noise

    @property
    def players(self):
        return (Player("model", self.loss),)

    def loss(self, model, batch, key, progress):
        logits = model(batch["image"])
        logits = logits + self.noise * jax.random.normal(key, logits.shape)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["mask"][..., None], -1)
        return -picked.mean(), {"progress": progress, "macs_fraction": jnp.float32(0.5)}


class Batches:
    """An endless loader whose iterator can be set to a position; process p of n gives its part of each batch."""

    def __init__(self, size: int = 8, process_index: int = 0, process_count: int = 1):
        self.size, self.index, self.count, self.next = size, process_index, process_count, 0

    def __iter__(self):
        return type(self)(self.size, self.index, self.count)

    def __next__(self):
        rng = np.random.default_rng(self.next)
        self.next += 1
        image = rng.integers(0, 256, (self.size, 8, 8, 3), dtype=np.uint8)
        part = np.split(image, self.count)[self.index]
        return {"image": part, "mask": (part[..., 0] // 64).astype(np.int32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def pictures() -> Made:
    """A source of 20 pictures of noise, 8x8, with masks of 4 classes."""

    def example(index):
        image = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return {"image": image, "mask": (image[..., 0] // 64).astype(np.int32)}

    return Made(20, picture_spec((8, 8), "mask"), example, classes=tuple("abcd"))


def loader(size: int = 8):
    """The loader that rows have, shuffled and augmented; this process's part of its batches."""
    return make_loader(pictures(), size, seed=1, augment=AugmentConfig(pad=1, cutout=2), **mesh.processes())


def config(**changes) -> Config:
    """Six steps of eight pictures; fields of the optimizer may be named directly."""
    inner = {name: changes.pop(name) for name in list(changes) if name in OptimizerConfig.__dataclass_fields__}
    fields = dict(row="standin", model=ResNetConfig(), steps=6, batch_size=8, checkpoint_every=2, evaluate_every=0)
    return Config(optimizer=OptimizerConfig(**inner), **fields | changes)


def fit(config: Config, workdir=None, *, model=None, task=None, loader=None, evaluate=None) -> train.Fitted:
    return train.fit(
        model or Net(nnx.Rngs(0)),
        task or Task(),
        loader or Batches(config.batch_size, **mesh.processes()),
        config,
        workdir,
        evaluate,
        gates=is_gate,
        quiet=True,
    )


def arrays(fitted: train.Fitted) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in named_arrays(nnx.state(fitted.model)).items()}


if __name__ == "__main__":
    out, workdir, changes = sys.argv[1], sys.argv[2] or None, json.loads(sys.argv[3])
    mesh.initialize()
    fitted = fit(config(**changes), workdir, loader=loader() if jax.process_count() > 1 else None)
    if jax.process_index() == 0:
        np.savez(out, devices=jax.device_count(), processes=jax.process_count(), **arrays(fitted))
