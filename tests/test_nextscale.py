import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynjax import budget, models
from dynjax.config import UserError
from dynjax.models.nextscale import NextScaleConfig
from dynjax.ops import sampling


def make(shape=(4, 4, 1), threshold=0.0, **changes):
    config = NextScaleConfig(
        **dict(shape=shape, values=2, scales=2, features=4, blocks=1, plain=4, coarse_features=4, coarse_layers=1)
        | dict(tile=1, dynamics="tiles")
        | changes
    )
    model = models.build(config, 10, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):  # fresh networks are sure of nothing: they would all be refined alike
        if isinstance(module, nnx.Linear):
            module.kernel[...] *= 3
    budget.set_threshold(model, threshold)
    return model


def view(model, execution, strategy="auto"):
    return nnx.view(model, execution=execution, strategy=strategy, deterministic=True, raise_if_not_found=False)


@pytest.mark.parametrize("threshold", [-30.0, 2.0, 30.0])
def test_probabilities_of_all_pictures_sum_to_one(threshold):
    model = make(threshold=threshold)
    every = (np.arange(2**16)[:, None] >> np.arange(16) & 1).reshape(-1, 4, 4, 1)

    @jax.jit
    def total(x):
        return jnp.exp(model.likelihood.log_prob(model(x), x).sum((1, 2))).sum()

    found = sum(float(total(jnp.asarray(part, jnp.int32))) for part in np.split(every, 4))
    assert found == pytest.approx(1, abs=1e-4)


EITHER = [
    (1, "loop"),
    (3, "buckets"),
    *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, "buckets"), (3, "loop"))),
]


@pytest.mark.parametrize(("examples", "strategy"), EITHER)
def test_compact_draws_what_masked_draws(examples, strategy):
    model = make((7, 6, 1), values=4)
    noise = sampling.make_noise(model, jax.random.key(0), examples)
    refined = []
    for threshold in (-30.0, 1.0, 30.0):
        budget.set_threshold(model, threshold)
        drawn = [
            nnx.jit(lambda model, noise: model.draw(noise)[:3])(view(model, *way), noise)
            for way in (("masked",), ("compact", strategy))
        ]
        for masked, compact in zip(*drawn, strict=True):
            np.testing.assert_array_equal(masked, compact)
        refined.append(int(drawn[0][1].sum()))
    assert refined[0] >= refined[1] >= refined[2] == 0 and refined[0] > 0


def test_scales_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"--model\.scales is 4"):
        make(scales=4)
