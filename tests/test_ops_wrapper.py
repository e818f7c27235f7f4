"""What all wrappers do: a decision about another place, or made by another rule, is refused by name."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, image, make, still
from flax import nnx

import dynjax as dj
from dynjax.core.decision import AXES, EACH, MIXTURE, ONE, PREFIX, Decision, Rule, some


class Tell(nnx.Module):
    """A gate that says one thing of everything."""

    def __init__(self, shape, place, rule, size=None):
        self.keep, self.place, self.rule, self.size = nnx.Variable(jnp.ones(shape)), place, rule, size

    def __call__(self, x):
        return Decision(self.keep[...], self.keep[...], self.place, self.rule)


def _blocks(number=2):
    return [make(Pointwise) for _ in range(number)]


def _pair():
    return make(lambda rngs: nnx.List([nnx.Linear(CHANNELS, 8, rngs=rngs), nnx.Linear(8, CHANNELS, rngs=rngs)]))


def _experts(gate):
    model = make(lambda rngs: dj.Experts(CHANNELS, 4, 2, rngs=rngs))
    model.gate = gate
    return model


def _masked(x, mask):
    return x


MAPS, TOKENS, ROWS = (2, 4, 4, CHANNELS), (2, 2, CHANNELS), (2, CHANNELS)
WRAPPERS = {
    "Skip": ("example", [EACH], (2,), None, MAPS, lambda gate: dj.Skip(*_blocks(1), gate)),
    "Halt": ("example", [EACH], (2,), None, MAPS, lambda gate: dj.Halt(*_blocks(1), gate, 2)),
    "PolicySkip": ("example", [EACH], (2, 2), None, MAPS, lambda gate: dj.PolicySkip(_blocks(), gate)),
    "Channels": ("example", [EACH], (2, 2), None, ROWS, lambda gate: dj.Channels(*_pair(), gate)),
    "Shortlist": (
        "example",
        [EACH],
        (2, 2),
        None,
        ROWS,
        lambda gate: dj.Shortlist(make(lambda rngs: nnx.Linear(CHANNELS, 2, rngs=rngs)), gate, 2),
    ),
    "Slimmable": ("example", [ONE], (2, 2), None, ROWS, lambda gate: dj.Slimmable(*_pair(), gate, widths=(0.5, 1))),
    "Select": ("example", [ONE], (2, 2), None, MAPS, lambda gate: dj.Select(_blocks(), gate)),
    "Cell": ("example", [EACH], (2, 1), None, MAPS, lambda gate: dj.Cell(*_blocks(1), gate)),
    "MixtureOfDepths": (
        "token",
        [EACH],
        (2, 2),
        None,
        TOKENS,
        lambda gate: dj.MixtureOfDepths(lambda x, mask: x, gate),
    ),
    "Experts": ("example", [some(2), ONE], (2, 2), None, ROWS, _experts),
    "Experts of tokens": ("token", [some(2), ONE], (2, 2, 2), None, TOKENS, _experts),
    "Tiles": ("tile", [EACH], (2, 2, 2), 2, MAPS, lambda gate: dj.Tiles(*_blocks(1), gate)),
    "Halt per tile": ("tile", [EACH], (2, 2, 2), 2, MAPS, lambda gate: dj.Halt(*_blocks(1), gate, 2)),
    "Select per tile": ("tile", [ONE], (2, 2, 2, 2), 2, MAPS, lambda gate: dj.Select(_blocks(), gate)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_decision_of_a_fitting_shape_about_something_else_is_refused_by_name(name):
    own, rules, shape, size, given, wrap = WRAPPERS[name]
    x = image(*given)
    for place, rule in itertools.product(AXES, (EACH, ONE, PREFIX, MIXTURE, some(2), Rule("pairs", 2))):
        model = still(wrap(Tell(shape, place, rule, size)))
        if place == own and rule in rules:
            model(x)
            continue
        message = (
            rf"{name.split()[0]} needs a decision per {own} \(rule: {rules[0].name}\) of shape .* its gate gave .* "
            rf"per {place} \(rule: {rule.name}\); "
        )
        with pytest.raises(ValueError, match=message):
            model(x)


def test_gates_say_what_they_decide():
    """What `Select` would sum when masked, and take the last of when compact."""
    maps, rows = image(*MAPS), image(*ROWS)
    several = make(lambda rngs: dj.Router(CHANNELS, 2, top=2, rngs=rngs))
    groups = make(lambda rngs: dj.ChannelGate(CHANNELS, 2, rngs=rngs))
    one = make(lambda rngs: dj.Router(CHANNELS, 2, top=1, rngs=rngs))
    for gate, x in ((groups, maps), (several, rows), (dj.RandomGate(0.5, units=2, rngs=nnx.Rngs(0)), maps)):
        with pytest.raises(ValueError, match=r"Select needs .*rule: one.* per example \(rule: (each|some)\);"):
            still(dj.Select(_blocks(), gate))(x)
    assert (still(one)(rows).place, still(one)(rows).rule) == ("example", ONE)
    with pytest.raises(ValueError, match="Skip: its gate gave a ndarray and no Decision; use SampleGate"):
        dj.Skip(*_blocks(1), lambda x: np.ones(2))(maps)
    with pytest.raises(ValueError, match=r"keep \(2,\) and probability \(2, 1\)"):
        dj.Skip(*_blocks(1), lambda x: Decision(jnp.ones(2), jnp.ones((2, 1)), "example"))(maps)


def test_a_fixed_gate_says_what_it_is_about():
    keep = jnp.ones((2, 2))

    def said(keep, **about):
        decision = dj.FixedGate(keep, **about)(keep)
        return decision.place, decision.rule

    assert said(keep, rule=EACH) == ("example", EACH) and said(keep, rule=some(2)) == ("example", some(2))
    assert said(keep, place="token") == ("token", EACH) and said(keep, place="time") == ("time", EACH)
    assert said(jnp.ones((2, 2, 2))) == ("token", some(2))
    with pytest.raises(ValueError, match=r"keep has shape \(2, 2\); per tile it must have 3 axes, or 4 with kinds"):
        dj.FixedGate(keep, place="tile")
