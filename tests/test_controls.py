"""Gates that learn nothing."""

import dataclasses
import typing

import numpy as np
import pytest
from blocks import evaluate, image, make, train
from flax import nnx

import dynjax as dj
from dynjax import budget, models
from dynjax.config import UserError
from dynjax.core.controls import SampledPaths
from dynjax.core.decision import EACH, ONE
from dynjax.ops import RandomRouter


def test_fixed_gate():
    x = image(3, 9, 7, 4)
    keep = np.random.default_rng(0).integers(0, 2, (3, 3, 2))
    np.testing.assert_array_equal(dj.FixedGate(keep, size=4)(x).keep, keep)
    np.testing.assert_array_equal(dj.FixedGate([0])(x).keep, [0, 0, 0])
    shapes = [
        ((3,), "example", EACH),
        ((1, 2), "example", ONE),
        ((1, 3, 2), "tile", EACH),
        ((3, 3, 2, 2), "tile", ONE),
    ]
    for shape, *about in shapes:
        decision = dj.FixedGate(np.ones(shape), size=4)(x)
        assert [decision.place, decision.rule] == about and decision.keep.shape == (3, *shape[1:])
    with pytest.raises(ValueError, match="keep has 2 examples and the input has 3"):
        dj.FixedGate(np.ones(2))(x)
    with pytest.raises(ValueError, match=r"keep has shape \(\)"):
        dj.FixedGate(1)


def test_random_gate_keeps_its_rate():
    gate, x = dj.RandomGate(0.3, size=2, rngs=nnx.Rngs(0)), image(16, 20, 20, 1)
    keep, again = (np.asarray(train(gate, x).keep) for _ in range(2))
    assert keep.shape == (16, 10, 10) and keep.mean() == pytest.approx(0.3, abs=0.05)
    assert (again != keep).any()
    still = np.asarray(evaluate(gate, x).keep)
    assert still.mean() == pytest.approx(0.3, abs=0.06)
    np.testing.assert_array_equal(still, evaluate(gate, x).keep)
    # A function of the content of each example alone, not of its place in the batch.
    np.testing.assert_array_equal(still[::-1], evaluate(gate, np.asarray(x)[::-1]).keep)
    assert (still[0] != still[1]).any()
    shares = [np.asarray(evaluate(gate, x, at).keep).mean() for at in (-30.0, -1.0, 0.0, 1.0, 30.0)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] == 0
    assert evaluate(dj.RandomGate(0.5, rngs=nnx.Rngs(0)), x).keep.shape == (16,)


@pytest.mark.parametrize("draw", ["single", "sandwich", "independent"])
def test_sampled_paths_draw_what_they_say(draw):
    gate, x = make(lambda rngs: dj.SampledPaths(3, draw, rate=0.7, rngs=rngs)), image(3000, 2)
    keep = np.asarray(train(gate, x).keep)
    if draw == "single":
        np.testing.assert_array_equal(keep.sum(1), 1)
        np.testing.assert_allclose(keep.mean(0), 1 / 3, atol=0.04)
    if draw == "sandwich":
        assert keep[::3].all() and not keep[1::3].any()
    if draw != "single":
        np.testing.assert_allclose(keep[2::3].mean(0), 0.7, atol=0.05)
    assert (np.asarray(train(gate, x).keep) != keep).any()
    for threshold, rate in ((-30.0, 1.0), (0.0, 0.7), (np.log(0.7 / 0.3), 0.5), (30.0, 0.0)):
        decision = evaluate(gate, x, threshold)
        np.testing.assert_allclose(decision.keep.mean(0), rate, atol=0.05)
        np.testing.assert_array_equal(decision.probability, decision.keep)


def test_errors_name_the_argument():
    rngs = nnx.Rngs(0)
    for build, message in [
        (lambda: dj.FixedGate([1], size=0), "size=0"),
        (lambda: dj.RandomGate(1.0, rngs=rngs), "rate=1.0"),
        (lambda: dj.RandomGate(0.5, size=0, rngs=rngs), "size=0"),
        (lambda: dj.RandomGate(0.5, size=2, units=3, rngs=rngs), "units=3"),
        (lambda: dj.SampledPaths(0, rngs=rngs), "must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_an_unknown_draw_is_named_whether_or_not_types_are_checked():
    with pytest.raises((ValueError, TypeError), match="most"):
        dj.SampledPaths(2, "most", rngs=nnx.Rngs(0))


def test_a_grid_gate_keeps_an_even_share_whatever_the_content():
    gate, x = dj.GridGate(size=2), image(2, 8, 8, 3)
    half = np.asarray(evaluate(gate, x, 0.0).keep)
    np.testing.assert_array_equal(half, np.broadcast_to((np.indices((4, 4)).sum(0) + 1) % 2, (2, 4, 4)))
    quarter = np.asarray(evaluate(gate, x, np.log(3)).keep)
    assert quarter[0, ::2, ::2].all() and quarter.sum() == 8
    for threshold, share in ((-30.0, 1), (30.0, 0)):
        assert evaluate(gate, x, threshold).keep.mean() == share
    odd = dj.GridGate()(image(1, 3, 5, 1))
    assert odd.keep.shape == (1, 3, 5) and odd.place == "tile"


def combinations():
    """Every family with each of its dynamics, in the tiny form."""
    for family in models.FAMILIES.values():
        fields = {field.name: typing.get_args(field.type) for field in dataclasses.fields(family.config)}
        if "random" in fields.get("gate", ()):
            small = models.tiny(family.config(gate="random"))
            yield from (dataclasses.replace(small, dynamics=each) for each in fields["dynamics"])


@pytest.mark.parametrize("model", list(combinations()), ids=lambda model: f"{model.family}-{model.dynamics}")
def test_a_random_gate_learns_nothing_or_is_refused(model):
    refused = {"static", "single", "sandwich", "involution", "ddf", "scales"}
    if model.dynamics in refused:
        with pytest.raises((UserError, ValueError), match="gate"):
            nnx.eval_shape(lambda: models.build(model, 10, rngs=nnx.Rngs(0)))
        return
    built = nnx.eval_shape(lambda: models.build(model, 10, rngs=nnx.Rngs(0)))
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(built, budget.gate_filter))]
    kinds = (dj.RandomGate, RandomRouter, SampledPaths)
    chance = [
        module
        for _, module in nnx.iter_modules(built)
        if isinstance(module, kinds)
        or getattr(module, "random", False)
        or getattr(module, "confidence", "") == "random"
    ]
    assert chance
