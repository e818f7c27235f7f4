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
# # Make a model adaptive
#
# A plain Flax model spends the same compute on every pixel of every picture. Here one is trained, made adaptive, held
# to a compute budget, and run so that it really skips. Four ideas do it:
#
# 1. a **gate** decides where a block runs,
# 2. an **executor** carries the decision out, *masked* (computes everything, differentiable) or *compact* (skips),
# 3. a **trace** accounts for the multiply-accumulates (MACs) that were spent,
# 4. a **budget** steers them, with a loss while training and with a threshold afterwards.
#
# It runs on a CPU. With `DYNJAX_FAST=1` in the environment every cell runs on a toy scale, to see that it works; the
# numbers mean nothing then.

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
from dynjax.config import AugmentConfig, DataConfig
from dynjax.data import calibration_batches, make_loader, make_source

FAST = bool(os.environ.get("DYNJAX_FAST"))
STEPS, BATCH = (2, 4) if FAST else (300, 8)
WIDTHS = (8, 8, 8) if FAST else (16, 24, 32)
BUDGETS = (0.5,) if FAST else (0.3, 0.4, 0.5, 0.7, 1.0)

# %% [markdown]
# ## The data
#
# Handwritten digits on photographs, rendered from what scikit-learn and scikit-image install. The task is to find the
# strokes: for every pixel, digit or not. (The classes are in the masks too; telling them apart takes longer to
# train.) Some scenes are nearly empty and some are crowded, so some need more work than others.

# %%
config = DataConfig(name="digits", examples=40 if FAST else 1000, size=(48, 48) if FAST else (96, 96))
train_set, val_set, test_set = (make_source(config, split) for split in ("train", "val", "test"))
BACKGROUND = train_set.classes.index("background")
for source in (train_set, val_set, test_set):
    print(source.describe())

test_images = np.stack([test_set[i]["image"] for i in range(len(test_set))])
test_strokes = np.stack([test_set[i]["mask"] != BACKGROUND for i in range(len(test_set))])


# %%
def show(*rows, titles=(), **options):
    """A grid of pictures: rows of the same number of pictures each; options of imshow."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(2.2 * len(rows[0]), 2.2 * len(rows)), squeeze=False)
    for ax, picture in zip(axes.flat, (picture for row in rows for picture in row), strict=True):
        ax.imshow(picture, **options)
        ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize=9)
    figure.tight_layout()
    plt.show()


show(test_images[:4], test_strokes[:4])

# %% [markdown]
# ## A plain model
#
# A small encoder and decoder in plain `flax.nnx`: three resolutions, one or two residual blocks at each. Nothing in
# it knows of dynjax.


# %%
class Conv(nnx.Module):
    """A convolution, batch normalisation and ReLU."""

    def __init__(self, before, after, size, stride=1, *, rngs):
        self.conv = nnx.Conv(before, after, (size, size), strides=stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(after, momentum=0.95, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Block(nnx.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels, *, rngs):
        self.conv1 = Conv(channels, channels, 3, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x):
        return x + self.conv2(self.conv1(x))


class Net(nnx.Module):
    """A logit for every pixel, (B, H, W), from bytes (B, H, W, 3)."""

    def __init__(self, widths, *, rngs):
        fine, middle, coarse = widths
        self.stem = Conv(3, fine, 4, 2, rngs=rngs)
        self.fine_in = Block(fine, rngs=rngs)
        self.down1 = Conv(fine, middle, 2, 2, rngs=rngs)
        self.middle_in = Block(middle, rngs=rngs)
        self.down2 = Conv(middle, coarse, 2, 2, rngs=rngs)
        self.coarse = nnx.Sequential(Block(coarse, rngs=rngs), Block(coarse, rngs=rngs))
        self.up2 = nnx.ConvTranspose(coarse, middle, (2, 2), strides=(2, 2), rngs=rngs)
        self.middle_out = Block(middle, rngs=rngs)
        self.up1 = nnx.ConvTranspose(middle, fine, (2, 2), strides=(2, 2), rngs=rngs)
        self.fine_out = Block(fine, rngs=rngs)
        self.head = nnx.ConvTranspose(fine, 1, (2, 2), strides=(2, 2), rngs=rngs)

    def __call__(self, image):
        fine = self.fine_in(self.stem(image / 127.5 - 1))
        middle = self.middle_in(self.down1(fine))
        coarse = self.coarse(self.down2(middle))
        middle = self.middle_out(middle + self.up2(coarse))
        fine = self.fine_out(fine + self.up1(middle))
        return self.head(fine)[..., 0]


plain = Net(WIDTHS, rngs=nnx.Rngs(0))
one_image = jax.ShapeDtypeStruct((1, *config.size, 3), jnp.uint8)
print(f"{dj.cost.macs(plain, one_image) / 1e6:.1f} MMAC for one picture, whatever is on it")

# %% [markdown]
# An ordinary training loop. `loss_fn` is the only part of it that will change.


# %%
def train(model, loss_fn, learning_rate):
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 1 + STEPS // 20, STEPS)
    optimizer = nnx.Optimizer(model, optax.adamw(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch, key, progress):
        (_, metrics), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch, key, progress)
        optimizer.update(model, grads)
        return metrics

    model.train()
    batches = iter(make_loader(train_set, BATCH, seed=0, augment=AugmentConfig(crop=1.0)))
    for i in range(STEPS):
        metrics = step(model, optimizer, jax.device_put(next(batches)), jax.random.key(i), i / STEPS)
        if i % 50 == 0 or i == STEPS - 1:
            print(f"step {i:4}", *(f"{name} {value:.2f}" for name, value in metrics.items()), sep="  ")
    model.eval()


def cross_entropy(logits, mask):
    return optax.sigmoid_binary_cross_entropy(logits, mask != BACKGROUND).mean()


def plain_loss(model, batch, key, progress):
    loss = cross_entropy(model(batch["image"]), batch["mask"])
    return loss, {"loss": loss}


train(plain, plain_loss, learning_rate=5e-3)


# %% [markdown]
# `dj.traced` runs a model and gives, beside its output, a trace of what it spent. It works on any model; here it only
# counts.


# %%
def evaluate(run):
    """Intersection over union of the strokes in the test scenes, and the MACs of each scene."""
    found, macs = [], []
    for images in np.split(test_images, len(test_images) // 4):
        logits, trace = run(images)
        found.append(logits > 0)
        macs.append(trace.macs())
    found, macs = np.concatenate(found), np.concatenate(macs)
    return (found & test_strokes).sum() / (found | test_strokes).sum(), macs


plain_iou, plain_macs = evaluate(jax.jit(dj.traced(plain)))
print(f"plain: IoU {plain_iou:.3f}, {plain_macs.mean() / 1e6:.1f} MMAC per picture")

# %% [markdown]
# ## 1. A gate decides
#
# `dj.dynamize` copies a model and wraps the modules whose paths match a pattern. The four blocks of the two fine
# levels get a `dj.Tiles` each: the map is cut into tiles of 8x8, and a `dj.TileGate`, a few small matrix products,
# decides for every tile whether the block runs on it. Where it does not, the features pass unchanged.


# %%
def tiles(block, channels, rngs):
    return dj.Tiles(block, dj.TileGate(channels, size=8, rngs=rngs))


model = dj.dynamize(plain, {"(fine|middle)_(in|out)": tiles}, rngs=nnx.Rngs(1))
print(type(plain.fine_in).__name__, "->", type(model.fine_in).__name__, "around", type(model.fine_in.block).__name__)

# %% [markdown]
# What a gate gives is a `Decision`: data, 0 or 1 for each tile. The trace holds the decisions of all wrappers. While
# training, gates draw noise; `model.eval()` turns it off, as it does for dropout. Gates start open, so nothing has
# changed yet.

# %%
model.eval()
images = test_images[:4]
logits, trace = jax.jit(dj.traced(model))(images)
for path, decision in trace.decisions.items():
    print(f"{path:12} decisions per {decision.place} {decision.keep.shape}, kept {decision.kept():.0%}")
print("largest difference to the plain model:", float(jnp.abs(logits - plain(images)).max()))

# %% [markdown]
# ## 2. An executor carries it out
#
# Every decision has two executions. *Masked* computes the block everywhere and blends; gradients flow, so training
# uses it. *Compact* computes the block only on the tiles that were kept, each with the border that its convolutions
# need. Same parameters, same answer. To see it, close the gates for a part of the tiles: a higher threshold keeps
# less.

# %%
half_closed = nnx.clone(model)
dj.budget.set_threshold(half_closed, 2.0)
masked, trace = jax.jit(dj.traced(nnx.view(half_closed, execution="masked")))(images)
compact, _ = jax.jit(dj.traced(nnx.view(half_closed, execution="compact")))(images)
print(f"kept {trace.decisions['fine_in'].kept():.0%} of the tiles of the first block")
print("largest difference:", float(jnp.abs(masked - compact).max()))

# %% [markdown]
# ## 3. A trace accounts
#
# The trace knows what every decision costs, in MACs read from the model itself: the gates' own cost, and the border
# of every kept tile, are part of it. This is what the half-closed model spends on the four pictures:

# %%
print("MMAC of each picture:", [f"{macs:.1f}" for macs in trace.macs() / 1e6])
print(f"with everything kept: {trace.full_macs / 1e6:.1f}, with nothing kept: {trace.static_macs / 1e6:.1f}")

# %% [markdown]
# ## 4. A budget steers
#
# The loss gets a second term: `dj.budget_loss` pulls the MACs that were spent to a target. The target is drawn anew
# at every step and the gates' threshold moves with it, so that the gates learn which tiles matter most, second most,
# and so on, and one set of parameters serves every budget. `dj.budget.release` lets the gates differ from each other
# only gradually, so that none of them closes for good before it has learnt anything.


# %%
def adaptive_loss(model, batch, key, progress):
    target = jax.random.uniform(key, minval=0.3, maxval=1.0)
    dj.budget.set_threshold(model, dj.budget.sampled_threshold(target))
    logits, trace = dj.traced(model)(batch["image"])
    loss = cross_entropy(logits, batch["mask"])
    budget_loss = dj.budget_loss(trace, target, dj.budget.release(progress))
    return loss + 10 * budget_loss, {"loss": loss, "target": target, "spent": trace.fraction().mean()}


train(model, adaptive_loss, learning_rate=3e-3)

# %% [markdown]
# ## One checkpoint, many budgets
#
# `dj.deploy` finds the threshold at which the mean compute on calibration pictures meets a budget. What it returns is
# compact and deterministic, ready for `jax.jit`. No further training: the same parameters serve all of these.

# %%
calibration = [batch["image"] for batch in calibration_batches(val_set, 4 if FAST else 20, 1 if FAST else 5)]
deployed = {budget: dj.deploy(model, budget=budget, calibration=calibration) for budget in BUDGETS}
runs = {budget: jax.jit(dj.traced(fast)) for budget, fast in deployed.items()}
results = {budget: evaluate(run) for budget, run in runs.items()}
for budget, (iou, macs) in results.items():
    print(deployed[budget].report)
    print(f"    test: IoU {iou:.3f}, {macs.mean() / plain_macs.mean():.0%} of the plain model's MACs")

# %%
figure, ax = plt.subplots(figsize=(5, 3.4))
share = [macs.mean() / plain_macs.mean() for _, macs in results.values()]
ax.plot(np.multiply(100, share), [iou for iou, _ in results.values()], "o-", label="adaptive, one set of parameters")
ax.plot(100, plain_iou, "k*", markersize=12, label="plain")
ax.set(xlabel="MACs, % of the plain model's", ylabel="IoU", title="Compute against score, test scenes")
ax.grid(alpha=0.3)
ax.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# The budget is a mean. An easy picture takes less than a hard one:

# %%
_, macs = results[0.5]
figure, ax = plt.subplots(figsize=(5, 2.6))
ax.hist(macs / 1e6, bins=20)
ax.axvline(plain_macs.mean() / 1e6, color="k", linestyle="--", label="plain")
ax.set(xlabel="MMAC of one picture", ylabel="pictures", title="Budget 0.5, test scenes")
ax.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Where the compute goes
#
# `trace.heatmap` spreads the MACs over the pixels of the picture. Here are the cheapest scene, the dearest and two
# between them.

# %%
order = np.argsort(macs)
chosen = order[np.linspace(0, len(order) - 1, 4).astype(int)]
logits, trace = runs[0.5](test_images[chosen])
heat = np.asarray(trace.heatmap(config.size)) / 1e3
titles = [f"{macs:.1f} MMAC" for macs in trace.macs() / 1e6]
show(test_images[chosen], logits > 0, heat / heat.max(), titles=titles, vmin=0, vmax=1)
print(f"last row: 0 (dark) to {heat.max():.1f} (bright) thousand MACs per pixel")
for path, share in trace.shares().items():
    print(f"{path:17} kept {share['kept']:4.0%} of its tiles, spent {share['macs']:4.0%} of all MACs")

# %% [markdown]
# ## Does it save time?
#
# MACs are not milliseconds, so the time is measured: the plain model, the adaptive one masked, and compact at two
# budgets, in turn, on one picture at a time. The pictures are twelve scenes side by side, since one scene is over too
# soon; the model takes any size.

# %%
draw = np.random.default_rng(0).integers(len(test_images), size=(2 if FAST else 20, 3, 4))
large = [np.concatenate([np.concatenate(test_images[row], 1) for row in grid])[None] for grid in draw]

candidates = {
    "plain": plain,
    "masked, 0.5": nnx.view(deployed[0.5], execution="masked"),
    "compact, 0.5": deployed[0.5],
    f"compact, {BUDGETS[0]}": deployed[BUDGETS[0]],
}
compiled = {name: jax.jit(candidate) for name, candidate in candidates.items()}
outputs = {name: function(large[0]) for name, function in compiled.items()}  # compiles
print("compact against masked:", float(jnp.abs(outputs["compact, 0.5"] - outputs["masked, 0.5"]).max()))

times = {name: [] for name in compiled}
for image in large:
    for name, function in compiled.items():
        start = time.perf_counter()
        jax.block_until_ready(function(image))
        times[name].append(1e3 * (time.perf_counter() - start))

height, width = large[0].shape[1:3]
print(f"pictures of {height}x{width}, device {jax.devices()[0].device_kind}, median of {len(large)}")
for name, milliseconds in times.items():
    median = np.median(milliseconds)
    print(f"{name:14} {median:8.1f} ms   {np.median(times['plain']) / median:.2f}x as fast as the plain model")

# %% [markdown]
# ## From here
#
# - Other dynamics go in the same way: `dj.Skip` skips blocks for whole pictures, `dj.Select` picks one of several
#   blocks, for each picture or tile, `dj.Exits` stops early.
# - `dynjax.run.train.fit` is a training loop with everything this one lacks: averaged parameters, checkpoints that
#   resume to the exact batch, several devices.
# - `make demo` and the rows in `experiments/` do all of this with a larger network, and against controls.
