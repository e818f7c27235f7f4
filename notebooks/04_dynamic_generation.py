# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Dynamic generation
#
# A network that makes a whole picture of noise at once takes the same compute for a one as for an eight. Here the
# picture decides: a GAN that refines a picture in steps and stops by itself, one that draws in several sizes, and a VAE
# that skips groups of its latents. All of them are trained here, each for some seconds.
#
# It runs on a CPU. With `DYNJAX_FAST=1` in the environment every cell runs on a toy scale, to see that it works; the
# numbers and pictures mean nothing then.

# %%
import dataclasses
import functools
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import Image, display

import dynjax as dj
from dynjax import models
from dynjax.config import BudgetConfig, Config, DataConfig, LossConfig, OptimizerConfig
from dynjax.core.controls import RandomGate
from dynjax.core.deploy import Solver
from dynjax.data import make_source
from dynjax.models.gan import GanConfig
from dynjax.models.vae import VAEConfig
from dynjax.run.train import fit
from dynjax.show import film, gallery
from dynjax.tasks import generated
from dynjax.tasks.adversarial import AdversarialTask
from dynjax.tasks.distances import Moments, frechet_distance
from dynjax.tasks.variational import VariationalTask

FAST = bool(os.environ.get("DYNJAX_FAST"))
STEPS, BATCH, DRAWN = (1, 4, 16) if FAST else (500, 48, 360)
BUDGETS = (1.0, 0.5) if FAST else (1.0, 0.85, 0.7, 0.6, 0.5, 0.4)
SMALL = dict(latent=4, widths=(4, 4), discriminator=(4, 4), steps=2)
GAN = GanConfig(
    shape=(16, 16, 1), conditional=True, **(SMALL if FAST else dict(widths=(32, 16), discriminator=(16, 32), steps=4))
)

# %% [markdown]
# ## Data, training, and a distance
#
# The digits are scikit-learn's, shown at 16x16. How far drawn pictures are from real ones is the Fréchet distance, here
# of the pixels themselves: of a classifier's features, as `experiments.evaluate` has it, it means more, and takes
# longer.


# %%
def arrays(split, side):
    source = make_source(DataConfig(name="digits8", size=(side, side)), split)
    examples = [source[index] for index in range(len(source))]
    return {key: np.stack([example[key] for example in examples]) for key in ("image", "label")}


class Pixels(nnx.Module):
    """Features of a picture of bytes: its pixels from 0 to 1, at 8x8."""

    name, distance_name, checksum = "pixels", "Fréchet distance (pixels)", "pixels"

    def __call__(self, image):
        return image[..., 0].reshape(len(image), 8, image.shape[1] // 8, 8, -1).mean((2, 4)).reshape(-1, 64) / 255

    def probabilities(self, image):
        return None


def moments(image):
    return Moments.of(np.asarray(Pixels()(image)))


def train(config, task, data, twin=None, **optimizer):
    """Some hundred steps, from nothing or from a static twin; the model with the averaged parameters."""
    random, settings = np.random.default_rng(0), dict(warmup=0.05, weight_decay=0.0, gate_learning_rate=1.0)
    config = Config(
        row="notebook", model=config, steps=STEPS, batch_size=BATCH, optimizer=OptimizerConfig(**settings | optimizer)
    )
    picks = (random.integers(len(data["image"]), size=BATCH) for _ in range(STEPS))
    batches = ({key: values[pick] for key, values in data.items()} for pick in picks)
    start = models.build(config.model, 10, rngs=nnx.Rngs(0), twin_params=twin)
    return fit(start, task, batches, config, quiet=True).model


def train_gan(config, budget=None, twin=None):
    losses = LossConfig(gradient_penalty=1.0, distillation=30.0)
    task = AdversarialTask(losses, config.dynamics, Pixels(), reference, budget)
    adam = dict(learning_rate=2e-3, momentum=0.0, decay=0.9, ema=0.98, clip=float("inf"), falls=False)
    return train(config, task, digits, twin, **adam)


def show(pictures, columns):
    """Pictures in rows of so many."""
    sheet = film.tile(np.asarray(pictures), columns)
    figure = plt.figure(figsize=(sheet.shape[1] / 25, sheet.shape[0] / 25), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(sheet)
    axes.set_axis_off()
    plt.show()


digits, test = arrays("train", 16), arrays("test", 16)
reference = moments(test["image"])
floor = frechet_distance(moments(digits["image"]), reference)
print(f"{len(digits['image'])} digits; distance of train from test {floor:.2f}")

# %% [markdown]
# ## Pictures that stop refining by themselves
#
# The generator draws a small map from noise and class, and then applies one block again and again. At first all steps,
# always: the static twin.

# %%
static = train_gan(GAN)
show(generated.pictures(static, 40), 20)

# %% [markdown]
# From its weights: after each step a gate may say that the picture is done. While training, a third of the pictures is
# judged after all steps, a third after any number of them, and a third where the gate stops; every step is taught by
# the twin, which stays as it is, and compute has its price.

# %%
twin = nnx.state(static, nnx.Param)
model = train_gan(dataclasses.replace(GAN, dynamics="steps"), BudgetConfig(target=0.3), twin)
show(generated.pictures(model, 40), 20)

# %% [markdown]
# Each row is a picture after every one of the steps.

# %%
moments_of = generated.steps(model, 6)
show(moments_of.reshape(-1, 16, 16, 3), moments_of.shape[1])

# %% [markdown]
# ## Deployed at half of the compute
#
# `deploy` solves the threshold of the gate on pictures that are not kept. Its model is compact: a picture that is done
# leaves the batch.


# %%
def draw(model, given, size=0):
    noise, label = given
    return model.picture(noise, label, size=size)


def inputs(first, count=DRAWN):
    """Noise and labels of pictures from number `first` on."""
    return generated.make_noise(model, 0, first, count), jnp.arange(count) % 10


@functools.partial(nnx.jit, static_argnames="size")
def drawn(model, given, size=0):
    """Pictures, and the MACs of each."""
    pictures, trace = dj.traced(draw)(model, given, size)
    return pictures, trace.macs()


masked = lambda model: nnx.view(model, execution="masked", raise_if_not_found=False)  # noqa: E731
deployed = dj.deploy(model, 0.5, [inputs(DRAWN)], run=draw)
print(deployed.report)
pictures, macs = map(np.asarray, drawn(masked(deployed.model), inputs(0)))
compact = np.asarray(nnx.jit(draw)(deployed.model, inputs(0)))
print(f"{(compact != pictures).any(-1).sum()} of {pictures[..., 0].size} pixels differ between masked and compact")
hard = film.rank_correlation(macs, np.array([film.png_bytes(each) for each in pictures]))
print(f"rank correlation of a picture's MACs with its size as PNG: {hard:.2f}")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "grid.png"
    gallery.plot_grid(path, pictures[:64], macs[:64])
    display(Image(filename=path))

# %% [markdown]
# What is it worth that the gate chooses? The same generator, stopped at random as often. To the right, how far
# pictures are from what all steps would have made of them, in brightness from 0 to 1.

# %%
chance = nnx.clone(model)
chance.generator.refine.gate = RandomGate(0.75, rngs=nnx.Rngs(0))
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for name, each in {"learned": model, "random": chance}.items():
    solver = Solver(each, [inputs(DRAWN)], draw)
    found = [drawn(masked(solver.deploy(share).model), inputs(0)) for share in BUDGETS]
    points = []
    for images, spent in found:
        off = np.abs(np.float32(images) - np.float32(found[0][0])).mean() / 255
        points.append((float(spent.mean()) / solver.full, frechet_distance(moments(images), reference), off))
    shares, far, off = zip(*points, strict=True)
    left.plot(shares, far, "o-", label=name)
    right.plot(shares, off, "o-", label=name)
    print(f"{name:8}", *(f"{each[0]:.0%}: {each[1]:.2f} {each[2]:.4f}" for each in points), sep="  ")
left.set(xlabel="share of the MACs", ylabel=Pixels.distance_name, ylim=(0, None))
right.set(xlabel="share of the MACs", ylabel="off from all steps", ylim=(0, None))
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## One generator, several sizes
#
# With a painter at every resolution a preview runs a part of the generator only, and is the full picture seen from
# afar. Above previews, below the same pictures in full.

# %%
model = train_gan(dataclasses.replace(GAN, dynamics="scales"))
rows = []
for size in (1, 0):
    images, macs = drawn(model, inputs(0, 12), size=size)
    print(f"{images.shape[1]}x{images.shape[2]}: {macs.mean() / 1e6:.2f} MMAC a picture")
    rows.append(np.asarray(images).repeat(2**size, 1).repeat(2**size, 2))
show(np.concatenate(rows), 12)

# %% [markdown]
# ## A VAE whose groups of latents are skipped
#
# The decoder of a hierarchical VAE goes from coarse to fine, group of latents by group. A gate before each sees what is
# drawn so far, which is the same whether a picture is drawn or explained: the bound on its bits is exact at every
# budget.

# %%
config = VAEConfig(shape=(8, 8, 1), values=16, groups=(2, 3), features=16, free_bits=1.0, dynamics="groups")
if FAST:
    config = models.tiny(config)
task = VariationalTask(free_bits=config.free_bits, budget=BudgetConfig(target=0.4))
model = train(config, task, arrays("train", 8), learning_rate=3e-3)


def explain(model, batch):
    return task.infer(model, batch)


@nnx.jit
def bound(model, batch):
    found, trace = dj.traced(explain)(model, batch)
    return task.counts(model, found, batch), trace.macs().mean() / trace.full_macs


batch = task.prepare(model, arrays("test", 8))
noise = generated.make_noise(model, 0, 0, 16)
explained, sampled = (
    Solver(model, [task.prepare(model, arrays("val", 8))], explain),
    Solver(model, [(noise, None)], draw),
)
rows = []
for share in (1.0, 0.5):
    counts, spent = bound(masked(explained.deploy(share).model), batch)
    images, macs = drawn(masked(sampled.deploy(share).model), (noise, None))
    bits = task.scores(np.asarray(counts))["bits_per_dim"]
    print(
        f"{share:4.0%}: drawing {macs.mean() / 1e6:.2f} MMAC, explaining {spent:.0%} of the MACs, {bits:.3f} bits/dim"
    )
    rows.append(np.asarray(images).repeat(2, 1).repeat(2, 2))
show(np.concatenate(rows), 16)

# %% [markdown]
# ## Further
#
# The rows `*_gan_*` and `*_vae_*` (`experiments/gan.py`, `experiments/vae.py`) do the same on MNIST, Fashion-MNIST and
# CIFAR-10; `experiments.sample` draws from their workdirs.
#
# Half a minute of training makes the gate no better than chance here, where one step is nearly as good as four. On
# MNIST it is better: `experiments/RESULTS.md`.
