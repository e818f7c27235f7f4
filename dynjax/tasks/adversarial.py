"""Drawing by two players: a generator that may stop early, and the discriminator that it learns from.

Letters: B examples, L latent, H W pixels, C channels, S steps, D features, N pictures.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from dynjax.config import BudgetConfig, LossConfig
from dynjax.core import budget, training, views
from dynjax.core.trace import Trace, traced
from dynjax.models.gan import GAN, Generator, halved, to_bytes
from dynjax.tasks import generated
from dynjax.tasks.contest import CONTESTS, augmented, penalty
from dynjax.tasks.distances import Moments, frechet_distance
from dynjax.tasks.features import Extractor
from dynjax.tasks.generated import keys_of
from dynjax.tasks.objective import aim, charge
from dynjax.tasks.task import Batch, Loss, Player, Progress, Scores, Shown

Images = Float[Array, "B _ _ C"]
PENALISED = 4
"""One in so many examples of a batch is looked at for its gradient, whose own gradient is dear."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a generator gives in training."""

    images: list[Images]
    """What the discriminator judges, at every size, the full size first."""
    off: Float[Array, ""]
    """Mean squared distance of pictures with reduced compute from those with all of it, to be kept small."""
    trace: Trace


# What the discriminator judges, by what is dynamic. A batch has all kinds of compute in it, side by side: the sandwich
# rule (Yu & Huang 2019, arXiv:1903.05134, section 3.2), without a second pass through either player, and the whole net
# teaches its parts (in-place distillation, section 3.3). Of steps it is a frozen twin that teaches: were it the last
# step itself, it would be dragged along, until all pictures are one.


def _turns(examples: int, kinds: int) -> list[Float[Array, "B 1 1 1"]]:
    """Which of the examples are of each kind."""
    turn = jnp.arange(examples) % kinds
    return [(turn == kind).astype(jnp.float32)[:, None, None, None] for kind in range(kinds)]


def _plain(model: GAN, latent: Array, label: Array | None, key: PRNGKeyArray) -> Drawn:
    images, trace = traced(lambda model: [model(latent, label)], examples=len(latent))(model.generator)
    return Drawn(images, jnp.float32(0), trace)


def _steps(model: GAN, latent: Array, label: Array | None, key: PRNGKeyArray) -> Drawn:
    """A third of the pictures after all steps, a third after any number of them, a third where the gate says."""
    every, trace = traced(_every_step, examples=len(latent))(model.generator, latent, label)
    (decision,) = trace.decisions.values()
    whole = every[:, -1]
    if decision.place == "tile":  # tiles that have stopped stay in what follows: the last picture is what gates give
        stopped = whole
    else:
        after = jnp.concatenate([decision.keep[:, 1:], jnp.zeros_like(decision.keep[:, :1])], 1)
        stopped = ((decision.keep - after)[:, :, None, None, None].astype(every.dtype) * every).sum(1)
    chance = jax.nn.one_hot(jax.random.randint(key, (len(whole),), 0, every.shape[1]), every.shape[1])
    anywhere = (chance[:, :, None, None, None].astype(every.dtype) * every).sum(1)
    parts = zip(_turns(len(whole), 3), (whole, anywhere, stopped), strict=True)
    assert model.teacher is not None
    goal = jax.lax.stop_gradient(model.teacher(latent, label))
    off = (((every - goal[:, None]) ** 2).mean() + ((stopped - goal) ** 2).mean()) / 2
    judged = jnp.stack([turn.astype(image.dtype) * image for turn, image in parts]).sum(0)
    return Drawn([judged], off, trace)


def _every_step(generator: Generator, latent: Array, label: Array | None) -> Float[Array, "B S H W C"]:
    return jnp.stack(generator.predictions(latent, label), 1)


def _width(model: GAN, latent: Array, label: Array | None, key: PRNGKeyArray) -> Drawn:
    """Half of the pictures at full width, half at that of the gates."""
    narrow, trace = traced(lambda model: model(latent, label), examples=len(latent))(model.generator)
    whole = nnx.view(model.generator, width=1.0)(latent, label)
    first, second = _turns(len(whole), 2)
    judged = first.astype(whole.dtype) * whole + second.astype(whole.dtype) * narrow
    return Drawn([judged], ((narrow - jax.lax.stop_gradient(whole)) ** 2).mean(), trace)


def _scales(model: GAN, latent: Array, label: Array | None, key: PRNGKeyArray) -> Drawn:
    """Every picture at every size; small ones are to be the large one, seen from afar."""
    images, trace = traced(lambda model: model.sizes(latent, label), examples=len(latent))(model.generator)
    off, goal = [], jax.lax.stop_gradient(images[0])
    for image in images[1:]:
        goal = halved(goal)
        off.append(((image - goal) ** 2).mean())
    return Drawn(images, jnp.stack(off).mean(), trace)


DRAWS: dict[str, Callable[..., Drawn]] = {"steps": _steps, "width": _width, "scales": _scales}


def latents(image: UInt8[Array, "B H W 3"], size: int) -> Float[Array, "B L"]:
    """A latent for each picture of a split, whatever batch it is in."""
    return jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys_of(image))


def _scores(model: GAN, images: list[Images], label: Array | None) -> Float[Array, "B sizes"]:
    return jnp.stack([model.discriminator(image, label, size=size) for size, image in enumerate(images)], 1)


@dataclasses.dataclass(frozen=True)
class AdversarialTask:
    """Two players (see `Task`): batches are {"image" (B, H, W, 3), "label" (B,)}.

    The score is the Fréchet distance between pictures that are drawn, as many as the split has, and those of the split.
    It depends on extractor and number of pictures.
    """

    losses: LossConfig
    dynamics: str
    """Of the model's configuration."""
    extractor: Extractor
    reference: Moments
    """Of the features of the split that is evaluated."""
    budget: BudgetConfig | None = None

    score: ClassVar[str] = "frechet"
    percent: ClassVar[bool] = False
    timed: ClassVar[tuple[int, ...]] = (1, 32)

    @property
    def score_name(self) -> str:
        return self.extractor.distance_name

    @property
    def players(self) -> tuple[Player, ...]:
        def belongs(name: str) -> nnx.filterlib.Filter:
            return lambda path, _: bool(path) and path[0] == name

        return (
            Player("discriminator", self.discriminator_loss, belongs("discriminator")),
            Player("generator", self.generator_loss, belongs("generator")),
        )

    def _draw(self, model: GAN, label: Array | None, examples: int, key: PRNGKeyArray) -> Drawn:
        first, second = jax.random.split(key)
        latent = jax.random.normal(first, (examples, model.latent))
        return DRAWS.get(self.dynamics, _plain)(model, latent, label, second)

    def _real(self, model: GAN, batch: Batch, sizes: int) -> list[Images]:
        images = [model.pixels(batch["image"])]
        for _ in range(sizes - 1):
            images.append(halved(images[-1]))
        return images

    def discriminator_loss(self, model: GAN, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        """The contest's loss, the penalty of its gradients and, of a dynamic one, of what it costs."""
        training.schedule(model.discriminator, progress)
        label, keys = _label(model, batch), jax.random.split(key, 6)
        of_discriminator = self.budget if self.dynamics == "discriminator" else None
        drawn = self._draw(model, label, len(batch["image"]), keys[0]).images
        target = aim(model, of_discriminator, keys[5])
        real = self._real(model, batch, len(drawn))
        strength = self.losses.augment
        drawn = [augmented(jax.lax.stop_gradient(each), strength, keys[1]) for each in drawn]
        real = [augmented(each, strength, keys[2]) for each in real]
        both = [jnp.concatenate(pair) for pair in zip(real, drawn, strict=True)]
        twice = None if label is None else jnp.concatenate([label, label])
        scores, trace = traced(lambda model: _scores(model, both, twice), examples=len(both[0]))(model)
        of_real, of_drawn = jnp.split(scores, 2)
        contest = CONTESTS[self.losses.adversarial].discriminator(of_real, of_drawn)
        steep = self._steepness(model, real, drawn, label, keys[3])
        costly, spent = charge(model.discriminator, of_discriminator, trace, target, progress)
        loss = contest + self.losses.gradient_penalty * steep + costly
        accuracy = (of_real > of_drawn).mean()
        return _told(loss, contest=contest, steepness=steep, accuracy=accuracy, budget_loss=costly, **spent)

    def _steepness(
        self, model: GAN, real: list[Images], drawn: list[Images], label: Array | None, key: PRNGKeyArray
    ) -> Float[Array, ""]:
        if not self.losses.gradient_penalty:
            return jnp.float32(0)
        # Without noise, which a function that is differentiated could not draw.
        still = views.still(model.discriminator)
        few = None if label is None else label[::PENALISED]
        found = []
        for size, images in enumerate(zip(real, drawn, strict=True)):
            score = functools.partial(still, label=few, size=size)
            some, others = (x[::PENALISED] for x in images)
            found.append(penalty(self.losses.adversarial, score, some, others, key))
        return jnp.stack(found).mean()

    def generator_loss(self, model: GAN, batch: Batch, key: PRNGKeyArray, progress: Progress) -> Loss:
        """The contest's loss, what reduced compute is off, and what it costs."""
        training.schedule(model.generator, progress)
        label, keys = _label(model, batch), jax.random.split(key, 4)
        spends = None if self.dynamics == "discriminator" else self.budget
        target = aim(model, spends, keys[3])
        found = self._draw(model, label, len(batch["image"]), keys[0])
        judge = views.still(model)
        real = [augmented(each, self.losses.augment, keys[2]) for each in self._real(model, batch, len(found.images))]
        drawn = [augmented(each, self.losses.augment, keys[1]) for each in found.images]
        of_real, of_drawn = _scores(judge, real, label), _scores(judge, drawn, label)
        contest = CONTESTS[self.losses.adversarial].generator(of_real, of_drawn)
        costly, spent = charge(model.generator, spends, found.trace, target, progress)
        loss = contest + self.losses.distillation * found.off + costly
        return _told(loss, contest=contest, off=found.off, budget_loss=costly, **spent)

    # Evaluation

    def prepare(self, model: GAN, batch: Batch) -> Batch:
        """The batch with "latent", one for each of its pictures."""
        return {**batch, "latent": latents(batch["image"], model.latent)}

    def infer(self, model: GAN, batch: Batch) -> Images:
        """As many pictures as the batch has, of its classes."""
        return model.generator(batch["latent"], _label(model, batch))

    def counts(self, model: GAN, output: Images, batch: Batch) -> Float[Array, " sums"]:
        """Number, sums and outer products of the drawn pictures' features, and how often a real picture has the higher
        score; blank examples, with label -1, are not in them."""
        valid = (batch["label"] >= 0).astype(jnp.float32)
        features = self.extractor(to_bytes(output)) - jnp.asarray(self.reference.mean, jnp.float32)[None]
        scores = [
            _scores(model, [image], _label(model, batch))[:, 0] for image in (model.pixels(batch["image"]), output)
        ]
        right = (scores[0] > scores[1]).astype(jnp.float32)
        weighed = features * valid[:, None]
        parts = [valid.sum()[None], (right @ valid)[None], weighed.sum(0), (weighed.T @ features).reshape(-1)]
        return jnp.concatenate(parts)

    def scores(self, counts: np.ndarray) -> Scores:
        """`frechet`, `discriminator` (share of pairs in which the real picture has the higher score) and `diversity`
        (the features' variance as a share of that of real pictures)."""
        number, right, *rest = np.asarray(counts, np.float64)
        features = len(self.reference.mean)
        if number < 2:
            return {"frechet": np.nan, "discriminator": np.nan, "diversity": np.nan}
        total, outer = np.array(rest[:features]), np.array(rest[features:]).reshape(features, features)
        found = Moments.of_sums(number, total, outer)
        found = dataclasses.replace(found, mean=found.mean + self.reference.mean)
        return {
            "frechet": frechet_distance(found, self.reference),
            "discriminator": float(right / number),
            "diversity": float(np.trace(found.covariance) / np.trace(self.reference.covariance)),
        }

    def trouble(self, scores: Scores, before: Scores | None) -> str:
        """What has gone wrong since an evaluation before, in words: pictures all alike, or ever less real."""
        if before is None:
            return ""
        if scores["diversity"] < 0.1 < 0.3 < before["diversity"]:
            what = f"{before['diversity']:.0%} of the real ones' before, {scores['diversity']:.0%} now"
            return f"the generator has collapsed: the diversity of its pictures was {what}"
        if scores["frechet"] > 20 * max(before["frechet"], 1.0):
            what = f"was {before['frechet']:.1f} and is {scores['frechet']:.1f}"
            return f"the generator has diverged: {self.score_name} {what}"
        return ""

    def remarks(self, scores: Scores, spent: float) -> list[str]:
        """A discriminator that nothing deceives, pictures nearly alike, gates that do not follow the budget."""
        found = []
        if scores["discriminator"] > 0.995:
            found.append(
                f"the discriminator ranks {scores['discriminator']:.1%} of the real pictures above drawn ones: if that "
                "stays so, the generator learns little; a larger --loss.gradient-penalty may help"
            )
        if scores["diversity"] < 0.2:
            found.append(f"drawn pictures are nearly alike: {scores['diversity']:.0%} of the real ones' diversity")
        if self.budget is not None and self.dynamics in ("steps", "width"):
            target = self.budget.target
            if abs(spent - target) > 0.3:
                found.append(f"gates do not follow the budget: {spent:.0%} of the MACs at a target of {target:.0%}")
        return found

    def pictures(self, model: GAN, count: int = 64) -> UInt8[np.ndarray, "N H W 3"]:
        """The first pictures of seed 0, of all classes in turn."""
        return generated.pictures(model, count)

    def judged(self, model: GAN, batches: Iterable[dict[str, np.ndarray]]) -> list[generated.Judged]:
        """How a dynamic discriminator tells pictures of a split from drawn ones, over thresholds of its gates."""
        graphdef, state = nnx.split(views.still(model))

        @jax.jit
        def run(state: nnx.State, batch: Batch, threshold: Array) -> tuple:
            model = nnx.merge(graphdef, state, copy=True)
            label = _label(model, batch)
            drawn = model.generator(latents(batch["image"], model.latent), label)
            budget.set_threshold(model.discriminator, threshold)
            judge = traced(lambda model, images: _scores(model, [images], label)[:, 0])
            (real, of_real), (fake, of_drawn) = (judge(model, x) for x in (model.pixels(batch["image"]), drawn))
            return real > fake, of_real.macs(), of_drawn.macs(), jnp.float32(of_real.full_macs)

        kept, found = list(batches), []
        for threshold in (budget.LOWEST, *np.arange(-4.0, 5.0)):
            parts = [jax.device_get(run(state, batch, jnp.float32(threshold))) for batch in kept]
            valid = [batch["valid"] for batch in kept]
            right, of_real, of_drawn = (
                float(np.concatenate([part[k][v] for part, v in zip(parts, valid, strict=True)]).mean())
                for k in range(3)
            )
            whole, spent = float(parts[0][3]), (of_real + of_drawn) / 2
            found.append(generated.Judged(float(threshold), spent, spent / whole, right, of_real, of_drawn))
        return found

    def show(self, folder: Path, shown: Shown) -> str:
        return generated.show(folder, shown, self)


def _told(loss: Array, **metrics: Array | float) -> Loss:
    return loss, {name: jnp.asarray(value, jnp.float32) for name, value in {"loss": loss, **metrics}.items()}


def _label(model: GAN, batch: Batch) -> Int[Array, " B"] | None:
    """Labels of conditional pictures; blank examples draw the first class. Raises ValueError where there are none."""
    if not model.classes:
        return None
    if "label" not in batch:
        raise ValueError(f"the batch has {', '.join(batch)}: pictures of {model.classes} classes are drawn by label")
    return jnp.maximum(batch["label"], 0)
