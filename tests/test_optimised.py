"""Masked equals compact as users run it: with XLA's optimisations, which the other tests go without.

Every dynamic op once, in the executions that a view has by itself (on a CPU the loops). Each is compiled once, and the
decisions are arguments.
"""

import blocks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, at, image, make, still
from flax import nnx
from test_ops_tiles import assert_same

import dynjax as dj
from dynjax.core.decision import EACH, ONE, Decision, some
from dynjax.ops.kernels import CondConv

pytestmark = pytest.mark.optimised


def tell(about, size=None, **more):
    """Makes gates that say what they are given."""

    def gate(keep):
        told = lambda x: Decision(keep, keep * 0.5 + 0.25, *about)  # noqa: E731
        told.size = size
        for name, value in more.items():
            setattr(told, name, value)
        return told

    return gate


def linear(*sides):
    return make(lambda rngs: nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in sides]))


def attend(x, mask):
    scores = jnp.where(mask[:, None], x @ x.swapaxes(1, 2), -1e9)
    return x + jnp.tanh(jax.nn.softmax(scores) @ x)


def experts(gate):
    model = make(lambda rngs: dj.Experts(CHANNELS, 6, 3, rngs=rngs))
    model.gate = gate
    return model


def channels(gate):
    first, last = linear((CHANNELS, 8), (8, CHANNELS))
    return dj.Channels([first, nnx.relu], last, gate)


def slimmable(gate):
    return dj.Slimmable(*linear((CHANNELS, 8), (8, CHANNELS)), gate, widths=(0.25, 0.5, 1))


class Paths(nnx.Module):
    """What goes out of a cell along its paths, side by side."""

    def __init__(self, gate):
        self.cell = dj.Cell(make(blocks.Residual), gate, up=linear((CHANNELS, 2))[0])

    def __call__(self, x):
        return jnp.concatenate([flow.features for flow in self.cell(x).values()], -1)


def two(kind=blocks.Pointwise):
    return [make(kind), make(blocks.Residual)]


def mixed():
    return make(lambda rngs: CondConv(CHANNELS, CHANNELS, (3, 3), kernels=2, rngs=rngs))


MAPS, TOKENS = (3, 9, 10, CHANNELS), (3, 7, CHANNELS)
TILES = (3, 3, 3)
GIVEN = {
    "Skip": (("example", EACH), None, MAPS, (3,), lambda gate: dj.Skip(make(blocks.Residual), gate)),
    "Skip one": (("example", EACH), None, (1, *MAPS[1:]), (1,), lambda gate: dj.Skip(make(blocks.Residual), gate)),
    "Skip around CondConv": (("example", EACH), None, MAPS, (3,), lambda gate: dj.Skip(mixed(), gate)),
    "PolicySkip": (("example", EACH), None, MAPS, (3, 2), lambda gate: dj.PolicySkip(two(), gate)),
    "Tiles": (("tile", EACH), 4, MAPS, TILES, lambda gate: dj.Tiles(make(blocks.Residual), gate)),
    "Tiles on windows": (("tile", EACH), 4, MAPS, TILES, lambda gate: dj.Tiles(make(blocks.Pooled), gate)),
    "Tiles, one": (("tile", EACH), 16, (1, *MAPS[1:]), (1, 1, 1), lambda gate: dj.Tiles(make(blocks.Residual), gate)),
    "Select": (("example", ONE), None, MAPS, (3, 2), lambda gate: dj.Select(two(), gate)),
    "Select per tile": (("tile", ONE), 4, MAPS, (*TILES, 2), lambda gate: dj.Select(two(), gate)),
    "Channels": (("example", EACH), None, TOKENS, (3, 4), channels),
    "Slimmable": (("example", ONE), None, TOKENS, (3, 3), slimmable),
    "Experts": (("token", some(3)), None, TOKENS, (3, 7, 3), experts),
    "MixtureOfDepths": (("token", EACH), None, TOKENS, (3, 7), lambda gate: dj.MixtureOfDepths(attend, gate)),
    "Cell": (("example", EACH), None, MAPS, (3, 2), Paths),
}


def patterns(about, shape):
    """All, none, and several by chance; of one of K, each alone and several by chance."""
    random = np.random.default_rng(0)
    if about[1] == ONE:
        chosen = [
            np.full(shape[:-1], 0),
            np.full(shape[:-1], shape[-1] - 1),
            *random.integers(shape[-1], size=(4, *shape[:-1])),
        ]
        return [np.eye(shape[-1])[each] for each in chosen]
    return [np.zeros(shape), np.ones(shape), *(random.random((4, *shape)) < 0.4)]


@pytest.mark.parametrize("name", GIVEN)
def test_masked_equals_compact(name):
    about, size, shape, kept, wrap = GIVEN[name]
    x, gate = image(*shape), tell(about, size)

    @jax.jit
    def run(x, keep):
        model = wrap(gate(keep))
        return still(model)(x), still(model, "compact")(x)

    found = [run(x, jnp.asarray(keep, jnp.float32)) for keep in patterns(about, kept)]
    for outputs in found:
        assert_same(*outputs)
    assert any((found[0][0] != outputs[0]).any() for outputs in found[1:])


def exits(size=None):
    stages = [make(blocks.Residual) for _ in range(2)]
    if size is not None:
        heads = list(linear(*((CHANNELS, 3),) * 2))
    else:
        heads = [nnx.Sequential(lambda x: x.mean((1, 2)), layer) for layer in linear(*((CHANNELS, 3),) * 2)]
    return dj.Exits(stages, heads, at=0.5, size=size)


def halt(gate, kind="act"):
    return dj.Halt(make(blocks.Pointwise), make(gate), 3, kind=kind)


def samples(rngs):
    return dj.SampleGate(CHANNELS, rngs=rngs)


def tiles(rngs):
    return dj.TileGate(CHANNELS, size=4, rngs=rngs)


STEPS = {
    "Exits": exits,
    "Exits per tile": lambda: exits(4),
    "Halt": lambda: halt(samples),
    "PonderNet": lambda: halt(samples, "pondernet"),
    "Halt per tile": lambda: halt(tiles),
}


@pytest.mark.parametrize("name", STEPS)
def test_masked_equals_compact_step_by_step(name):
    """Decisions that follow from what was computed are moved by the threshold."""
    model, x = STEPS[name](), image(*MAPS) * np.linspace(0.1, 2, 3, dtype=np.float32)[:, None, None, None]

    @jax.jit
    def run(x, threshold):
        return [at(threshold, still(model, execution))(x) for execution in ("masked", "compact")]

    found = [run(x, jnp.float32(threshold)) for threshold in (-30.0, -1.0, -0.3, 0.0, 0.3, 1.0, 30.0)]
    for outputs in found:
        assert_same(*outputs)
    assert len({float(masked.sum()) for masked, _ in found}) > 2
