"""Inception as FID has it; the weights are random, since nobody may hand out FID's."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynjax.config import DataConfig, UserError
from dynjax.core import views
from dynjax.data import make_source
from dynjax.models.inception import Inception, filled
from dynjax.tasks.features import Extractor, make_extractor


def of_shape(name, shape):
    """Random, and of its name alone: as they were put into pytorch-fid."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 4:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    low, high = {"running_var": (0.5, 1.5), "weight": (0.8, 1.2)}.get(name.rpartition(".")[2], (-0.2, 0.2))
    return rng.uniform(low, high, shape).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    found = {}
    for name, layer in Inception(rngs=nnx.Rngs(0)).layers().items():
        if isinstance(layer, nnx.Conv):
            height, width, before, after = layer.kernel.shape
            found[f"{name}.weight"] = of_shape(f"{name}.weight", (after, before, height, width))
        else:
            for part in ("weight", "bias", "running_mean", "running_var"):
                found[f"{name}.{part}"] = of_shape(f"{name}.{part}", layer.scale.shape)
    return found


def test_features_are_those_of_pytorch_fid(weights):
    """pytorch-fid 0.3.0, torchvision 0.29 and these weights; at 299x299, and from 32x32 and 400x400, they were the same
    too."""
    net = views.still(filled(weights, "random"))
    y, x = np.mgrid[:80, :80]
    image = np.stack([x * 255 // 80, y * 255 // 80, (x // 16 + y // 16) % 2 * 255], -1)[None]
    found = nnx.jit(lambda net, x: net(x))(net, jnp.asarray(image, jnp.float32) / 127.5 - 1)
    assert found.shape == (1, 2048)
    np.testing.assert_allclose(found[0, [36, 1986, 131, 169]], [4.130135, 2.590369, 2.498593, 2.404683], rtol=1e-4)
    np.testing.assert_allclose(found[0, :3], [0.405329, 0.138179, 0], atol=1e-4)
    assert float(found.mean()) == pytest.approx(0.198804, rel=1e-4)


def test_weights_come_by_path(weights, tmp_path):
    source = make_source(DataConfig("digits8"), "test")
    np.savez(tmp_path / "weights.npz", **weights, **{"fc.weight": np.zeros((1008, 2048)), "fc.bias": np.zeros(1008)})
    extractor = make_extractor("inception", source, str(tmp_path / "weights.npz"))
    assert isinstance(extractor, Extractor)
    assert (extractor.name, extractor.distance_name) == ("inception", "FID")
    image = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    assert extractor.probabilities(image) is None
    assert jax.eval_shape(extractor, image).shape == (2, 2048)
    with pytest.raises(UserError, match="inception needs its weights by path"):
        make_extractor("inception", source)
    with pytest.raises(UserError, match="No such file"):
        make_extractor("inception", source, str(tmp_path / "other.npz"))


def test_weights_of_other_networks_are_refused(weights):
    with pytest.raises(UserError, match="it: weights for 1000 classes; those of FID are for 1008"):
        filled({**weights, "fc.bias": np.zeros(1000)}, "it")
    rest = {name: array for name, array in weights.items() if name != "Mixed_7c.branch1x1.conv.weight"}
    message = r"missing: Mixed_7c\.branch1x1\.conv\.weight; not of this network: AuxLogits\.fc\.bias"
    with pytest.raises(UserError, match=message):
        filled({**rest, "AuxLogits.fc.bias": np.zeros(1008)}, "it")
