"""RANet: the coarsest sub-network first, exits at the coarsest resolution, masked equals compact, the static twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, make, still
from flax import nnx
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax import cost, execute, models
from dynjax.config import UserError
from dynjax.models import ranet
from dynjax.models.ranet import RANetConfig

SMALL = dict(scales=3, channels=2, growth=4, blocks=1, step=1, layers=2)


def build(rngs, **form):
    return models.build(RANetConfig(**SMALL | dict(dynamics="exits") | form), 3, rngs=rngs)


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    return make(build)


def test_masked_equals_compact_from_the_first_exit_to_the_last():
    model, x = make(lambda rngs: build(rngs, scales=2)), pictures(5, 12, 13)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    predictions = jax.jit(lambda x: still(model).predictions(x))(x)
    doubt = np.concatenate([model.exits.doubt(logits) for logits in predictions[:-1]])
    ends = []
    for threshold in (-30.0, float(np.median(doubt)) + 1e-3, 30.0):
        masked, *compact = run(jnp.float32(threshold), x)
        assert masked.shape == (5, 3) and masked.dtype == jnp.float32
        assert_same(masked, *compact)
        ends.append(masked)
    np.testing.assert_allclose(ends[0], predictions[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ends[2], predictions[0], rtol=1e-4, atol=1e-5)
    assert (ends[1] != ends[0]).any() and (ends[1] != ends[2]).any()


def test_resolutions_rise_and_every_exit_reads_the_coarsest(model):
    view, x = still(model), jnp.zeros((1, 16, 16, 3))
    sides = []
    for stage, head in zip(view.exits.stages, view.exits.heads, strict=True):
        x = execute.shape_of(stage, x)
        sides.append([side.shape[1] for side in x])
        assert execute.shape_of(head, x).shape == (1, 3)
    # Base maps of the finer sub-networks, then the dense maps of the blocks that the next one is fused with.
    assert sides == [[8, 16, 4], [16, 8, 4], [4]]
    assert model.exits.confidence == "max_prob"
    assert make(lambda rngs: build(rngs, gate="random")).exits.confidence == "random"


def test_macs():
    view, x = still(make(lambda rngs: build(rngs, scales=2, layers=1))), pictures(1, 16, 16)
    first = cost.macs(view.exits.stages[0], jnp.zeros((1, 16, 16, 3)))
    maps = execute.shape_of(view.exits.stages[0], jnp.zeros((1, 16, 16, 3)))
    trace = jax.jit(lambda threshold: dj.traced(at(threshold, view))(x)[1])
    np.testing.assert_allclose(trace(30.0).macs(), first + cost.macs(view.exits.heads[0], maps), rtol=1e-6)
    np.testing.assert_allclose(trace(-30.0).macs(), trace(-30.0).full_macs, rtol=1e-6)
    assert trace(30.0).static_macs == 0


def test_channels_by_hand():
    """Two sub-networks: the widths of every map as the paper's blocks make them."""
    model = make(lambda rngs: build(rngs, scales=2, channels=4, growth=8))
    # The coarse one: 8 channels and 2 layers of 16. The fine one: 4 and 2 layers of 8, a quarter more from the coarse
    # one, half of them left where it goes down; then 2 layers of 8 again.
    down = int((4 + 2 * 8) * 1.25 * 0.5)
    widths = [head.convs.layers[0].conv.in_features for head in model.exits.heads]
    assert widths == [8 + 2 * 16, down + 2 * 8]
    fused = model.exits.stages[1].blocks[0]
    assert fused.seen == (8, 24, 40) and fused.widths == (4, 12, 20)


def test_training_reaches_every_parameter():
    small = make(lambda rngs: build(rngs, scales=2, layers=1))

    def loss(model, x):
        return sum((out**2).sum() for out in model.predictions(x))

    mean = jax.tree.leaves(nnx.state(small, nnx.BatchStat))[0]
    grads = nnx.jit(nnx.grad(loss))(small, pictures(3, 9, 8))
    assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    assert (jax.tree.leaves(nnx.state(small, nnx.BatchStat))[0] != mean).any()


def test_twin_params_give_the_logits_of_the_static_twin():
    small = SMALL | dict(scales=2, layers=1)
    twin = make(lambda rngs: build(rngs, **small, dynamics="static"))
    state = nnx.state(twin, (nnx.Param, nnx.BatchStat))
    # Not by `make`, which would put other numbers in their place; compiled at once rather than layer by layer.
    net = nnx.jit(lambda: ranet.build(RANetConfig(**small, dynamics="exits"), 3, rngs=nnx.Rngs(3), twin_params=state))()
    dj.budget.set_threshold(net, -30.0)
    same = jax.jit(lambda x: [still(net)(x), still(twin)(x)])(pictures(1, 9, 8))
    np.testing.assert_allclose(*same, rtol=1e-4, atol=1e-5)


def test_errors():
    for form, message in [
        (dict(scales=0), "scales is 0"),
        (dict(growth=3), "growth is 3: it must be from 4"),
    ]:
        with pytest.raises(UserError, match=message):
            nnx.eval_shape(lambda form=form: build(nnx.Rngs(0), **form))
