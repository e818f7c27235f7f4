"""The halting classifier: masked equals compact, what each kind is trained on, the static twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import at, make, still
from flax import nnx
from test_ops_tiles import assert_same, three_ways

import dynjax as dj
from dynjax.config import HaltConfig
from dynjax.models import halting
from dynjax.ops.halting import geometric_prior, halting_distribution, kl_to_prior

SMALL = dict(channels=4, halvings=1, steps=2, tile=3)
FORMS = {
    "act": dict(dynamics="act"),
    "sact": dict(dynamics="sact"),
    "pondernet": dict(dynamics="pondernet"),
    "random": dict(dynamics="sact", gate="random"),
}


def build(rngs, **form):
    return halting.build(HaltConfig(**SMALL | form), 3, rngs=rngs)


def pictures(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", FORMS)
def test_masked_equals_compact(form):
    model, x = make(lambda rngs: build(rngs, **FORMS[form])), pictures(5, 13, 12)
    run = three_ways(lambda threshold, x: (at(threshold, model), x), jnp.zeros(()), x)
    ends = []
    for threshold in (-30.0, 0.0, 1.0, 30.0):
        masked, *compact = run(jnp.float32(threshold), x)
        assert masked.shape == (5, 3) and masked.dtype == jnp.float32
        assert_same(masked, *compact)
        ends.append(masked)
    assert np.abs(ends[0] - ends[-1]).min() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_training_reaches_every_parameter(form):
    model = make(lambda rngs: build(rngs, **FORMS[form]))

    def loss(model, x):
        if form == "pondernet":
            outs, trace = dj.traced(model.predictions)(x)
            p = halting_distribution(trace.decisions["body"])
            losses = jnp.stack([(out**2).sum(-1) for out in outs], -1)
            return ((p * losses).sum(-1) + 0.01 * kl_to_prior(p, geometric_prior(0.3, 2))).mean()
        return (model(x) ** 2).sum()

    grads = nnx.jit(nnx.grad(loss))(model, pictures(4, 9, 8))
    assert all(np.isfinite(leaf).all() and np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("form", ["pondernet", "sact"])
def test_twin_params_give_the_logits_of_the_static_twin(form):
    twin = make(lambda rngs: build(rngs, dynamics="static"))
    state = nnx.state(twin, (nnx.Param, nnx.BatchStat))
    # Not by `make`, which would put other numbers in their place.
    config = HaltConfig(**SMALL, **FORMS[form])
    net = nnx.jit(lambda: halting.build(config, 3, rngs=nnx.Rngs(3), twin_params=state))()
    dj.budget.set_threshold(net, -30.0)
    x = pictures(2, 9, 8)
    (logits, trace), wanted = jax.jit(lambda x: (dj.traced(still(net))(x), still(twin)(x)))(x)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trace.macs(), trace.full_macs, rtol=1e-6)
