"""The net that benchmarks/pytorch_msdnet.py compares with."""

import sys

import pytest

from benchmarks import pytorch_msdnet
from dynjax.config import UserError


def test_without_pytorch_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        pytorch_msdnet.main([])


def test_the_net_is_that_of_the_public_configuration():
    torch = pytest.importorskip("torch", reason="PyTorch is not among the requirements")
    net = pytorch_msdnet.build()
    assert pytorch_msdnet.parameters(net) == pytest.approx(2.98669, abs=1e-5)
    with torch.inference_mode():
        assert [tuple(logits.shape) for logits in net(torch.zeros(2, 3, 32, 32))] == [(2, 10)] * 7
