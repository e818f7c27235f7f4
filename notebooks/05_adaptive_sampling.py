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
# # Adaptive sampling
#
# An autoregressive model draws a picture pixel after pixel, and that takes long. Two ways to let the compute follow the
# content: an *exact* one, which draws the very same picture with fewer calls of the network, and one with a *dial*,
# coarse where a picture is plain and fine where it is complex.
#
# It runs on a CPU. With `DYNJAX_FAST=1` in the environment every cell runs on a toy scale, to see that it works; the
# numbers and pictures mean nothing then.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import dynjax as dj
from dynjax import models
from dynjax.config import DataConfig
from dynjax.core.deploy import Solver
from dynjax.data import make_source
from dynjax.models.likelihoods import quantise, to_bytes
from dynjax.models.nextscale import NextScaleConfig
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.ops import sampling
from dynjax.show.film import tile
from dynjax.tasks.autoregressive import training_nats

FAST = bool(os.environ.get("DYNJAX_FAST"))
STEPS, BATCH, FEATURES, LAYERS = (1, 4, 4, 1) if FAST else (400, 64, 24, 4)
DRAWN = 4 if FAST else 16
SHAPE, VALUES = (8, 8, 1), 16

# %% [markdown]
# ## Data and training
#
# The digits are scikit-learn's: 8x8 pixels of 16 values. The loss is the bits that a picture takes, per pixel.

# %%
digits = {
    split: np.stack([each["image"] for each in make_source(DataConfig(name="digits8", size=(8, 8)), split)])
    for split in ("train", "val", "test")
}


def train(model):
    """A few hundred steps of Adam."""
    optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(4e-3, STEPS)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, image):
        def loss(model):
            label, key = -jnp.ones(len(image), jnp.int32), jax.random.key(0)  # no labels, and no exits to train
            return training_nats(model, image, label, key).mean() / (np.log(2) * 64)

        bits, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return bits

    random = np.random.default_rng(0)
    for _ in range(STEPS):
        bits = step(model, optimizer, digits["train"][random.integers(len(digits["train"]), size=BATCH)])
    print(f"{float(bits):.2f} bits a pixel on the last batch")
    return model


model = train(
    models.build(PixelCNNConfig(shape=SHAPE, values=VALUES, features=FEATURES, layers=LAYERS), 10, rngs=nnx.Rngs(0))
)

# %% [markdown]
# ## Exact: the same noise is the same picture
#
# All of a picture's chance is drawn first. Pixel by pixel, the whole network runs for each of the 64 pixels. By fixed
# point, many pixels are drawn at once from what they were, until none changes: pictures that do not surprise the model
# are done after fewer calls, and leave the batch.

# %%
noise = sampling.make_noise(model, jax.random.key(0), DRAWN)
drawn = {}
for name in ("pixel", "cached", "fixed-point"):
    draw = jax.jit(lambda noise, name=name: sampling.SAMPLERS[name](model, noise))
    jax.block_until_ready(draw(noise))
    began = time.perf_counter()
    drawn[name] = jax.block_until_ready(draw(noise))
    took = 1e3 * (time.perf_counter() - began) / DRAWN
    differ = int((drawn[name].image != drawn["pixel"].image).sum())
    calls = np.asarray(drawn[name].calls)
    print(f"{name:12} {took:6.2f} ms a picture, {calls.min()} to {calls.max()} calls, {differ} pixels differ")

# %% [markdown]
# Above the pictures, below how often each pixel was evaluated: the compute goes where a picture surprises.

# %%
found = drawn["fixed-point"]
figure, grid = plt.subplots(2, 4, figsize=(7, 3.6), layout="constrained")
for column in range(4):
    grid[0, column].imshow(found.image[column, ..., 0], cmap="gray")
    shown = grid[1, column].imshow(found.visits[column], vmin=1, vmax=int(found.visits.max()))
    grid[1, column].set_xlabel(f"{int(found.calls[column])} calls")
for axes in grid.flat:
    axes.set_xticks([])
    axes.set_yticks([])
figure.colorbar(shown, ax=list(grid[1]), label="evaluations")
plt.show()

# %% [markdown]
# ## With a dial: coarse where plain, fine where complex
#
# The coarsest picture is drawn pixel by pixel; every finer scale adds the pixels between in three parallel steps. In
# each step a plain network predicts all of them, and a rich one those tiles again where the plain one's prediction has
# much entropy. How much is much is the budget: `deploy` solves the threshold, as everywhere in this library. Since a
# decision depends only on what is drawn already, bits per pixel are exact at every budget.

# %%
widths = dict(features=2 * FEATURES, coarse_features=FEATURES // 2)
config = NextScaleConfig(shape=SHAPE, values=VALUES, scales=2, reach=2, blocks=2, tile=1, **widths)
model = train(models.build(config, 10, rngs=nnx.Rngs(0)))
calibration, test = (quantise(jnp.asarray(digits[split]), VALUES, 1) for split in ("val", "test"))


@nnx.jit
def bits_and_macs(model, x):
    params, trace = dj.traced(model)(x)
    return -model.likelihood.log_prob(params, x).mean() / np.log(2), trace.macs().mean() / trace.full_macs


solver = Solver(model, [calibration])  # what `dj.deploy` makes, kept for several budgets
for budget in (0.3, 0.5, 0.75, 1.0):
    deployed = solver.deploy(budget).model
    bits, share = bits_and_macs(nnx.view(deployed, execution="masked", raise_if_not_found=False), test)
    print(f"budget {budget:4.0%}: {float(bits):.3f} bits a pixel, {float(share):.0%} of the MACs")

# %% [markdown]
# From left to right how pictures come to be at half of the MACs, and at last where these went.

# %%
deployed = solver.deploy(0.5).model
noise = sampling.make_noise(model, jax.random.key(1), 4)
image, _, _, moments = jax.jit(lambda noise: deployed.draw(noise))(noise)
heat = jax.jit(lambda x: dj.traced(deployed)(x)[1].heatmap((8, 8)))(image)
frames = np.stack([np.asarray(to_bytes(moment, VALUES)) for moment in moments], 1)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), width_ratios=(len(moments), 1), layout="constrained")
left.imshow(tile(frames.reshape(-1, 8, 8, 3), columns=len(moments)))
right.imshow(np.concatenate(heat))
for axes in (left, right):
    axes.set_axis_off()
plt.show()
