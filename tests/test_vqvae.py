"""The VQ-VAE and the model of its codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import make
from flax import nnx

from dynjax import models
from dynjax.config import UserError
from dynjax.models import vqvae
from dynjax.models.blocks import as_bytes, gather_pixels, spread_pixels
from dynjax.models.codes import CodesConfig
from dynjax.models.pixelcnn import PixelCNNConfig
from dynjax.models.pixeltransformer import PixelTransformerConfig
from dynjax.models.vqvae import VQVAEConfig
from dynjax.ops import sampling
from dynjax.tasks.reconstruction import ReconstructionTask

SMALL = VQVAEConfig(shape=(8, 12, 1), halvings=2, codes=5, code_features=3, features=4, blocks=1)
PRIORS = {
    "pixelcnn": PixelCNNConfig(features=4, layers=1),
    "transformer": PixelTransformerConfig(features=8, layers=1, heads=2),
}


def pictures(number=3, shape=(8, 12)):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (number, *shape, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def coder():
    return make(lambda rngs: models.build(SMALL, 10, rngs=rngs))


def test_the_nearest_vector_and_the_first_of_equals():
    book = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    z = jnp.array([[[[0.9, 0.2], [0.1, 0.9], [-1.0, -2.0]]]])
    assert vqvae.nearest(z, book).tolist() == [[[0, 1, 0]]]


def test_scatter_is_the_inverse_of_gather():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(spread_pixels(gather_pixels(x), 2), x)


def test_the_losses_are_those_of_the_paper(coder):
    image = pictures()
    found = jax.jit(lambda model, x: model(x))(coder, image)
    z = np.asarray(coder._vectors(coder.pixels(image)))
    book = np.asarray(vqvae.unit(coder.codebook[...]))
    distance = ((z[..., None, :] - book) ** 2).sum(-1)
    np.testing.assert_array_equal(found.codes, distance.argmin(-1))
    assert float(found.codebook) == pytest.approx(float(distance.min(-1).mean() / 3), rel=1e-4)
    assert float(found.commitment) == pytest.approx(float(found.codebook), rel=1e-6)
    np.testing.assert_array_equal(coder.encode(image), found.codes)
    np.testing.assert_array_equal(as_bytes(found.image), coder.decode(found.codes))


def test_gradients_go_past_the_codes_to_the_encoder_and_each_loss_moves_its_own(coder):
    def of(part):
        return nnx.grad(lambda model: getattr(model(pictures()), part).sum())(coder)

    image, codebook, commitment = of("image"), of("codebook"), of("commitment")
    norm = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert norm(image["enter"]) > 0 and norm(image["codebook"]) == 0
    assert norm(codebook["codebook"]) > 0 and norm(codebook["enter"]) == 0
    assert norm(commitment["enter"]) > 0 and norm(commitment["codebook"]) == 0


def test_scores_are_of_all_pictures_without_the_blank_ones(coder):
    task, image = ReconstructionTask(), pictures()
    batch = {"image": image, "label": np.array([3, 1, -1])}
    counts = np.asarray(jax.jit(lambda m, b: task.counts(m, task.infer(m, b), b))(coder, batch), np.float64)
    found = coder(image[:2])
    error = np.asarray((found.image - coder.pixels(image[:2])) ** 2)
    scores = task.scores(counts)
    assert scores["mse"] == pytest.approx(error.mean(), rel=1e-4)
    assert scores["psnr"] == pytest.approx(-10 * np.log10(error.mean()), rel=1e-4)
    assert counts[2:].sum() == 2 * 2 * 3 and 1 <= scores["perplexity"] <= 5
    assert np.isnan(task.scores(np.zeros(7))["psnr"])
    even = task.scores(np.array([1.0, 10.0, 4, 4, 4, 4, 4]))
    assert even["perplexity"] == pytest.approx(5) and even["psnr"] == pytest.approx(10)


def test_pictures_that_cannot_be_halved():
    with pytest.raises(UserError, match=r"--model\.halvings is 2: it must be such that 6x12 pixels"):
        models.build(VQVAEConfig(shape=(6, 12, 1)), 10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("prior", PRIORS)
def test_codes_are_of_the_given_vqvae_which_does_not_learn(coder, prior):
    config = CodesConfig(vqvae=SMALL, prior=PRIORS[prior])
    model = models.build(config, 10, rngs=nnx.Rngs(0), twin_params=nnx.state(coder, nnx.Param))
    image = pictures()
    assert model.shape == (2, 3, 1) and model.likelihood.values == 5
    np.testing.assert_array_equal(model.encode(image)[..., 0], coder.encode(image))
    np.testing.assert_array_equal(model.decode(model.encode(image)), coder.decode(coder.encode(image)))
    learns = nnx.state(model, nnx.Param)
    assert "coder" not in learns and jax.tree.leaves(learns["prior"])
    assert model(model.encode(image)).shape == (3, 2, 3, 5)


@pytest.mark.parametrize("prior", PRIORS)
def test_samplers_draw_the_same_codes(prior):
    config = CodesConfig(vqvae=SMALL, prior=PRIORS[prior])
    model = make(lambda rngs: models.build(config, 10, rngs=rngs)).prior
    noise = sampling.make_noise(model, jax.random.key(0), 3)
    drawn = [
        nnx.jit(lambda model, noise, name=name: sampling.SAMPLERS[name](model, noise))(model, noise)
        for name in ("pixel", "cached", "fixed-point")
    ]
    for other in drawn[1:]:
        np.testing.assert_array_equal(drawn[0].image, other.image)


def test_families():
    assert models.task_of(SMALL) == "reconstruction"
    codes = CodesConfig(SMALL, PixelCNNConfig())
    assert models.task_of(codes) == "autoregressive" and codes.shape == SMALL.shape
    assert models.difference(SMALL, codes) == ""
    other = VQVAEConfig(shape=(8, 12, 1), codes=6)
    assert "is 6 there and 5 here" in models.difference(other, codes)
