"""What there is to see of pictures that are drawn at once: grids, who took how much compute, distances, sizes.

Letters: N pictures, B examples, H W pixels, C channels, D features.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from dynjax.core import cost, views
from dynjax.core.trace import traced
from dynjax.models.gan import GAN, halved, to_bytes
from dynjax.ops.sampling import AtOnce, Noise
from dynjax.show import film, gallery, report
from dynjax.tasks.distances import Moments, frechet_distance, kernel_distance, manifolds
from dynjax.tasks.features import BATCH, Extractor, features_of
from dynjax.tasks.task import Batch, Shown

GRID, ROW, MOST = 64, 10, 5000
"""Pictures of a grid, of a row, and of which neighbours are looked for at most."""


def keys_of(image: Array) -> Key[Array, " B"]:
    """A random key for each picture of bytes (B, H, W, 3), by its content: the same in whatever batch it comes."""
    flat = image.reshape(image.shape[0], -1).astype(jnp.uint32)
    # Sums modulo 2**32 with odd weights: pictures that differ in a pixel have other keys.
    weights = jax.random.bits(jax.random.key(0), (1, flat.shape[1]), jnp.uint32) | 1
    return jax.vmap(jax.random.key)((flat * weights).sum(1))


def make_noise(model: AtOnce, seed: int, first: int, count: int) -> Noise:
    """All that chance has to say of `count` pictures from number `first` on, whatever batch they are drawn in."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: model.noise(jax.random.fold_in(key, number)))(first + jnp.arange(count))


def labels(model: AtOnce, count: int) -> np.ndarray | None:
    """All classes in turn; None where pictures cannot be asked for by class."""
    return np.arange(count, dtype=np.int32) % model.classes if model.classes else None


def pictures(model: AtOnce, count: int) -> UInt8[np.ndarray, "N H W 3"]:
    """The first pictures of seed 0, of all classes in turn."""
    return np.asarray(_first(*nnx.split(model), count))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _first(graphdef: nnx.GraphDef, state: nnx.State, count: int) -> Array:
    """At the module's level: compiled once for all evaluations of a training."""
    model = nnx.merge(graphdef, state)
    label = labels(model, count)
    return model.picture(make_noise(model, 0, 0, count), None if label is None else jnp.asarray(label))


@dataclasses.dataclass(frozen=True)
class Distances:
    """distances.csv: drawn pictures of a budget beside those of the split, by the features of one extractor."""

    budget: float
    features: str
    pictures: int
    """Of each set that were compared; of neighbours no more than the first MOST."""
    frechet: float
    kernel: float
    kernel_deviation: float
    precision: float
    recall: float
    density: float
    coverage: float


@dataclasses.dataclass(frozen=True)
class Size:
    """sizes.csv: pictures of one of the generator's sizes."""

    height: int
    width: int
    macs: float
    frechet: float
    """Of small pictures and small real ones, both shown as large as the largest (nearest neighbour)."""
    off: float
    """Mean absolute difference from the full picture seen from afar, in units of the brightness' range."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """discriminator.csv: a dynamic discriminator at one threshold."""

    threshold: float
    macs: float
    macs_fraction: float
    """Of those with everything kept."""
    accuracy: float
    """Share of pairs in which the real picture has the higher score."""
    macs_real: float
    macs_drawn: float


@dataclasses.dataclass(frozen=True)
class Look:
    """A pass over a split: what was drawn for its pictures, one for each."""

    real: UInt8[np.ndarray, "N H W 3"]
    drawn: UInt8[np.ndarray, "N H W 3"]
    macs: Float[np.ndarray, " N"]
    sure: Float[np.ndarray, " N"] | None
    """The classifier's probability of the class that it takes the drawn picture for."""


def look(model: nnx.Module, task: Any, batches: Iterable[dict[str, np.ndarray]]) -> Look:
    """Draw as `task` infers, and what each picture took."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch) -> tuple:
        model = nnx.merge(graphdef, state)
        batch = task.prepare(model, batch)
        images, trace = traced(lambda model, batch: task.infer(model, batch))(model, batch)
        shown = to_bytes(images)
        found = task.extractor.probabilities(shown)
        return shown, trace.macs(), None if found is None else found.max(-1)

    parts = []
    for batch in batches:
        found = jax.device_get(run(state, batch))
        parts.append(jax.tree.map(lambda each, batch=batch: each[batch["valid"]], (batch["image"], *found)))
    return Look(*jax.tree.map(lambda *each: np.concatenate(each), *parts))


def distances(extractor: Extractor, seen: Look, budget: float) -> Distances:
    """Every distance of the drawn pictures from the real ones."""
    real, drawn = (
        features_of(extractor, (x[k : k + BATCH] for k in range(0, len(x), BATCH))) for x in (seen.real, seen.drawn)
    )
    kernel = kernel_distance(real, drawn, subsets=20, size=min(1000, max(len(real) // 2, 2)))
    around = manifolds(real[:MOST], drawn[:MOST], min(5, len(real) - 1))
    frechet = frechet_distance(Moments.of(drawn), Moments.of(real))
    return Distances(
        budget, extractor.name, len(real), frechet, kernel.mean, kernel.deviation, *dataclasses.astuple(around)
    )


def plot_compute(path: Path, seen: Look, title: str) -> None:
    """Drawn pictures by what they took: the least, those in the middle, the most."""
    order = np.argsort(seen.macs, kind="stable")
    row, middle = min(ROW, len(order)), max(0, len(order) // 2 - ROW // 2)
    parts = {"least": order[:row], "median": order[middle : middle + row], "most": order[-row:]}
    rows = {name: [(seen.drawn[i], f"{seen.macs[i] / 1e6:.1f} MMAC") for i in chosen] for name, chosen in parts.items()}
    gallery.plot_extremes(path, rows, title=title)


def difficulty(seen: Look) -> str:
    """Whether compute goes to what is hard, in rank correlations; empty where all take the same."""
    sizes = np.array([film.png_bytes(image) for image in seen.drawn[:MOST]])
    with_size = film.rank_correlation(seen.macs[:MOST], sizes)
    if np.isnan(with_size):
        return ""
    said = f"rank correlation of MACs with the size as PNG {with_size:.2f}"
    if seen.sure is not None:
        said += f", with the classifier's doubt {film.rank_correlation(seen.macs, -seen.sure):.2f}"
    return said


def steps(model: GAN, count: int = 8, seed: int = 0, label: np.ndarray | None = None) -> UInt8[np.ndarray, "N T H W 3"]:
    """Pictures after each step, whatever stops; of all classes in turn if no labels (N,) are given."""
    graphdef, state = nnx.split(views.masked(model))
    label = labels(model, count) if label is None else np.resize(label, count)

    @jax.jit
    def run(state: nnx.State) -> Array:
        model = nnx.merge(graphdef, state)
        noise = make_noise(model, seed, 0, count)
        outputs = model.generator.predictions(noise, None if label is None else jnp.asarray(label))
        return jnp.stack([to_bytes(each) for each in outputs], 1)

    return np.asarray(run(state))


def sizes(model: GAN, task: Any, batches: Callable[[], Iterable[dict[str, np.ndarray]]]) -> list[Size]:
    """What the generator gives at each of its sizes."""
    graphdef, state = nnx.split(model)
    found = []
    for size in range(len(model.generator.painters)):
        large = 2**size

        def run(state: nnx.State, batch: Batch, size: int = size, large: int = large) -> tuple:
            model = nnx.merge(graphdef, state)
            batch = task.prepare(model, batch)
            label = jnp.maximum(batch["label"], 0) if model.classes else None
            image, whole = (model.generator(batch["latent"], label, size=k) for k in (size, 0))
            real = model.pixels(batch["image"])
            for _ in range(size):
                whole, real = halved(whole), halved(real)
            off = jnp.abs(image - whole).mean((1, 2, 3)) / 2
            shown = [to_bytes(x).repeat(large, 1).repeat(large, 2) for x in (image, real)]
            return *(task.extractor(x) for x in shown), off

        compiled, parts = jax.jit(run), []
        for batch in batches():
            parts.append([np.asarray(each)[batch["valid"]] for each in compiled(state, batch)])
        drawn, real, off = (np.concatenate(each) for each in zip(*parts, strict=True))
        one = jax.ShapeDtypeStruct((1, model.latent), jnp.float32)
        label = jnp.zeros((1,), jnp.int32) if model.classes else None
        macs = cost.macs(lambda model, z, size=size, label=label: model.generator(z, label, size=size), model, one)
        height, width = (side // large for side in model.shape[:2])
        found.append(
            Size(height, width, macs, frechet_distance(Moments.of(drawn), Moments.of(real)), float(off.mean()))
        )
    return found


def show(folder: Path, shown: Shown, task: Any) -> str:
    """Draw what there is to see of an evaluated model into the folder, and say it in a line."""
    model = shown.model
    assert isinstance(model, GAN)
    seen = look(model, task, shown.batches(shown.source))
    film.save_grid(folder / "drawn.png", pictures(model, GRID))
    found = distances(task.extractor, seen, shown.budget)
    report.write_points(folder / "distances.csv", [found])
    written = ["drawn.png", "distances.csv"]
    if len(set(seen.macs.tolist())) > 1:
        plot_compute(folder / "extremes.png", seen, shown.title)
        written.append("extremes.png")
    if model.refines:
        film.save_film(folder / "steps.png", steps(model))
        written.append("steps.png")
    if task.dynamics == "scales":
        report.write_points(folder / "sizes.csv", sizes(model, task, lambda: shown.batches(shown.source)))
        written.append("sizes.csv")
    if task.dynamics == "discriminator":
        report.write_points(folder / "discriminator.csv", task.judged(model, shown.batches(shown.source)))
        written.append("discriminator.csv")
    what = f"precision {found.precision:.2f}, recall {found.recall:.2f}, coverage {found.coverage:.2f}"
    return "\n".join(filter(None, [" ".join(written), what, difficulty(seen)]))
