"""Work that was not chosen may overflow or be no number: it is left out when masked too, and of the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CHANNELS, image, make, still
from flax import nnx

import dynjax as dj
from dynjax import execute
from dynjax.core.decision import EACH, ONE, Decision, some
from dynjax.ops.halting import Halt

HUGE = 1e30


def overflow(x):
    """Infinite on what is huge, its square elsewhere."""
    return x * x


def test_a_blend_takes_what_was_chosen_and_its_gradients_are_finite():
    keep = jnp.asarray([1.0, 0.0, 1.0, 0.0])
    kept = jnp.asarray([[2.0, 3.0], [jnp.inf, 5.0], [7.0, 8.0], [jnp.nan, -jnp.inf]])
    other = jnp.asarray([[jnp.nan, 1.0], [1.0, 1.0], [-jnp.inf, 2.0], [4.0, 6.0]])
    np.testing.assert_array_equal(execute.blend(keep, kept, other), [[2, 3], [1, 1], [7, 8], [4, 6]])
    pulls = jax.grad(lambda *args: execute.blend(*args).sum(), argnums=(0, 1, 2))(keep, kept, other)
    np.testing.assert_array_equal(pulls[0], [2, 4, 6, 0])  # the finite differences
    np.testing.assert_array_equal(pulls[1], np.outer([1, 0, 1, 0], [1, 1]))
    np.testing.assert_array_equal(pulls[2], np.outer([0, 1, 0, 1], [1, 1]))
    _, pushed = jax.jvp(lambda keep: execute.blend(keep, kept, other), (keep,), (jnp.ones(4),))
    np.testing.assert_array_equal(pushed, [[0, 2], [0, 4], [0, 6], [0, 0]])
    whole = execute.blend(keep[:2], jnp.asarray([5, 6]), jnp.asarray([7, 8]))  # leaves may be integers
    np.testing.assert_array_equal(whole, [5, 8])


class Tell(nnx.Module):
    def __init__(self, keep, place, rule=EACH, size=None, probability=None):
        self.keep, self.place, self.rule, self.size = nnx.Variable(jnp.asarray(keep, jnp.float32)), place, rule, size
        self.probability = nnx.Variable(jnp.asarray(keep if probability is None else probability, jnp.float32))

    def __call__(self, x):
        return Decision(self.keep[...], self.probability[...], self.place, self.rule)


def _maps(huge=(1,)):
    x = np.array(image(2, 4, 4, CHANNELS))
    x[list(huge)] = HUGE
    return jnp.asarray(x)


def _tiles():
    x = np.array(image(1, 4, 4, CHANNELS))
    x[:, 2:] = HUGE
    return jnp.asarray(x), [[[1, 1], [0, 0]]]


def _channels():
    first, last = make(lambda rngs: nnx.List([nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)]))
    first.bias[...] = jnp.asarray([0.0, 0.0, HUGE, HUGE])
    return image(2, 2), dj.Channels([first, overflow], last, Tell([[1, 0]] * 2, "example"))


def _experts():
    gate = Tell([[1, 0]] * 2, "example", some(2), probability=[[0.5, 0.5]] * 2)
    model = make(lambda rngs: dj.Experts(2, 3, 2, gate=gate, activation=overflow, rngs=rngs))
    model.gate = Tell([[1, 0]] * 2, "example", some(2), probability=[[0.5, 0.5]] * 2)
    model.up_bias[...] = jnp.asarray([[0.0] * 3, [HUGE] * 3])
    return image(2, 2), model


def _cell():
    """The operation runs for the second example, whose path up is taken and whose path keep is not."""
    model = dj.Cell(overflow, Tell([[1, 1], [1, 0]], "example"), up=jnp.zeros_like)
    return _maps(), lambda x, view=model: view(x)["keep"].features, model


def _tokens():
    x = np.array(image(1, 3, 2))
    x[0, 1] = HUGE
    return jnp.asarray(x), dj.MixtureOfDepths(lambda x, mask: overflow(x), Tell([[1, 0, 1]], "token"))


def _halt():
    """PonderNet gives the state of the step after which it stops: here the second, the first having overflowed."""

    def step(state):
        return jnp.where(state[0] == HUGE, jnp.inf, 1.0) * jnp.ones_like(state[0]), state[1] + 1

    def gate(state):
        go_on = (state[1] < 1.5).astype(jnp.float32)
        return Decision(go_on, go_on, "example")

    halt = Halt(step, gate, 3, kind="pondernet")
    x = jnp.asarray([[HUGE], [1.0]])
    return x, lambda x, view=halt: view((x, jnp.zeros(2)))[0], halt


CASES = {
    "Skip": lambda: (_maps(), dj.Skip(overflow, Tell([1, 0], "example"))),
    "Skip otherwise": lambda: (_maps(), dj.Skip(jnp.tanh, Tell([0, 1], "example"), otherwise=overflow)),
    "PolicySkip": lambda: (_maps(), dj.PolicySkip([overflow, jnp.tanh], Tell([[1, 1], [0, 1]], "example"))),
    "Select": lambda: (_maps(), dj.Select([jnp.tanh, overflow], Tell([[0, 1], [1, 0]], "example", ONE))),
    "Tiles": lambda: (_tiles()[0], dj.Tiles(overflow, Tell(_tiles()[1], "tile", size=2))),
    "Select per tile": lambda: (
        _tiles()[0],
        dj.Select([jnp.tanh, overflow], Tell(np.stack([1 - np.array(_tiles()[1]), _tiles()[1]], -1), "tile", ONE, 2)),
    ),
    "Channels": _channels,
    "Experts": _experts,
    "MixtureOfDepths": _tokens,
    "Cell": _cell,
    "Halt": _halt,
}


@pytest.mark.parametrize("name", CASES)
def test_masked_equals_compact_where_what_was_skipped_is_not_finite(name):
    x, *run, model = CASES[name]()

    def both(x):
        views = [still(model, execution) for execution in ("masked", "compact")]
        return [run[0](x, view) if run else view(x) for view in views]

    masked, compact = jax.jit(both)(x)
    assert np.isfinite(masked).all()
    np.testing.assert_allclose(masked, compact, rtol=1e-5, atol=1e-6)


def test_gates_learn_though_what_they_skip_overflows():
    x = _maps()

    @jax.jit
    def pulls(x, keep):
        found = [jax.grad(lambda keep: (execute.samples(overflow, x, keep) * 1e-30).sum())(keep)]
        for model in (_channels()[1], _experts()[1]):

            def spent(keep, model=model):
                view = nnx.clone(model)
                view.gate.keep[...] = keep
                return (view(x[:, 0, 0, :2] / x[:, 0, 0, :2]) ** 2).sum()

            found.append(jax.grad(spent)(model.gate.keep[...]))
        return found

    of_samples, *others = pulls(x, jnp.asarray([1.0, 0.0]))
    np.testing.assert_allclose(of_samples, [((x[0] ** 2 - x[0]) * 1e-30).sum(), 0], rtol=1e-5)
    for pull in others:
        assert np.isfinite(pull).all() and np.asarray(pull).any()
