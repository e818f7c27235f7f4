"""A cell along time under one scan, against the same cell in a Python loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, image, make, still
from flax import nnx

import dynjax as dj
from dynjax.core import views
from dynjax.core.decision import EACH

FEATURES, EXAMPLES, TIMES = 3, 5, 6
STEP, GATE = 2 * FEATURES * FEATURES, 2 * FEATURES * 16 + 16  # MACs of one time; a gate has 16 hidden features
X = image(EXAMPLES, TIMES, FEATURES)


class Update(nnx.Module):
    """The next state from what comes in and the state."""

    def __init__(self, rngs: nnx.Rngs):
        self.mix = nnx.Linear(2 * FEATURES, FEATURES, rngs=rngs)
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs)

    def __call__(self, both):
        return nnx.tanh(self.norm(self.mix(both)))


class Cell(dj.Wrapper):
    """The state stays as it is for the examples that the gate does not keep."""

    def __init__(self, rngs: nnx.Rngs):
        self.update, self.gate = Update(rngs), dj.SampleGate(2 * FEATURES, bias=0.0, rngs=rngs)

    def initial(self, examples: int):
        return jnp.zeros((examples, FEATURES))

    def __call__(self, x, carry):
        both = jnp.concatenate([x, carry], -1)
        decision = self.expect(self.gate(both), "example", EACH, x.shape[:1], "use a SampleGate")
        self.account_blocks(decision, [self.update], [both])
        carry = self.samples(self.update, both, decision.keep, lambda _: carry, decision.probability)
        return 2 * carry, carry


class Reader(nnx.Module):
    """What `run` makes of a cell, named in the trace."""

    def __init__(self, rngs: nnx.Rngs, cell=Cell, run=dj.scan):
        self.cell, self.run = cell(rngs), run

    def __call__(self, x, carry=None):
        return self.run(self.cell, x, carry)


def loop(cell, x, carry=None):
    """As `dj.scan`."""
    carry = cell.initial(len(x)) if carry is None else carry
    ys = []
    for time in range(x.shape[1]):
        y, carry = cell(x[:, time], carry)
        ys.append(y)
    return jnp.stack(ys, 1), carry


def readers():
    """One that scans and one that loops, of the same variables."""
    return (make(functools.partial(Reader, run=run)) for run in (dj.scan, loop))


def close(found, expected, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), found, expected)


@pytest.mark.parametrize("ways", [{}, {"strategy": "loop"}, {"strategy": "buckets"}], ids=str)
@pytest.mark.parametrize("threshold", [-0.4, 0.1])
def test_a_scan_is_a_loop_in_every_execution(ways, threshold):
    scanned, looped = (at(threshold, still(model)) for model in readers())
    expected, by_time = nnx.jit(dj.traced(looped))(X)
    model = nnx.view(scanned, execution="compact", **ways) if ways else scanned
    found, trace = nnx.jit(dj.traced(model))(X)
    close(found, expected)
    (decision,) = trace.decisions.values()
    assert list(trace.decisions) == ["cell"] and (decision.place, decision.rule) == ("time", EACH)
    keeps = jnp.stack([each.keep for each in by_time.decisions.values()], 1)
    np.testing.assert_array_equal(decision.keep, keeps)
    assert 0 < keeps.mean() < 1
    np.testing.assert_allclose(trace.macs(), TIMES * GATE + STEP * keeps.sum(1))
    assert (trace.static_macs, trace.full_macs) == (TIMES * GATE, TIMES * (GATE + STEP))
    np.testing.assert_allclose(trace.macs(), by_time.macs())


def test_noise_and_statistics_move_on_and_gradients_are_those_of_the_loop():
    @nnx.jit
    def train(model, x):
        def loss(model, x):
            (y, carry), trace = dj.traced(model)(x)
            keep = jnp.stack([d.keep for d in trace.decisions.values()], -1).reshape(EXAMPLES, TIMES)
            return (y**2).sum() + carry.sum() + 0.1 * trace.fraction().sum(), keep

        return nnx.value_and_grad(loss, has_aux=True)(model, x)

    scanned, looped = (views.training(model) for model in readers())
    first = [train(model, X) for model in (scanned, looped)]
    second = [train(model, X) for model in (scanned, looped)]
    close(first[0], first[1], atol=1e-4)  # under BatchNorm a bias has no gradient but that of rounding
    close(second[0], second[1], atol=1e-4)
    close(nnx.state(scanned, nnx.BatchStat), nnx.state(looped, nnx.BatchStat))
    assert (nnx.state(scanned, nnx.BatchStat)["cell"]["update"]["norm"]["mean"][...] != 0).any()
    counts = [model.cell.gate.logits.rngs.gate.count[...] for model in (scanned, looped)]
    assert counts[0] == counts[1] == 2 * TIMES
    keeps = first[0][0][1], second[0][0][1]
    assert (keeps[0] != keeps[1]).any() and (keeps[0][:, 0] != keeps[0][:, 1]).any()


def test_a_second_half_goes_on_where_the_first_one_ended():
    model = still(next(readers()))
    run = jax.jit(lambda x, carry: model(x, carry))  # closes over the model: nothing of it moves
    y, carry = run(X, None)
    first, half = run(X[:, :2], None)
    second, last = run(X[:, 2:], half)
    close((jnp.concatenate([first, second], 1), last), (y, carry))


def test_without_a_trace_nothing_is_counted(monkeypatch):
    model = still(next(readers()))
    expected = dj.traced(model)(X)[0]
    monkeypatch.setattr(Cell, "account", lambda *args, **kwargs: pytest.fail("counted"))
    close(model(X), expected)


class Tiled(nnx.Module):
    """Decides about tiles."""

    def __init__(self, rngs: nnx.Rngs):
        self.tiles = dj.Tiles(nnx.Conv(2, 2, (3, 3), rngs=rngs), dj.TileGate(2, size=2, rngs=rngs))

    def initial(self, examples: int):
        return jnp.zeros((examples, 4, 4, 2))

    def __call__(self, x, carry):
        carry = self.tiles(x + carry)
        return carry, carry


def test_errors():
    cell = still(make(Cell))
    with pytest.raises(ValueError, match=r"same first axes \(B, T\), these have \[\(5, 5\), \(5, 6\)\]"):
        dj.scan(cell, (X, X[:, :5]), cell.initial(EXAMPLES))
    with pytest.raises(ValueError, match=r"same first axes \(B, T\), these have \[\(5,\)\]"):
        dj.scan(cell, X[:, 0, 0])

    class Plain:
        initial, __call__ = Cell.initial, Cell.__call__

    with pytest.raises(ValueError, match="Plain is no nnx"):
        dj.scan(Plain(), X)
    tiled = still(make(functools.partial(Reader, cell=Tiled)))
    with pytest.raises(ValueError, match="decides about whole examples, at a linear cost; this one decides per tile"):
        dj.traced(tiled)(image(2, 3, 4, 4, 2))
