"""Budgeted and anytime curves: by hand, and against the model that really stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, make, still

import dynjax as dj
from dynjax import models
from dynjax.config import DataConfig
from dynjax.data import make_loader, make_source
from dynjax.models.msdnet import MSDNetConfig
from dynjax.models.resnet import ResNetConfig
from dynjax.tasks.anytime import ExitOutputs, anytime, budgeted, find_exits, read_exits

CORRECT = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
DOUBT = np.array([[-2.0, 1.0, 3.0, -1.0], [-3.0, -1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
OUTPUTS = ExitOutputs(CORRECT, DOUBT, np.array([10.0, 20.0, 40.0]))


def test_where_pictures_stop():
    np.testing.assert_array_equal(OUTPUTS.stops(0.0), [0, 1, 2, 0])
    np.testing.assert_array_equal(OUTPUTS.stops(-30.0), [2] * 4)
    np.testing.assert_array_equal(OUTPUTS.stops(30.0), [0] * 4)
    np.testing.assert_array_equal(OUTPUTS.stops(-2.0), [1, 2, 2, 2])  # at the threshold itself it goes on


def test_anytime_by_hand():
    points = anytime(OUTPUTS)
    assert [(p.exit, p.score, p.macs) for p in points] == [(0, 0.5, 10), (1, 0.5, 20), (2, 1, 40)]


def test_budgets_are_met_where_thresholds_are_solved():
    points = budgeted(OUTPUTS, OUTPUTS, count=7)
    assert [p.budget for p in points] == pytest.approx(np.linspace(0.25, 1, 7))
    assert all(p.macs <= p.budget * 40 + 1e-3 for p in points)
    assert (points[0].macs, points[0].score) == (10, 0.5) and (points[-1].macs, points[-1].score) == (40, 1)
    spent = [p.macs for p in points]
    assert spent == sorted(spent)


def test_one_pass_says_what_the_model_does():
    config = MSDNetConfig(scales=2, channels=4, growth=2, blocks=3, base=1, step=1, dynamics="exits")
    model = still(make(lambda rngs: models.build(config, 10, rngs=rngs)))
    source = make_source(DataConfig(name="digits8"), "val")
    outputs = read_exits(model, make_loader(source, 64, seed=0, augment=None, shuffle=False, repeat=False))
    assert outputs.correct.shape == (3, len(source))
    images = jnp.asarray(np.stack([source[i]["image"] for i in range(40)]))
    labels = np.array([source[i]["label"] for i in range(40)])
    run = jax.jit(lambda images, threshold: dj.traced(at(threshold, model))(images))
    for threshold in (float(np.quantile(outputs.doubt[:2], 0.6)), -30.0):
        logits, trace = run(images, threshold)
        stops = outputs.stops(threshold)[:40]
        np.testing.assert_allclose(trace.macs(), outputs.macs[stops], rtol=1e-6)
        np.testing.assert_array_equal(logits.argmax(-1) == labels, outputs.correct[stops, np.arange(40)])


def test_models_without_exits():
    model = make(lambda rngs: models.build(ResNetConfig(widths=(4,), blocks=(1,), dynamics="skip"), 3, rngs=rngs))
    assert find_exits(model) is None
    with pytest.raises(ValueError, match="ResNet has no method `predictions`"):
        read_exits(model, [])
