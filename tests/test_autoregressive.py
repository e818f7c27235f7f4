"""Bits per dimension of a batch and of a set."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make
from flax import nnx

from dynjax import budget, models, tasks
from dynjax.config import UserError
from dynjax.data import make_source
from dynjax.models.codes import CodesConfig
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.models.pixeltransformer import PixelTransformerConfig
from dynjax.models.vqvae import VQVAEConfig
from dynjax.run import train
from dynjax.tasks.autoregressive import AutoregressiveTask, integers
from experiments import rows

MODEL = PixelCNNConfig(shape=(3, 4, 1), values=4, features=4, layers=1)


def batch(number=3):
    image = np.random.default_rng(0).integers(0, 256, (number, 3, 4, 3), dtype=np.uint8)
    return {"image": image, "label": np.arange(number, dtype=np.int32)}


def test_a_model_that_knows_nothing_takes_the_bits_of_the_values():
    model = jax.tree.map(jnp.zeros_like, make(lambda rngs: models.build(MODEL, 10, rngs=rngs)))
    bits, metrics = jax.jit(AutoregressiveTask().loss)(model, batch(), jax.random.key(0), 0.0)
    assert float(bits) == pytest.approx(2, abs=1e-5) and float(metrics["bits_per_dim"]) == float(bits)


def test_scores_are_of_all_batches_without_the_blank_examples():
    model = make(lambda rngs: models.build(MODEL, 10, rngs=rngs))
    task, whole = AutoregressiveTask(), batch()

    def counted(model, batch):
        batch = task.prepare(model, batch)
        return task.counts(model, task.infer(model, batch), batch)

    counts = jax.jit(counted)(model, whole)
    padded = {name: np.concatenate([value[2:], np.zeros_like(value[:2])]) for name, value in whole.items()}
    padded["label"][1:] = -1
    parts = jax.jit(counted)(model, {name: value[:2] for name, value in whole.items()})
    parts = np.asarray(parts, np.float64) + np.asarray(jax.jit(counted)(model, padded), np.float64)
    found, wanted = task.scores(parts), task.scores(np.asarray(counts))
    assert found["bits_per_dim"] == pytest.approx(wanted["bits_per_dim"], rel=1e-5)
    loss, _ = jax.jit(task.loss)(model, whole, jax.random.key(0), 0.0)
    assert wanted["bits_per_dim"] == pytest.approx(float(loss), rel=1e-5)
    assert np.isnan(task.scores(np.zeros(2))["bits_per_dim"])


def test_pictures_of_another_size():
    config = rows.tiny(rows.get_row("digits_pixelcnn"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, shape=(9, 8, 1)))
    with pytest.raises(UserError, match=r"9x8 and those of data.name=digits8 are 8x8"):
        tasks.make_task(config, make_source(config.data, "train"))


@pytest.mark.parametrize("codes", [False, True])
def test_exits_are_trained_with_some_who_left(codes):
    """Another key is another threshold, and all go on afterwards."""
    prior = PixelTransformerConfig(shape=(4, 4, 1), values=4, features=8, layers=3, heads=2, dynamics="exits")
    vqvae = VQVAEConfig(shape=(4, 4, 1), halvings=1, codes=4, code_features=2, features=4, blocks=0)
    config = CodesConfig(vqvae=vqvae, prior=prior) if codes else prior
    model = make(lambda rngs: models.build(config, 10, rngs=rngs))
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    batch = {"image": jnp.asarray(image), "label": jnp.arange(3)}

    @nnx.jit
    def bits(model, key):
        return AutoregressiveTask().loss(model, batch, key, 0.0)[0]

    found = {float(bits(model, jax.random.key(number))) for number in range(4)}
    assert len(found) > 1
    draws = model.prior if codes else model
    assert {float(gate.threshold[...]) for gate in draws.exits.gates} == {budget.LOWEST}
    predicted = nnx.eval_shape(lambda model, image: model.predictions(integers(model, image)), model, batch["image"])
    assert len(predicted) == 3


def transformer_macs(pixels, features, layers, values):
    """Of a transformer over pixels: without exits, with all heads, and where everybody leaves after the first block."""
    remember = 2 * pixels * features**2  # keys and values, also of who has left
    look = 10 * pixels * features**2 + 2 * pixels**2 * features
    head = pixels * features * values
    static = layers * (remember + look) + head
    full = static + (layers - 1) * head
    return static, full, full - (layers - 1) * look


def test_only_the_model_of_codes_is_counted_and_not_their_encoder():
    config = rows.tiny(rows.get_row("digits_codes_exits"))
    model = make(lambda rngs: models.build(config.model, 10, rngs=rngs))
    _, full, least = transformer_macs(16, 8, 2, 4)
    validate = train.validator(AutoregressiveTask(), make_source(config.data, "val"), config)
    for threshold, macs in ((budget.LOWEST, full), (budget.HIGHEST, least)):
        budget.set_threshold(model, threshold)
        assert validate(model)["macs_fraction"] == pytest.approx(macs / full, rel=1e-6)
