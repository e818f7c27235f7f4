"""Models that others wrote, made dynamic: what it takes, whether the two executions agree, and what it saves.

    make bench-foreign     # makes .venv-foreign from benchmarks/foreign-requirements.txt, and runs
    python -m benchmarks.foreign [--out benchmarks/results/foreign.csv] [--repeats 15] [--cases jaxnn_resnet50 ...]

Every case has a model from a package of the index, or as the documentation of Flax writes it, with random weights; what
a user writes to make it dynamic, whose lines are counted; and calls of it. The output layer of every gate is drawn at
random, so that decisions differ between inputs, and `dj.deploy` meets half of the MACs on calibration inputs. Plain is
the model as it comes, under `jax.jit`; compact is the deployed one, also under `jax.jit`; they are timed in turn on
other inputs. A model that dynjax refuses is a row too, with what it says.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import dynjax as dj
from benchmarks import tables
from dynjax.core import cost, views
from dynjax.core.gates import GateParam

BUDGET = 0.5
BATCHES = (1, 8)
CALIBRATION = 4
"""Batches of the larger size that thresholds are solved on; one more is for the comparison and the timing."""

Call = tuple[tuple, dict[str, Any]]
"""Arguments of one call, by place and by name."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model, what calls it on so many examples under a seed, and what a user writes to make it dynamic."""

    model: Any
    call: Callable[[int, int], Call]
    dynamic: Callable[[Any], nnx.Module]
    mesh: jax.sharding.Mesh | None = None
    """What the model is called in, if it has to be."""


@dataclasses.dataclass(frozen=True)
class Case:
    package: str
    """Where the model is from."""
    wrapper: str
    make: Callable[[], Foreign]


CASES: dict[str, Case] = {}


def case(package: str, wrapper: str) -> Callable:
    def register(make: Callable[[], Foreign]) -> Callable[[], Foreign]:
        CASES[make.__name__] = Case(package, wrapper, make)
        return make

    return register


def fresh() -> nnx.Rngs:
    return nnx.Rngs(0)


# Inputs, which differ in colour, contrast and detail, as pictures do


def pictures(examples: int, seed: int, size: int, channels: int = 3) -> jax.Array:
    random = np.random.default_rng(seed)
    x = np.zeros((examples, size, size, channels))
    for cells in (4, size // 4):
        coarse = random.normal(size=(examples, cells, cells, channels)) * random.uniform(0.1, 2, (examples, 1, 1, 1))
        x += coarse.repeat(size // cells, 1).repeat(size // cells, 2)
    return jnp.asarray(x + random.normal(size=(examples, 1, 1, channels)), jnp.float32)


def of_pictures(size: int, **flags: Any) -> Callable[[int, int], Call]:
    return lambda examples, seed: ((pictures(examples, seed, size),), flags)


def tokens(examples: int, seed: int, length: int, words: int) -> jax.Array:
    """Texts, each with words of its own."""
    random = np.random.default_rng(seed)
    few = random.integers(1, words, (examples, 8))
    return jnp.asarray(few[np.arange(examples)[:, None], random.integers(0, 8, (examples, length))], jnp.int32)


def of_tokens(length: int, words: int) -> Callable[[int, int], Call]:
    return lambda examples, seed: ((tokens(examples, seed, length, words),), {})


def rows(examples: int, seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (examples, *shape))


def of_rows(*shape: int) -> Callable[[int, int], Call]:
    return lambda examples, seed: ((rows(examples, seed, *shape),), {})


# Models of packages


def older(name: str) -> types.ModuleType:
    """A module of a package that asks for names which JAX or Flax have renamed, or for torchvision to read pictures."""
    known = {"flax.nnx.nnx": nnx, "flax.nnx.nnx.module": importlib.import_module("flax.nnx.module")}
    for part in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        known[part] = mock.MagicMock(__spec__=ModuleSpec(part, None))
    for part, module in known.items():
        sys.modules.setdefault(part, module)
    try:
        with mock.patch.object(jax.random, "KeyArray", jax.Array, create=True):
            return importlib.import_module(name)
    finally:
        for part, module in known.items():
            if sys.modules[part] is module:
                del sys.modules[part]


def bridged(module: linen.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """A Linen module in nnx, with the shapes that it has on these arguments."""
    return nnx.bridge.ToNNX(module, rngs=fresh()).lazy_init(*args, **kwargs)


@case("jaxnn", "Skip")
def jaxnn_resnet50() -> Foreign:
    model = older("jaxnn").create_model("resnet50", num_classes=10, rngs=fresh())

    def dynamic(model):
        return dj.dynamize(model, {r"stage_modules/\d/layers/[1-9]": dj.Skip}, rngs=fresh())

    return Foreign(model, of_pictures(96, training=False), dynamic)


@case("jaxnn", "Tiles, Skip")
def jaxnn_resnet18() -> Foreign:
    model = older("jaxnn").create_model("resnet18", num_classes=10, rngs=fresh())

    def dynamic(model):
        def tiles(block, channels, rngs):
            return dj.Tiles(block, dj.TileGate(channels, size=7, rngs=rngs))

        wrappers = {
            r"stage_modules/0/layers/\d|stage_modules/1/layers/1": tiles,
            "stage_modules/[23]/layers/1": dj.Skip,
        }
        return dj.dynamize(model, wrappers, rngs=fresh())

    return Foreign(model, of_pictures(224, training=False), dynamic)


def jaxnn_vit_model() -> nnx.Module:
    # As it comes it checks the pictures' size in a way that jax.jit cannot compile.
    older("jaxnn.layers.patch_embed")._assert = lambda condition, message: None
    return older("jaxnn").create_model("vit_tiny_patch16_224", num_classes=10, rngs=fresh())


@case("jaxnn", "Skip")
def jaxnn_vit_skip() -> Foreign:
    call = of_pictures(224, deterministic=True)

    def dynamic(model):
        return dj.dynamize(model, {r"blocks/layers/\d+": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(jaxnn_vit_model(), call, dynamic)


@case("jaxnn", "MixtureOfDepths")
def jaxnn_vit_tokens() -> Foreign:
    """Tokens have their positions in their features, as mixtures of depths need them."""
    call = of_pictures(224, deterministic=True)

    def dynamic(model):
        class Masked(nnx.Module):
            def __init__(self, block):
                self.block = block

            def __call__(self, x, mask, deterministic):
                return self.block(x, mask[:, None, None], deterministic=deterministic)

        def depths(block, channels, rngs):
            return dj.MixtureOfDepths(Masked(block), dj.TokenGate(channels, rngs=rngs))

        return dj.dynamize(model, {r"blocks/layers/\d+": depths}, example=call(1, 0), rngs=fresh())

    return Foreign(jaxnn_vit_model(), call, dynamic)


@case("jaxnn", "Channels")
def jaxnn_vit_width() -> Foreign:
    def dynamic(model):
        def narrow(mlp, channels, rngs):
            return dj.Channels([mlp.fc1, nnx.gelu], mlp.fc2, dj.ChannelGate(channels, 8, rngs=rngs))

        return dj.dynamize(model, {r"blocks/layers/\d+/mlp": narrow}, rngs=fresh())

    return Foreign(jaxnn_vit_model(), of_pictures(224, deterministic=True), dynamic)


def jimm_vit_model(mesh: jax.sharding.Mesh) -> nnx.Module:
    from jimm import VisionTransformer

    sizes = dict(img_size=96, patch_size=16, num_layers=6, num_heads=3, mlp_dim=768, hidden_size=192)
    with jax.set_mesh(mesh):
        return VisionTransformer(num_classes=10, **sizes, rngs=fresh())


def of_one_device() -> jax.sharding.Mesh:
    """What models of jimm are built in, and called."""
    types = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=types, devices=jax.devices()[:1])


@case("jax-image-models", "Skip")
def jimm_vit() -> Foreign:
    """Its blocks are stacked, one module with parameters of all, under `nnx.scan`."""
    mesh, call = of_one_device(), of_pictures(96)

    def dynamic(model):
        return dj.dynamize(model, {"encoder/layers": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(jimm_vit_model(mesh), call, dynamic, mesh)


@case("jax-image-models", "Skip")
def jimm_vit_unstacked() -> Foreign:
    """The same, its blocks taken out of the stack and run one after the other."""
    mesh, call = of_one_device(), of_pictures(96)

    def dynamic(model):
        from jimm.common import transformer, vit

        graphdef, state = nnx.split(model.encoder.layers)
        layers = [nnx.merge(graphdef, jax.tree.map(lambda a, n=n: a[n], state)) for n in range(6)]
        model.encoder.layers = nnx.List(layers)
        transformer.reshard_like = lambda value, like: value
        vit.scan_forward = lambda x, layers: functools.reduce(lambda x, layer: layer(x), layers, x)
        return dj.dynamize(model, {r"encoder/layers/\d": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(jimm_vit_model(mesh), call, dynamic, mesh)


@case("jimmy-vision", "Skip")
def jimmy_dinov2() -> Foreign:
    vit = older("jimmy.models.vit")
    model = vit.DinoV2(img_size=96, embed_dim=192, depth=6, num_heads=3, init_values=1.0, rngs=fresh())

    def dynamic(model):
        return dj.dynamize(model, {r"blocks\.\d": dj.Skip}, rngs=fresh())

    return Foreign(model, of_pictures(96), dynamic)


@case("diffuse-jax", "Skip")
def diffuse_unet() -> Foreign:
    """A U-Net of FiLM blocks, which are told the time of every example."""
    from diffuse.neural_network.nn.condUNet import CondUNet2D

    model = CondUNet2D(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(4,), rngs=fresh())

    def dynamic(model):
        def up(block, channels, rngs):
            cheap = nnx.Linear(channels, block.layers[0].out_channels, rngs=rngs)
            return dj.Skip(block, dj.SampleGate(channels, rngs=rngs), otherwise=cheap)

        wrappers = {"blocks_down/[12578]|block_mid": dj.Skip, "blocks_up/[0134678]": up}
        return dj.dynamize(model, wrappers, rngs=fresh())

    def call(examples, seed):
        return (pictures(examples, seed, 32), jnp.linspace(0, 900, examples)), {}

    return Foreign(model, call, dynamic)


def diffuse_vae_model() -> nnx.Module:
    from diffuse.neural_network.nn.sdVae import SDVae

    return SDVae(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, rngs=fresh())


def channels_first(examples: int, seed: int) -> Call:
    return (pictures(examples, seed, 64).transpose(0, 3, 1, 2),), {}


@case("diffuse-jax", "Skip")
def diffuse_vae() -> Foreign:
    def dynamic(model):
        same = r"encoder/(down/layers/[01467]|mid/layers/\d)|decoder/(mid/layers/[123]|up/layers/([0124569]|10))"
        return dj.dynamize(model, {same: dj.Skip}, rngs=fresh())

    return Foreign(diffuse_vae_model(), channels_first, dynamic)


@case("diffuse-jax", "Tiles")
def diffuse_vae_tiles() -> Foreign:
    """Its blocks normalise over the whole map."""

    def dynamic(model):
        return dj.dynamize(model, {"decoder/up/layers/[012]": dj.Tiles}, rngs=fresh())

    return Foreign(diffuse_vae_model(), channels_first, dynamic)


@case("canvit-nnx", "Skip")
def canvit() -> Foreign:
    """A ViT that reads and writes a canvas: everything is given by name, in tuples of arrays."""
    from canvit_nnx import CanViT, CanViTConfig, Viewpoint

    model = CanViT(CanViTConfig("vits16", canvas_num_heads=2, canvas_head_dim=64), rngs=fresh())

    def dynamic(model):
        return dj.dynamize(model, {r"backbone/blocks/\d+": dj.Skip}, example=call(1, 0), rngs=fresh())

    def call(examples, seed):
        state = model.init_state(batch_size=examples, canvas_grid_size=8)
        view = Viewpoint.full_scene(batch_size=examples)
        return (), dict(glimpse=pictures(examples, seed, 96), state=state, viewpoint=view)

    return Foreign(model, call, dynamic)


@case("heal-swin-nnx", "Skip")
def heal_swin_unet() -> Foreign:
    from heal_swin_nnx import SwinParams, SwinUnet

    sizes = dict(patch_size=4, window_size=3, embed_dim=48, depths=(2, 2, 2), num_heads=(3, 6, 12))
    model = SwinUnet(SwinParams(96, 3, 5, **sizes, dtype="float32"), rngs=fresh())
    call = of_pictures(96)

    def dynamic(model):
        return dj.dynamize(model, {r".*/blocks/\d": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(model, call, dynamic)


@case("mamba2-jax", "Skip")
def mamba2() -> Foreign:
    """A language model whose blocks give their last states too."""
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    sizes = dict(vocab_size=128, hidden_size=192, state_size=32, head_dim=32, num_hidden_layers=6, chunk_size=32)
    model, call = Mamba2ForCausalLM(Mamba2Config(**sizes), rngs=fresh()), of_tokens(64, 128)

    def dynamic(model):
        def rest(x):
            return x, jnp.zeros((len(x), 448, 3)), jnp.zeros((len(x), 12, 32, 32))

        def skip(block, channels, rngs):
            return dj.Skip(block, dj.SampleGate(channels, rngs=rngs), otherwise=rest)

        return dj.dynamize(model, {r"backbone/layers/\d": skip}, example=call(1, 0), rngs=fresh())

    return Foreign(model, call, dynamic)


@case("nano-moe-jax (Linen)", "Skip")
def nano_moe() -> Foreign:
    """Blocks of a Linen mixture of experts, bridged one by one, without their term of the loss."""
    from nano_moe.config import NanoMoEConfig
    from nano_moe.layers import TransformerBlock

    x, call = jnp.zeros((1, 64, 128)), of_rows(64, 128)
    blocks = [nnx.Sequential(bridged(TransformerBlock(NanoMoEConfig()), x), lambda y, loss: y) for _ in range(4)]

    def dynamic(model):
        return dj.dynamize(model, {r"layers/\d": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(nnx.Sequential(*blocks), call, dynamic)


@case("jax-resnet (Linen)", "Skip")
def jax_resnet50() -> Foreign:
    """A Linen ResNet-50, bridged layer by layer."""
    import jax_resnet

    x, layers = jnp.zeros((1, 96, 96, 3)), []
    for layer in jax_resnet.ResNet50(n_classes=10).layers:
        layers.append(bridged(layer, x) if isinstance(layer, linen.Module) else layer)
        x = layers[-1](x)
    call = of_pictures(96)

    def dynamic(model):
        return dj.dynamize(model, {"layers/([34678]|1[0-4]|1[67])": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(nnx.Sequential(*layers), call, dynamic)


@case("jax-resnet (Linen)", "Skip")
def jax_resnet18_whole() -> Foreign:
    """A Linen model bridged as a whole is one module, with no paths inside."""
    import jax_resnet

    model = bridged(jax_resnet.ResNet18(n_classes=10), jnp.zeros((1, 96, 96, 3)))

    def dynamic(model):
        return dj.dynamize(model, {r"layers_\d": dj.Skip}, rngs=fresh())

    return Foreign(model, of_pictures(96), dynamic)


@case("flaim (Linen)", "Tiles, Skip")
def flaim_convnext() -> Foreign:
    """ConvNeXt, bridged block by block."""
    layers, convnext = older("flaim").layers, older("flaim.models.convnext")
    x, parts = jnp.zeros((1, 96, 96, 3)), []
    for depth, width, stride in ((2, 40, 4), (2, 80, 2), (6, 160, 2), (2, 320, 2)):
        stem = layers.PatchEmbed(width, patch_size=stride, layer_norm_eps=1e-6, flatten=False)
        for block in (stem, *[convnext.ConvNeXtBlock(width, layer_scale_init_value=1.0) for _ in range(depth)]):
            parts.append(bridged(block, x))
            x = parts[-1](x)
    parts.append(bridged(layers.Head(n_classes=10, layer_norm_eps=1e-6), x))
    call = of_pictures(96)

    def dynamic(model):
        def tiles(block, channels, rngs):
            return dj.Tiles(block, dj.TileGate(channels, size=8, rngs=rngs))

        wrappers = {"layers/[12]": tiles, "layers/([45789]|1[01245])": dj.Skip}
        return dj.dynamize(model, wrappers, example=call(1, 0), rngs=fresh())

    return Foreign(nnx.Sequential(*parts), call, dynamic)


@case("flaim (Linen)", "Skip")
def flaim_efficientnet_lite0() -> Foreign:
    """EfficientNet-Lite0 of its layers, bridged block by block, which are told whether they train."""
    norm = functools.partial(older("flaim").layers.ConvBNAct, tf=True)

    class Inverted(linen.Module):
        width: int
        expansion: int
        stride: int
        kernel: int

        @linen.compact
        def __call__(self, x, training=True):
            y, wide = x, self.expansion * x.shape[-1]
            if self.expansion > 1:
                y = norm(wide, kernel_size=1, act=linen.relu6)(y, training=training)
            y = norm(wide, self.kernel, self.stride, groups="dw", act=linen.relu6)(y, training=training)
            y = norm(self.width, kernel_size=1)(y, training=training)
            return x + y if x.shape == y.shape else y

    stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5))
    blocks, x, parts = [norm(32, stride=2, act=linen.relu6)], jnp.zeros((1, 128, 128, 3)), []
    for expansion, width, depth, stride, kernel in (*stages, (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)):
        blocks += [Inverted(width, expansion, 1 if number else stride, kernel) for number in range(depth)]
    for block in (*blocks, norm(1280, kernel_size=1, act=linen.relu6)):
        parts.append(bridged(block, x, training=False))
        x = parts[-1](x, training=False)
    model = Told(parts, nnx.Linear(1280, 10, rngs=fresh()))
    call = of_pictures(128, training=False)

    def dynamic(model):
        return dj.dynamize(model, {"parts/(3|5|7|8|10|11|13|14|15)": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(model, call, dynamic)


class Told(nnx.Module):
    """Parts that are told whether they train, and a head."""

    def __init__(self, parts: list[nnx.Module], head: nnx.Linear):
        self.parts, self.head = nnx.List(parts), head

    def __call__(self, x, training=False):
        for part in self.parts:
            x = part(x, training=training)
        return self.head(x.mean((1, 2)))


@case("jraphx", "Skip")
def jraphx_gcn() -> Foreign:
    """A graph network: the first axis is nodes, which its layers mix."""
    from jraphx.nn.models import GCN

    def dynamic(model):
        return dj.dynamize(model, {"convs/[12]": dj.Skip}, rngs=fresh())

    def call(examples, seed):
        edges = np.random.default_rng(seed).integers(0, examples, (2, 4 * examples))
        return (rows(examples, seed, 64), jnp.asarray(edges)), {}

    return Foreign(GCN(64, 64, 4, rngs=fresh()), call, dynamic)


@case("equinox", "Skip")
def equinox_mlp() -> Foreign:
    import equinox

    def dynamic(model):
        return dj.dynamize(model, {r"layers/\d": dj.Skip}, rngs=fresh())

    model = equinox.nn.MLP(64, 64, 64, 4, key=jax.random.key(0))
    return Foreign(model, of_rows(64), dynamic)


# Models as the documentation of Flax writes them


class Mlp(nnx.Module):
    """Of the basics: linear, BatchNorm, dropout, linear; around a shortcut."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.linear, self.out = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)
        self.dropout, self.norm = nnx.Dropout(0.1, rngs=rngs), nnx.BatchNorm(hidden, rngs=rngs)

    def __call__(self, x):
        return x + self.out(nnx.gelu(self.dropout(self.norm(self.linear(x)))))


@case("Flax docs", "Skip")
def flax_mlp() -> Foreign:
    model = nnx.Sequential(*[Mlp(256, 1024, rngs=fresh()) for _ in range(8)])

    def dynamic(model):
        return dj.dynamize(model, {r"layers/\d": dj.Skip}, rngs=fresh())

    return Foreign(model, of_rows(256), dynamic)


class Cnn(nnx.Module):
    """Of the MNIST tutorial."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1, self.conv2 = nnx.Conv(1, 32, (3, 3), rngs=rngs), nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.norm1, self.norm2 = nnx.BatchNorm(32, rngs=rngs), nnx.BatchNorm(64, rngs=rngs)
        self.dropout1, self.dropout2 = nnx.Dropout(0.025), nnx.Dropout(0.025)
        self.linear1, self.linear2 = nnx.Linear(3136, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)
        self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x, rngs: nnx.Rngs | None = None):
        x = self.avg_pool(nnx.relu(self.norm1(self.dropout1(self.conv1(x), rngs=rngs))))
        x = self.avg_pool(nnx.relu(self.norm2(self.conv2(x))))
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(len(x), -1)), rngs=rngs))
        return self.linear2(x)


@case("Flax docs", "Tiles")
def flax_cnn() -> Foreign:
    def dynamic(model):
        def tiles(conv, channels, rngs):
            return dj.Tiles(conv, dj.TileGate(channels, size=7, rngs=rngs), otherwise=nnx.Linear(32, 64, rngs=rngs))

        return dj.dynamize(model, {"conv2": tiles}, rngs=fresh())

    def call(examples, seed):
        return (pictures(examples, seed, 28, 1),), dict(rngs=None)

    return Foreign(Cnn(rngs=fresh()), call, dynamic)


class Decoder(nnx.Module):
    """Of the language model example: pre-norm attention under a mask, and a layer of two."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, dropout_rate=0.1, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, decoder_mask=None, *, deterministic=False):
        x = x + self.attention(self.norm1(x), mask=decoder_mask, deterministic=deterministic)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Lm(nnx.Module):
    def __init__(self, words: int, width: int, depth: int, *, rngs: nnx.Rngs):
        self.embed, self.norm = nnx.Embed(words, width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.blocks = nnx.List([Decoder(width, rngs=rngs) for _ in range(depth)])

    def __call__(self, tokens, *, deterministic=False):
        mask = nnx.combine_masks(nnx.make_causal_mask(tokens), nnx.make_attention_mask(tokens > 0, tokens > 0))
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask, deterministic=deterministic)
        return self.embed.attend(self.norm(x))


@case("Flax docs", "Skip")
def flax_lm() -> Foreign:
    def dynamic(model):
        return dj.dynamize(model, {r"blocks/\d": dj.Skip}, example=call(1, 0), rngs=fresh())

    def call(examples, seed):
        lengths = np.random.default_rng(seed).integers(32, 65, (examples, 1))
        text = jnp.where(np.arange(64)[None] < lengths, tokens(examples, seed, 64, 128), 0)
        return (text,), dict(deterministic=True)

    return Foreign(Lm(128, 192, 6, rngs=fresh()), call, dynamic)


class VaeEncoder(nnx.Module):
    """Of the VAE example: draws its code, and leaves the divergence in a variable."""

    def __init__(self, features: int, hidden: int, code: int, *, rngs: nnx.Rngs):
        self.linear1, self.mean = nnx.Linear(features, hidden, rngs=rngs), nnx.Linear(hidden, code, rngs=rngs)
        self.std, self.rngs = nnx.Linear(hidden, code, rngs=rngs), rngs

    def __call__(self, x):
        h = nnx.relu(self.linear1(x))
        mean, std = self.mean(h), jnp.exp(self.std(h))
        self.kl = nnx.Intermediate(jnp.mean(0.5 * (std**2 + mean**2 - jnp.log(std**2) - 1)))
        return mean + std * jax.random.normal(self.rngs.noise(), mean.shape)


class VaeDecoder(nnx.Module):
    def __init__(self, code: int, hidden: int, features: int, *, rngs: nnx.Rngs):
        self.linear1, self.linear2 = nnx.Linear(code, hidden, rngs=rngs), nnx.Linear(hidden, features, rngs=rngs)

    def __call__(self, z):
        return self.linear2(nnx.relu(self.linear1(z)))


class Vae(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.encoder, self.decoder = VaeEncoder(784, 256, 32, rngs=rngs), VaeDecoder(32, 1024, 784, rngs=rngs)

    def __call__(self, x):
        return nnx.sigmoid(self.decoder(self.encoder(x)))


@case("Flax docs", "Channels")
def flax_vae() -> Foreign:
    def dynamic(model):
        def narrow(decoder, code, rngs):
            return dj.Channels([decoder.linear1, nnx.relu], decoder.linear2, dj.ChannelGate(code, 8, rngs=rngs))

        return dj.dynamize(model, {"decoder": narrow}, rngs=fresh())

    return Foreign(Vae(rngs=fresh()), of_rows(784), dynamic)


class Recurrent(nnx.Module):
    """Layers of the sequence example, around shortcuts, which are told how long every sequence is."""

    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.RNN(nnx.GRUCell(width, width, rngs=rngs)) for _ in range(depth)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x, lengths):
        for layer in self.layers:
            x = x + layer(x, seq_lengths=lengths)
        return self.head(x)


@case("Flax docs", "Skip")
def flax_gru() -> Foreign:
    def dynamic(model):
        def skip(layer, channels, rngs):
            return dj.Skip(layer, dj.SampleGate(channels, rngs=rngs), otherwise=jnp.zeros_like)

        return dj.dynamize(model, {r"layers/\d": skip}, rngs=fresh())

    def call(examples, seed):
        return (rows(examples, seed, 32, 128), jnp.arange(examples) + 16), {}

    return Foreign(Recurrent(128, 4, rngs=fresh()), call, dynamic)


class Scanned(nnx.Module):
    """Of the guide to transformations: layers that are one module with parameters of all, under `nnx.scan`."""

    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return Mlp(width, 4 * width, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return layer(x)

        return forward(x, self.layers)


@case("Flax docs", "Skip")
def flax_scanned() -> Foreign:
    call = of_rows(128)

    def dynamic(model):
        return dj.dynamize(model, {"layers": dj.Skip}, example=call(1, 0), rngs=fresh())

    return Foreign(Scanned(128, 6, rngs=fresh()), call, dynamic)


@case("Flax docs", "Skip")
def flax_scanned_whole() -> Foreign:
    """The same, with one decision about all of its layers."""

    def dynamic(model):
        return dj.Skip(model, dj.SampleGate(128, rngs=fresh()))

    return Foreign(Scanned(128, 6, rngs=fresh()), of_rows(128), dynamic)


# Measuring


def written(dynamic: Callable) -> int:
    """Lines of the body of a function, and the one that deploys."""
    return sum(1 for line in inspect.getsource(dynamic).splitlines()[1:] if line.strip()) + 1


def apart(model: nnx.Module) -> None:
    """Draw the output layer of every gate, so that decisions differ between gates and inputs."""
    for number, (_, module) in enumerate(nnx.iter_modules(model)):
        if isinstance(getattr(module, "out", None), GateParam):
            module.out[...] = jax.random.normal(jax.random.key(number), module.out.shape)


class Compiled:
    """A model under jit for calls like one: variables and arrays are arguments, anything else is fixed."""

    def __init__(self, model: nnx.Module, call: Call):
        graphdef, self.state = nnx.split(model)
        leaves, tree = jax.tree.flatten(call)

        def run(state, arrays):
            given = [leaf if array is None else array for array, leaf in zip(arrays, leaves, strict=True)]
            args, kwargs = tree.unflatten(given)
            return nnx.merge(graphdef, state, copy=True)(*args, **kwargs)

        self.run = jax.jit(run)

    def __call__(self, call: Call) -> Any:
        return self.run(self.state, self.arrays(call))

    @staticmethod
    def arrays(call: Call) -> list:
        return [leaf if isinstance(leaf, jax.Array) else None for leaf in jax.tree.leaves(call)]


def difference(one: Any, other: Any) -> float:
    """The largest between two outputs, as a share of the largest number in each array."""
    found = [0.0]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact) and a.size:
            found.append(float(jnp.abs(a - b).max() / jnp.abs(a).max().clip(1e-6)))
    return max(found)


def milliseconds(ways: tuple[Callable, Callable], calls: list[Call], repeats: int) -> np.ndarray:
    """Medians over pairs of calls of one and the other, on inputs that take turns."""
    times = np.zeros((repeats, 2))
    for way in ways:
        for call in calls:
            jax.block_until_ready(way(call))
    for number in range(repeats):
        for which, way in enumerate(ways):
            start = time.perf_counter()
            jax.block_until_ready(way(calls[number % len(calls)]))
            times[number, which] = 1000 * (time.perf_counter() - start)
    return np.median(times, 0)


def example(call: Call, number: int) -> Call:
    """One example of a call of several."""

    def own(leaf):
        batch = isinstance(leaf, jax.Array) and leaf.shape[:1] == (max(BATCHES),)
        return leaf[number : number + 1] if batch else leaf

    return jax.tree.map(own, call)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """A line of the table; `status` says that the model works, or why it does not."""
    made = CASES[name]
    row: dict[str, Any] = dict(model=name, package=made.package, wrapper=made.wrapper)
    try:
        foreign = made.make()
        row["lines"] = written(foreign.dynamic)
        with nullcontext() if foreign.mesh is None else jax.set_mesh(foreign.mesh):
            return row | compared(foreign, repeats)
    except ImportError as error:
        return row | dict(status=f"not installed: {error}")
    except Exception as error:  # a zoo that has changed must not end the run
        return row | dict(status=f"does not run: {said(error)}")


def said(error: Exception) -> str:
    """Kind and text, on one line; the text alone of what dynjax says itself."""
    text, where = " ".join(str(error).split()), traceback.extract_tb(error.__traceback__)[-1].filename
    own = isinstance(error, ValueError) and Path(where).is_relative_to(Path(dj.__file__).parent)
    return text if own else f"{type(error).__name__}: {text}"


def compared(foreign: Foreign, repeats: int) -> dict[str, Any]:
    """What a model comes to beside its dynamic self."""
    most = max(BATCHES)
    call, *calibration = (foreign.call(most, seed) for seed in range(1 + CALIBRATION))
    calls = {batch: [call] if batch == most else [example(call, number) for number in range(most)] for batch in BATCHES}
    row: dict[str, Any] = {}
    if isinstance(foreign.model, nnx.Module):
        still = nnx.clone(foreign.model)
        still.eval()
        plain = {batch: Compiled(still, calls[batch][0]) for batch in BATCHES}
        outputs = [way(calls[batch][0]) for batch, way in plain.items()][-1]
        state, arrays = plain[most].state, Compiled.arrays(call)
        row["mmacs_plain"] = round(cost.macs(plain[most].run, state, arrays) / most / 1e6, 2)
    try:
        model = foreign.dynamic(foreign.model)
        apart(model)
        fast = dj.deploy(model, BUDGET, calibration)
        view = nnx.clone(views.masked(fast))
        masked, compact = Compiled(view, call), {batch: Compiled(fast, calls[batch][0]) for batch in BATCHES}
        row["difference"] = f"{difference(masked(call), compact[most](call)):.0e}"
    except Exception as error:
        return row | dict(status=f"refused: {said(error)}")
    dj.budget.set_threshold(view, dj.gates.LOWEST)
    masked.state = nnx.state(view)
    row["difference_all_kept"] = f"{difference(outputs, masked(call)):.0e}"
    row["mmacs_budget"] = round(fast.report.mean / 1e6, 2)
    row["share"] = round(fast.report.mean / fast.report.full, 3)
    row["met"] = fast.report.met
    for batch in BATCHES:
        whole, less = milliseconds((plain[batch], compact[batch]), calls[batch], repeats)
        row[f"ms_plain_{batch}"], row[f"ms_compact_{batch}"] = round(whole, 2), round(less, 2)
        row[f"speedup_{batch}"] = round(whole / less, 2)
    return row | dict(status="works")


COLUMNS = {
    "model": "model",
    "package": "from",
    "wrapper": "dj.",
    "lines": "lines",
    "difference": "masked - compact",
    "mmacs_plain": "MMACs",
    "share": "share spent",
    "ms_plain_1": "ms",
    "ms_compact_1": "compact",
    "speedup_1": "faster",
    "ms_plain_8": "ms, batch 8",
    "ms_compact_8": "compact ",
    "speedup_8": "faster ",
}
"""Columns of the printed table."""


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """In markdown: what works, then what does not and what is said of it."""
    yield "| " + " | ".join(COLUMNS.values()) + " |"
    yield "|---|---|---|" + "---:|" * (len(COLUMNS) - 3)
    for row in rows:
        if row["status"] == "works":
            yield "| " + " | ".join(str(row[column]) for column in COLUMNS) + " |"
    yield ""
    for row in rows:
        if row["status"] != "works":
            yield f"- `{row['model']}` ({row['package']}, {row['wrapper']}) {row['status']}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/foreign.csv"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    arguments = parser.parse_args(argv)
    print(f"{tables.machine()}, jax {jax.__version__}", file=sys.stderr)
    rows = []
    for name in arguments.cases:
        start = time.perf_counter()
        rows.append(measure(name, arguments.repeats))
        print(f"{name}: {rows[-1]['status']} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        jax.clear_caches()
    tables.write(arguments.out, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
