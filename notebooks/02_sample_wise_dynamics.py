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
# # Sample-wise dynamics
#
# Every kind of network that gives each picture the compute that it needs: blocks that are skipped, steps until a
# picture is done, exits, channels, widths, experts, paths, and kernels made for the input. Each is a few lines around
# plain Flax modules, is trained here for a moment on handwritten digits, and shows its decisions: a row for every
# picture, a column for everything that could be left out.
#
# It runs on a CPU. With `DYNJAX_FAST=1` in the environment every cell runs on a toy scale, to see that it works; the
# numbers and pictures mean nothing then.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import dynjax as dj
from dynjax import budget
from dynjax.config import DataConfig
from dynjax.data import make_source
from dynjax.ops import router_z_loss
from dynjax.tasks.classification import cross_entropy

FAST = bool(os.environ.get("DYNJAX_FAST"))
STEPS, BATCH, CHANNELS = (1, 4, 4) if FAST else (1000, 64, 16)
SIZE, DEPTH = ((8, 8), 2) if FAST else ((16, 16), 4)
rngs = nnx.Rngs(0)

# %% [markdown]
# ## Data, a frame for all networks, and training
#
# The digits are scikit-learn's. `Net` has a stem and a head; what is between them is what each section is about.

# %%
sources = {split: make_source(DataConfig(name="digits8", size=SIZE), split) for split in ("train", "test")}
data = {
    split: tuple(np.stack([source[i][key] for i in range(len(source))]) for key in ("image", "label"))
    for split, source in sources.items()
}


class Net(nnx.Module):
    def __init__(self, body):
        self.stem = nnx.Conv(3, CHANNELS, (3, 3), strides=2, rngs=rngs)
        self.body = body
        self.head = nnx.Linear(CHANNELS, 10, rngs=rngs)

    def __call__(self, image):
        x = self.body(nnx.relu(self.stem(image / 127.5 - 1)))
        return x if x.ndim == 2 else self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """A residual block without batch statistics, so that every cell below stays short."""

    def __init__(self):
        self.conv1, self.conv2 = (nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return nnx.relu(x + self.conv2(nnx.relu(self.conv1(x))))


def train(model, target=0.6, loss_of=None):
    """Some steps of Adam on the task's loss and the budget's; `loss_of(model, image, label)` replaces the task's."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, image, label):
        def loss_fn(model):
            logits, trace = dj.traced(model)(image)
            task = cross_entropy(logits, label).mean() if loss_of is None else loss_of(model, image, label)
            return task + 5 * dj.budget_loss(trace, target=target)

        optimizer.update(model, nnx.grad(loss_fn)(model))

    images, labels = data["train"]
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        pick = random.integers(len(images), size=BATCH)
        step(model, optimizer, images[pick], labels[pick])
    return model


def show(title, model, names=None, target=0.6):
    """Deploys at a budget, and draws what each of twelve pictures was given, the cheapest first."""
    images, labels = data["test"]
    fast = dj.deploy(model, budget=target, calibration=[data["train"][0][:128]])
    logits, trace = jax.jit(lambda x: dj.traced(fast.model)(x))(images[:128])
    right = float((logits.argmax(-1) == labels[:128]).mean())
    spent = np.asarray(trace.macs())
    order = np.argsort(spent, kind="stable")[np.linspace(0, 127, 12).astype(int)]
    columns = []
    for decision in trace.decisions.values():
        shown = decision.probability if decision.rule.name == "mixture" else decision.keep
        shown = np.asarray(shown)[order].reshape(len(order), -1, *(shown.shape[-1:] if shown.ndim > 1 else ()))
        columns.append(shown.mean(1) if shown.ndim == 3 else shown)
    table = np.concatenate(columns, 1)
    figure, (left, axes) = plt.subplots(1, 2, figsize=(7, 4.8), width_ratios=(1, 12), layout="constrained")
    left.imshow(np.concatenate([images[i][:, :, 0] for i in order]), cmap="gray", aspect="equal")
    left.set_axis_off()
    axes.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(12), [f"{spent[i] / 1e3:.0f} kMAC" for i in order], fontsize=7)
    axes.set_xticks(range(table.shape[1]), names or range(table.shape[1]), fontsize=8)
    figure.suptitle(f"{title}: {right:.0%} right, {spent.mean() / trace.full_macs:.0%} of the MACs", fontsize=10)
    plt.show()


# %% [markdown]
# ## Depth: blocks that a gate skips
#
# A gate before each block looks at the features and decides (SkipNet, ConvNet-AIG).

# %%
blocks = [dj.Skip(Block(), dj.SampleGate(CHANNELS, rngs=rngs)) for _ in range(DEPTH)]
show("Skip", train(Net(nnx.Sequential(*blocks))), [f"block {k}" for k in range(DEPTH)])

# %% [markdown]
# ## Depth: one policy for all blocks
#
# A network sees the input once and decides about every block (BlockDrop).

# %%
policy = dj.ChannelGate(CHANNELS, DEPTH, rngs=rngs)
model = Net(dj.PolicySkip([Block() for _ in range(DEPTH)], policy))
show("PolicySkip", train(model), [f"block {k}" for k in range(DEPTH)])

# %% [markdown]
# ## Depth: steps until a picture is done
#
# One block again and again; a halting unit says when it is enough (adaptive computation time).

# %%
model = Net(dj.Halt(Block(), dj.SampleGate(CHANNELS, bias=0.0, rngs=rngs), max_steps=DEPTH))
show("Halt", train(model), [f"step {k}" for k in range(DEPTH)])

# %% [markdown]
# ## Depth: early exits
#
# A head after every stage; a picture that a head is sure about goes no further (BranchyNet, MSDNet). All heads are
# trained; the threshold is solved afterwards, so one network serves every budget.


# %%
class Head(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(CHANNELS, 10, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.mean((1, 2)))


def all_heads(model, image, label):
    outputs = model.body.predictions(nnx.relu(model.stem(image / 127.5 - 1)))
    return jnp.stack([cross_entropy(logits, label).mean() for logits in outputs]).mean()


model = Net(dj.Exits([Block() for _ in range(DEPTH)], [Head() for _ in range(DEPTH)]))
show("Exits", train(model, loss_of=all_heads), [f"stage {k}" for k in range(DEPTH)])

# %% [markdown]
# ## Width: groups of channels
#
# Each picture has its own groups of hidden channels; the weights of the others are not touched.

# %%
first, last = (nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in ((CHANNELS, 4 * CHANNELS), (4 * CHANNELS, CHANNELS)))
model = Net(dj.Channels([first, nnx.relu], last, dj.ChannelGate(CHANNELS, 8, rngs=rngs)))
show("Channels", train(model), [f"{k}" for k in range(8)])

# %% [markdown]
# ## Width: a slice of the layer
#
# A slimmable pair of layers: each picture gets the first quarter, half, three quarters or all of the hidden channels
# (DS-Net). The shares are one layer's: nothing is stored twice.

# %%
first, last = (nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in ((CHANNELS, 4 * CHANNELS), (4 * CHANNELS, CHANNELS)))
model = Net(dj.Slimmable([first, nnx.relu], last, dj.BranchGate(CHANNELS, 4, rngs=rngs)))
show("Slimmable", train(model), ["1/4", "1/2", "3/4", "1"])

# %% [markdown]
# ## Width: mixture of experts
#
# Every pixel of the map is a token that takes one or two of four experts. None is dropped. The picture shows the share
# of a picture's tokens that each expert got.


# %%
class Tokens(nnx.Module):
    """A map as a sequence of its pixels, and back."""

    def __init__(self, body):
        self.body = body

    def __call__(self, x):
        return x + self.body(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


router = dj.Router(CHANNELS, 4, top=2, least=1, rngs=rngs)
model = Net(Tokens(dj.Experts(CHANNELS, 32, 4, gate=router, rngs=rngs)))


def balanced(model, image, label):
    logits, trace = dj.traced(model)(image)
    balance = 0.01 * budget.load_balance(trace) + 1e-3 * router_z_loss(model)
    return cross_entropy(logits, label).mean() + balance


show("Experts", train(model, target=0.8, loss_of=balanced), [f"expert {k}" for k in range(4)], target=0.8)

# %% [markdown]
# ## Routing: paths through a supernet
#
# Cells at several scales; soft gates, zero where a path is closed, decide which way a picture goes (dynamic routing).
# A closed path costs nothing.

# %%
from dynjax import models
from dynjax.models.routed import RoutedConfig

model = models.build(RoutedConfig(channels=CHANNELS // 2, scales=2, layers=DEPTH, dynamics="gates"), 10, rngs=rngs)
model = nnx.view(model, use_running_average=False, raise_if_not_found=False)
show("Supernet", train(model))

# %% [markdown]
# ## Kernels: mixed for each picture
#
# Dynamic convolution: attention over four kernels, which are mixed before one convolution. It saves no MACs; it makes a
# small network stronger. The picture shows the weights of the mixture.

# %%
from dynjax.ops.kernels import DynamicConv

layers = [DynamicConv(CHANNELS, CHANNELS, (3, 3), kernels=4, rngs=rngs) for _ in range(2)]
model = Net(nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu))


def plain(title, model, names):
    """As `show`, without a budget: there is nothing to leave out."""
    images, labels = data["test"]
    logits, trace = dj.traced(nnx.view(model, deterministic=True, raise_if_not_found=False))(images[:128])
    table = np.concatenate([np.asarray(d.probability)[:20] for d in trace.decisions.values()], 1)
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.imshow(table, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(table.shape[1]), names, fontsize=8)
    axes.set_yticks([])
    axes.set_ylabel("pictures")
    right = float((logits.argmax(-1) == labels[:128]).mean())
    figure.suptitle(f"{title}: {right:.0%} right", fontsize=10)
    plt.show()


names = [f"{layer}.{kernel}" for layer in range(2) for kernel in range(4)]
plain("DynamicConv", train(model), names)

# %% [markdown]
# ## Further
#
# Each kind has rows that train at full length: `python -m experiments.train --list`. `benchmarks/dynamics.py` measures
# what every kind saves. The README has the table of kinds, papers and measurements.
