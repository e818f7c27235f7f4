"""Backbones: weights of others, levels that do not learn, where dynamics go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make, still
from flax import nnx

from dynjax import models
from dynjax.config import Config, LossConfig, UserError
from dynjax.core import budget
from dynjax.models.backbones import efficientnet, mobilenet, resnet
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.dynamics.experts import ExpertsConfig
from dynjax.models.dynamics.skip import SkipConfig
from dynjax.models.frozen import TRAINED
from dynjax.models.heads.fcn import FCNHeadConfig
from dynjax.run.step import make_step
from dynjax.tasks.segmentation import SegmentationTask

SMALL = {
    "resnet18": resnet.ResNetBackboneConfig(depth=18, levels=3, width=4),
    "resnet50": resnet.ResNetBackboneConfig(depth=50, levels=3, width=4),
    "mobilenet": mobilenet.MobileNetConfig(levels=3, width=0.25),
}


def dense(backbone, dynamics=None):
    return DenseConfig(backbone, FCNHeadConfig(stride=4), dynamics or StaticConfig())


def built(config, **ways):
    return models.build(config, 3, rngs=nnx.Rngs(0), **ways)


def torch_named(layers):
    """What PyTorch's `state_dict` has of these layers."""
    found = {}
    for name, layer in layers.items():
        if isinstance(layer, nnx.BatchNorm):
            parts = {"weight": layer.scale, "bias": layer.bias, "running_mean": layer.mean, "running_var": layer.var}
            found |= {f"{name}.{part}": np.asarray(value[...]) for part, value in parts.items()}
            found[f"{name}.num_batches_tracked"] = np.int64(1)
        else:
            kernel = np.asarray(layer.kernel[...])
            kernel = kernel[None, None] if kernel.ndim == 2 else kernel
            found[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_ones_own(name, tmp_path):
    there = make(lambda rngs: built(dense(SMALL[name]))).backbone
    tensors = torch_named(there.layers())
    expected = {"resnet18": "layer2.0.downsample.1.running_var", "resnet50": "layer1.0.conv3.weight"}
    assert expected.get(name, "features.3.conv.1.0.weight") in tensors
    np.savez(tmp_path / "weights.npz", **tensors)
    backbone = dataclasses.replace(SMALL[name], weights=str(tmp_path / "weights.npz"))
    here = built(dense(backbone), twin_params=models.beginning(dense(backbone), 3, rngs=nnx.Rngs(1))).backbone
    own, others = (nnx.state(net, TRAINED) for net in (here, there))
    jax.tree.map(np.testing.assert_array_equal, own, others)
    first, tensor = next(iter(tensors.items()))
    wrong = {key: value for key, value in tensors.items() if key != first} | {"extra.weight": tensor}
    np.savez(tmp_path / "weights.npz", **wrong)
    with pytest.raises(UserError, match=rf"weights.npz.*missing: {first}.*not of this network: extra.weight"):
        models.beginning(dense(backbone), 3, rngs=nnx.Rngs(0))
    (tmp_path / "weights.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no weights can be read from .*weights.npz"):
        models.beginning(dense(backbone), 3, rngs=nnx.Rngs(0))


def test_no_weights_are_asked_for():
    assert models.beginning(dense(SMALL["resnet18"]), 3, rngs=nnx.Rngs(0)) is None
    assert models.beginning(dense(ResidualConfig()), 3, rngs=nnx.Rngs(0)) is None


@pytest.mark.skipif(efficientnet.weights_file() is None, reason="the extra pretrained is missing")
def test_weights_of_imagenet_up_to_a_level():
    backbone = efficientnet.EfficientNetLite0Config(levels=2, weights="imagenet", frozen=1)
    found = built(dense(backbone), twin_params=models.beginning(dense(backbone), 3, rngs=nnx.Rngs(0))).backbone
    whole = efficientnet.pretrained()
    np.testing.assert_array_equal(found.stem.kernel[...], whole.stem.kernel[...])
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3), dtype=np.uint8))
    for own, theirs in zip(*jax.jit(lambda x: (still(found)(x), still(whole)(x)[:2]))(x), strict=True):
        np.testing.assert_allclose(own, theirs, atol=1e-4)


@pytest.mark.parametrize(
    "backbone",
    [
        resnet.ResNetBackboneConfig(levels=3, width=4, frozen=2),
        mobilenet.MobileNetConfig(levels=3, width=0.25, frozen=2),
        efficientnet.EfficientNetLite0Config(levels=3, frozen=2),
    ],
    ids=lambda config: config.family,
)
def test_frozen_levels_stay_as_they_begin(backbone):
    model = built(dense(backbone))
    config = Config("frozen", dense(backbone), steps=2, batch_size=2)
    task = SegmentationTask(("a", "b", "c"), LossConfig())
    state, step = make_step(model, task, config, budget.gate_filter)
    random = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(random.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)),
        "mask": jnp.asarray(random.integers(0, 3, (2, 16, 24), dtype=np.int32)),
    }
    after, _ = jax.jit(step)(state, batch)
    changed = set()
    for before, now in ((state.params, after.params), (state.rest, after.rest)):
        for path, value in nnx.to_flat_state(before):
            other = dict(nnx.to_flat_state(now))[path][...]
            if not np.array_equal(
                *(jax.random.key_data(v) if v.dtype == "key<fry>" else v for v in (value[...], other))
            ):
                changed.add("/".join(map(str, path[:3])))
    assert changed and not any(path.startswith(("backbone/stem", "backbone/stages/0")) for path in changed)
    assert any(path.startswith(("backbone/stages/1", "backbone/stages/2")) for path in changed)
    # An adaptive row that trains all of it begins with the same weights.
    free = dataclasses.replace(backbone, frozen=0)
    other = built(dense(free, SkipConfig()), twin_params=nnx.state(model, TRAINED))
    budget.set_threshold(other, -1000.0)
    x = batch["image"]
    np.testing.assert_allclose(*jax.jit(lambda x: (still(model)(x), still(other)(x)))(x), rtol=1e-3, atol=1e-3)


def test_experts_go_behind_the_coarsest_map():
    backbone = efficientnet.EfficientNetLite0Config(levels=2)
    model = built(dense(backbone, ExpertsConfig(layers=2, hidden=4, experts=2)))
    assert [type(module).__name__ for module in model.backbone.tail] == [
        "InvertedBlock",
        "PixelExperts",
        "PixelExperts",
    ]


def test_no_place_for_dynamics():
    backbone = ResidualConfig(widths=(4, 6), blocks=(0, 0))
    with pytest.raises(ValueError, match="Residual and FCNHead have no block at the finest 2 levels"):
        jax.eval_shape(lambda: nnx.state(built(dense(backbone, SkipConfig()))))
