"""The nets that benchmarks/static_segmenters.py compares, in tiny forms."""

import csv
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import static_segmenters as segmenters
from dynjax.config import UserError
from dynjax.core import cost
from dynjax.models.backbones.efficientnet import EfficientNetLite0Config
from dynjax.models.backbones.residual import ResidualConfig
from dynjax.models.dense import DenseConfig, StaticConfig
from dynjax.models.heads.unet import UNetHeadConfig

TINY = {
    "efficientnet": DenseConfig(EfficientNetLite0Config(levels=2), UNetHeadConfig(blocks=(1,)), StaticConfig()),
    "residual": DenseConfig(
        ResidualConfig(widths=(4, 6, 8), blocks=(1, 0, 1)), UNetHeadConfig(blocks=(0, 1)), StaticConfig()
    ),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(segmenters, "NETS", TINY)
    monkeypatch.setattr(segmenters, "SIZE", (18, 29))


def test_without_pytorch_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="not installed: make bench-torch"):
        segmenters.main([])


@pytest.mark.parametrize("name", TINY)
def test_random_weights_keep_the_scale_of_features(name):
    net, image = segmenters.fresh(TINY[name]), segmenters.picture()
    logits = jax.jit(lambda x: net(x))(image)
    assert logits.shape == (1, 18, 29, 11) and 0.1 < float(logits.std()) < 1000
    assert cost.macs(net, image) > 0


@pytest.mark.parametrize("name", TINY)
def test_pytorch_has_the_same_logits_and_convolutions(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not among the requirements")
    from benchmarks.torch_segmenters import Net, convolutions

    net, image = segmenters.fresh(TINY[name]), segmenters.picture()
    expected = segmenters.xla(net, image)[0]()
    for way in ("torch_eager", "torch_traced", "torch_channels_last"):
        logits = segmenters.WAYS[way](net, image)[0]()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    found = convolutions(Net(net).eval(), torch.from_numpy(image))
    with torch.inference_mode():
        theirs = [layer(x).numpy().transpose(0, 2, 3, 1) for layer, x in found]
    macs = sum(layer.weight.numel() * y[..., 0].size for (layer, _), y in zip(found, theirs, strict=True))
    assert macs == cost.macs(net, image, padding=True)
    for (layer, x), y in zip(found[::4], theirs[::4], strict=True):  # a few, of all kinds
        ways = layer.stride, tuple((side, side) for side in layer.padding), layer.groups
        kernel = jnp.asarray(layer.weight.detach().numpy().transpose(2, 3, 1, 0))
        ours = segmenters._convolve(False, *ways, jnp.asarray(x.numpy().transpose(0, 2, 3, 1)), kernel)
        bias = 0 if layer.bias is None else layer.bias.detach().numpy()
        np.testing.assert_allclose(np.asarray(ours) + bias, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


def test_the_table(tmp_path):
    """With what the processes would measure, which they do not here."""
    out = tmp_path / "w" / "segmenters.csv"
    whole = {"xla": 8.0, "torch_eager": 4.0}
    alone = {"xla": 6.0, "xla_own": 30.0, "torch_eager": 3.0}
    found = {(way, part is alone): (ms, ms / 2) for part in (whole, alone) for way, ms in part.items()}
    found = {way: segmenters.Measured(*ms, version=way[0]) for way, ms in found.items()}
    with mock.patch.multiple(segmenters, import_torch=lambda: None, timed=lambda net, ways, rounds: found):
        segmenters.main(["--out", str(out), "--nets", "efficientnet", "--ways", "xla", "torch_eager"])
    with open(out, newline="") as file:
        lines = {line.pop("way"): line for line in csv.DictReader(file)}
    columns = ("ms", "least_ms", "convolutions_ms", "convolutions_least_ms", "version")
    assert {way: [line[name] for name in columns] for way, line in lines.items()} == {
        "xla": ["8.0", "4.0", "6.0", "3.0", "xla"],
        "torch_eager": ["4.0", "2.0", "3.0", "1.5", "torch_eager"],
        "xla_own": ["", "", "30.0", "15.0", "xla_own"],
    }
