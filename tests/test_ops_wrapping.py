"""What all wrappers do: a decision about another place, or made by another rule, is refused by name."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, Pointwise, image, make, still
from flax import nnx

import dynjax as dj
from dynjax.core.decision import Decision, Granularity


class Tell(nnx.Module):
    """A gate that says one thing of everything."""

    def __init__(self, shape, granularity, size=None):
        self.keep, self.granularity, self.size = nnx.Variable(jnp.ones(shape)), granularity, size

    def __call__(self, x):
        return Decision(self.keep[...], self.keep[...], self.granularity)


def _blocks(number=2):
    return [make(Pointwise) for _ in range(number)]


def _pair():
    return make(lambda rngs: nnx.List([nnx.Linear(CHANNELS, 8, rngs=rngs), nnx.Linear(8, CHANNELS, rngs=rngs)]))


def _experts(gate, top=2):
    gate.top = top
    model = make(lambda rngs: dj.Experts(CHANNELS, 4, 2, rngs=rngs))
    model.gate = gate
    return model


MAPS, TOKENS, ROWS = (2, 4, 4, CHANNELS), (2, 2, CHANNELS), (2, CHANNELS)
WRAPPERS = {
    "Skip": ("sample", (2,), None, MAPS, lambda gate: dj.Skip(*_blocks(1), gate)),
    "Halt": ("sample", (2,), None, MAPS, lambda gate: dj.Halt(*_blocks(1), gate, 2)),
    "PolicySkip": ("channel", (2, 2), None, MAPS, lambda gate: dj.PolicySkip(_blocks(), gate)),
    "Channels": ("channel", (2, 2), None, ROWS, lambda gate: dj.Channels(*_pair(), gate)),
    "Slimmable": ("branch", (2, 2), None, ROWS, lambda gate: dj.Slimmable(*_pair(), gate, widths=(0.5, 1))),
    "Select": ("branch", (2, 2), None, MAPS, lambda gate: dj.Select(_blocks(), gate)),
    "Cell": ("path", (2, 1), None, MAPS, lambda gate: dj.Cell(*_blocks(1), gate)),
    "MixtureOfDepths": ("token", (2, 2), None, TOKENS, lambda gate: dj.MixtureOfDepths(lambda x, mask: x, gate)),
    "Experts": ("branches branch", (2, 2), None, ROWS, _experts),
    "Experts of tokens": ("token branch", (2, 2, 2), None, TOKENS, _experts),
    "Tiles": ("tile", (2, 2, 2), 2, MAPS, lambda gate: dj.Tiles(*_blocks(1), gate)),
    "Halt per tile": ("tile", (2, 2, 2), 2, MAPS, lambda gate: dj.Halt(*_blocks(1), gate, 2)),
    "Select per tile": ("tile branch", (2, 2, 2, 2), 2, MAPS, lambda gate: dj.Select(_blocks(), gate)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_decision_of_a_fitting_shape_about_something_else_is_refused_by_name(name):
    own, shape, size, given, wrap = WRAPPERS[name]
    own = ("branches", "branch") if own == "branches branch" else (own,)
    x = image(*given)
    for granularity in get_args(Granularity):
        model = still(wrap(Tell(shape, granularity, size)))
        if granularity in own:
            model(x)
            continue
        message = rf"{name.split()[0]} needs a decision per {own[0]} of shape .* per {granularity}; "
        with pytest.raises(ValueError, match=message):
            model(x)


def test_gates_say_what_they_decide():
    """What `Select` would sum when masked, and take the last of when compact."""
    maps, rows = image(*MAPS), image(*ROWS)
    several = make(lambda rngs: dj.Router(CHANNELS, 2, top=2, rngs=rngs))
    groups = make(lambda rngs: dj.ChannelGate(CHANNELS, 2, rngs=rngs))
    one = make(lambda rngs: dj.Router(CHANNELS, 2, top=1, rngs=rngs))
    for gate, x in ((groups, maps), (several, rows), (dj.RandomGate(0.5, units=2, rngs=nnx.Rngs(0)), maps)):
        with pytest.raises(ValueError, match=r"Select needs a decision per branch .* per (channel|branches);"):
            still(dj.Select(_blocks(), gate))(x)
    assert still(one)(rows).granularity == "branch"
    with pytest.raises(ValueError, match="Skip: its gate gave a ndarray and no Decision; use SampleGate"):
        dj.Skip(*_blocks(1), lambda x: np.ones(2))(maps)
    with pytest.raises(ValueError, match=r"keep \(2,\) and probability \(2, 1\)"):
        dj.Skip(*_blocks(1), lambda x: Decision(jnp.ones(2), jnp.ones((2, 1)), "sample"))(maps)


def test_a_fixed_gate_says_what_it_is_about():
    keep = jnp.ones((2, 2))
    said = [dj.FixedGate(keep, granularity=each)(keep).granularity for each in ("channel", "path", "token", "branches")]
    assert said == ["channel", "path", "token", "branches"]
    assert dj.FixedGate(np.ones((2, 2, 2)))(keep).granularity == "token branch"
    with pytest.raises(ValueError, match=r"keep has shape \(2, 2\); per tile it must have 3 axes"):
        dj.FixedGate(keep, granularity="tile")
