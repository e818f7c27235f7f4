"""Pictures of models that draw them at once, GANs and VAEs: what `experiments.sample` does with these."""

import csv
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt8
from tqdm.auto import tqdm

from dynjax.config import Config, UserError
from dynjax.core import views
from dynjax.core.budget import LOWEST, set_threshold
from dynjax.core.trace import traced
from dynjax.models.gan import GAN
from dynjax.ops.sampling import AtOnce
from dynjax.run import checkpoint, files
from dynjax.run.evaluate import solve, static_macs, steers
from dynjax.run.workdir import read_config
from dynjax.show import film, gallery
from dynjax.tasks.generated import labels, make_noise, steps
from experiments import cli
from experiments.evaluate import fresh_twin, told

CALIBRATION, CALIBRATION_FIRST = 256, 2**30
"""Pictures on which the threshold is solved; their numbers are beyond those of all that are kept."""
FILMED = 8


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for."""

    workdir: str
    out: str
    budget: float | None
    number: int
    seed: int
    label: int | None
    batch: int
    size: int | None
    """Height in pixels; None is the full size."""
    check: bool
    """Draw everything once more without skipping, and count the pixels that differ."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures, and what each took."""

    images: UInt8[np.ndarray, "N H W 3"]
    macs: np.ndarray
    milliseconds: np.ndarray


def size_of(wanted: Wanted, model: AtOnce, row: str) -> int:
    """How often pictures are halved for the height that is asked for. Raises UserError."""
    heights = model.heights
    if wanted.size is None:
        return 0
    if wanted.size not in heights:
        told = ", ".join(map(str, sorted(heights)))
        hint = "" if len(heights) > 1 else "; rows *_gan_scales have several"
        raise UserError(f"--size {wanted.size}: row {row} draws pictures of {told} pixels{hint}")
    return heights.index(wanted.size)


def label_of(wanted: Wanted, model: AtOnce, row: str) -> np.ndarray | None:
    """The class of every picture (N,); None where there is none to ask for. Raises UserError."""
    if wanted.label is None:
        return labels(model, wanted.number)
    if not model.classes:
        raise UserError(f"--class {wanted.label}: row {row} was not trained by class")
    if not 0 <= wanted.label < model.classes:
        raise UserError(f"--class {wanted.label}: row {row} has the classes 0 to {model.classes - 1}")
    return np.full(wanted.number, wanted.label, np.int32)


def inputs(model: AtOnce, label: np.ndarray | None, seed: int, first: int, count: int) -> tuple[Any, Array | None]:
    """Noise and labels of `count` pictures from number `first` on."""
    given = None if label is None else jnp.asarray(np.resize(label[first : first + count], count))
    return make_noise(model, seed, first, count), given


def within_budget(wanted: Wanted, model: Any, run: Callable, config: Config, classes: int) -> tuple[Any, str]:
    """The model, compact, at the threshold that meets the budget on pictures that are not kept; and what it came to.

    Raises UserError.
    """
    compact = nnx.clone(views.compact(model))
    if wanted.budget is None or not steers(model):
        if wanted.budget is not None and wanted.budget < 1:
            raise UserError(f"--budget {wanted.budget:g}: row {config.row} has no gates that a budget could move")
        set_threshold(compact, LOWEST)
        return compact, ""
    some = labels(model, CALIBRATION)
    if wanted.label is not None:
        some = np.full(CALIBRATION, wanted.label, np.int32)
    noise = make_noise(model, wanted.seed, CALIBRATION_FIRST, CALIBRATION)
    batches = [
        jax.tree.map(lambda each, k=k: jnp.asarray(each[k : k + 64]), (noise, some)) for k in range(0, CALIBRATION, 64)
    ]
    twin = static_macs(fresh_twin(config, classes), jax.eval_shape(lambda: batches[0]), run)
    deployed = solve(model, twin, [wanted.budget], batches, run)[wanted.budget]
    return deployed.model, told(wanted.budget, deployed.report, twin)


def draw(model: Any, run: Callable, wanted: Wanted, label: np.ndarray | None, name: str) -> Drawn:
    """All pictures in batches, each batch timed after one that compiles; the MACs are read off a masked run of each."""
    graphdef, state = nnx.split(model)
    masked_def, masked_state = nnx.split(views.masked(model))
    program = jax.jit(lambda state, given: run(nnx.merge(graphdef, state), given))
    spent = jax.jit(lambda state, given: traced(run)(nnx.merge(masked_def, state), given)[1].macs())
    batch, images, macs, took = min(wanted.batch, wanted.number), [], [], []
    jax.block_until_ready(program(state, inputs(model, label, wanted.seed, 0, batch)))
    for first in tqdm(range(0, wanted.number, batch), desc=name, unit="batch", disable=None):
        given = jax.block_until_ready(inputs(model, label, wanted.seed, first, batch))
        began = time.perf_counter()
        images.append(np.asarray(program(state, given)))
        took += [1e3 * (time.perf_counter() - began) / batch] * batch
        macs.append(np.asarray(spent(masked_state, given)))
    count = wanted.number
    return Drawn(np.concatenate(images)[:count], np.concatenate(macs)[:count], np.array(took)[:count])


def generate(wanted: Wanted) -> None:
    """Draw, and write grid.png, pictures/, film.png, compute.png and compute.csv into the folder; say what it took.

    Raises UserError.
    """
    config, model, step = checkpoint.load(wanted.workdir)
    _, classes = read_config(wanted.workdir)
    assert isinstance(model, AtOnce)
    size, label = size_of(wanted, model, config.row), label_of(wanted, model, config.row)
    run = functools.partial(picture, size=size)
    chosen, met = within_budget(wanted, model, run, config, len(classes))
    out = cli.make_folder(wanted.out, "out")
    drawn = draw(chosen, run, wanted, label, config.row)
    flips = None
    if wanted.check:
        other = draw(views.masked(chosen), run, wanted, label, "without skipping")
        flips = (drawn.images != other.images).any(-1).sum((1, 2))
    png = np.array([film.png_bytes(image) for image in drawn.images])
    correlation = film.rank_correlation(drawn.macs, png)
    unknown = [""] * wanted.number
    columns = {
        "picture": range(wanted.number),
        "label": unknown if label is None else label,
        "macs": [round(float(each)) for each in drawn.macs],
        "ms": [f"{each:.3f}" for each in drawn.milliseconds],
        "png_bytes": png,
        "flipped": unknown if flips is None else flips,
        "rank_correlation": [f"{correlation:.4f}"] * wanted.number,
    }
    title, written = f"{config.row}, step {step}, seed {wanted.seed}", ["grid.png", "pictures/", "compute.csv"]
    with files.writing(f"in {out}"):
        film.save_grid(out / "grid.png", drawn.images)
        (out / "pictures").mkdir(exist_ok=True)
        for number, image in enumerate(drawn.images):
            (out / "pictures" / f"{number:04d}.png").write_bytes(film.png(image))
        if len(set(drawn.macs.tolist())) > 1:
            gallery.plot_grid(out / "compute.png", drawn.images[:64], drawn.macs[:64], title=title)
            written.append("compute.png")
        if isinstance(model, GAN) and not size and model.refines:
            film.save_film(out / "film.png", steps(model, FILMED, wanted.seed, label))
            written.append("film.png")
        with open(out / "compute.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
    mean, least, most = (value / 1e6 for value in (drawn.macs.mean(), drawn.macs.min(), drawn.macs.max()))
    if met:
        print(met)
    print(f"{title}: {wanted.number} pictures, {drawn.milliseconds.mean():.2f} ms each in batches of {wanted.batch}")
    print(f"{mean:.2f} MMAC a picture ({least:.2f} to {most:.2f})")
    if flips is not None:
        print(f"{int(flips.sum())} of {drawn.images[..., 0].size} pixels differ from those without skipping")
    if correlation == correlation:
        print(f"rank correlation of MACs with the size as PNG: {correlation:.2f}")
    print(f"{out}: {' '.join(written)}")


def picture(model: AtOnce, given: tuple[Any, Array | None], *, size: int) -> UInt8[Array, "B H W 3"]:
    noise, label = given
    return model.picture(noise, label, size=size)
