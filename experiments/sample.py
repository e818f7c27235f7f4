"""Draw pictures: python -m experiments.sample --workdir W --sampler fixed-point --n 64 --out DIR [--seed 0]

Samplers: pixel (the whole model for every pixel), cached (one pixel of every layer), fixed-point (many pixels at once,
until none changes). All three are exact: the seed fixes the noise, and the same noise is the same grid.png, but where
rounding flips a pixel; --check counts such.
Rows *_nextscale have a sampler of their own, coarse-to-fine, with a dial: --budget is the share of the static twin's
MACs that pictures may take on average, solved on pictures that the model draws itself. Rows *_exits have the same dial,
under which every pixel takes blocks until its prediction is sure, whatever the sampler.
--label 3 asks a conditional row for one class; --complete gives the upper half of pictures of the test set.
Of rows *_codes the codes are drawn, and decoded: what is said of pixels is then said of codes.

Rows *_gan_* and *_vae_* make a picture of noise at once, without a sampler: --budget as above, --class K of those that
are asked for by class, --size 16 of *_gan_scales. They write grid.png, pictures/NUMBER.png, compute.csv (per picture:
label, MACs, milliseconds, size as PNG, pixels that differ from those without skipping), and where pictures differ in
compute compute.png; film.png has the refinement steps of *_gan_steps.

Writes DIR/grid.png, film.png (how the first ones come to be), calls.png (how often each pixel was evaluated, of *_exits
the blocks that it took), and calls.csv (per picture: label, calls or refined tiles, evaluations per pixel, MACs where a
budget steers, milliseconds, size as PNG, pixels that differ).
"""

import csv
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm.auto import tqdm

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.core import views
from dynjax.core.budget import LOWEST, set_threshold
from dynjax.core.decision import PREFIX
from dynjax.core.trace import traced
from dynjax.data import make_source
from dynjax.data.source import size_of
from dynjax.models.likelihoods import Encodes, OfIntegers, to_bytes
from dynjax.ops.sampling import SAMPLERS, InScales, Known, Sampled, make_noise
from dynjax.run import checkpoint, files
from dynjax.run.evaluate import solve, static_macs, steers
from dynjax.run.workdir import read_config
from dynjax.show import film
from dynjax.tasks.autoregressive import integers
from experiments import cli
from experiments.evaluate import Place, fresh_twin, told, with_path
from experiments.generate import Wanted, generate

T = TypeVar("T")
COMMAND = "experiments.sample"
FILMED, MOMENTS, SHOWN = 6, 10, 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    workdir: str
    """Folder of a training run."""
    out: str
    """Folder for the results; made when it is missing."""
    sampler: Literal["pixel", "cached", "fixed-point", "coarse-to-fine"] | None = None
    """That of the row when it is not given: coarse-to-fine of *_nextscale, fixed-point of the others."""
    budget: float | None = None
    """Share of the static twin's MACs that a picture may take on average, of a model with gates or exits;
    when it is not given, everything is kept, which with gates and heads is a little more than the twin."""
    n: int = 64
    """Number of pictures."""
    seed: int = 0
    """Fixes the noise."""
    label: Annotated[int | None, tyro.conf.arg(aliases=["--class"])] = None
    """Class of all pictures, of a conditional row; else every class in turn, or those of the pictures to complete."""
    size: int | None = None
    """Height in pixels of the pictures of a row that draws several sizes (*_gan_scales); the full size otherwise."""
    complete: bool = False
    """Give the upper half of pictures of the test set."""
    batch_size: int = 1
    """Pictures drawn at once. At 1 the milliseconds are each picture's own, otherwise its share of the batch's."""
    window: int | None = None
    """Rows (transformer: pixels) that fixed-point draws at once; the family's own when it is not given."""
    check: Literal["none", "cached", "pixel"] = "cached"
    """Exact sampler that draws the pictures once more, to count the pixels that differ. Of coarse-to-fine, which has no
    exact one beside it, and of models that draw at once, the masked execution, which computes everything, does; none
    turns it off."""
    data: Place = dataclasses.field(default_factory=Place)


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    cli.check_least(arguments, "n", "batch_size", "window", "size")
    if arguments.window is not None and arguments.sampler not in (None, "fixed-point"):
        raise UserError(f"--window is of --sampler fixed-point; {arguments.sampler} has none")
    if arguments.budget is not None and not 0 < arguments.budget <= 1:
        raise UserError(f"--budget {arguments.budget:g} must be a share of the static twin's MACs in (0, 1]")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} must be in 0 to 4294967295")


def labels_of(arguments: Arguments, config: Config, classes: int) -> np.ndarray | None:
    """The class of every picture (N,), or None for a row without. Raises UserError."""
    if not classes:
        if arguments.label is not None:
            raise UserError(f"--label {arguments.label}: row {config.row} was not trained by label")
        return None
    if arguments.label is None:
        return np.arange(arguments.n, dtype=np.int32) % classes
    if not 0 <= arguments.label < classes:
        raise UserError(f"--label {arguments.label}: row {config.row} has the classes 0 to {classes - 1}")
    return np.full(arguments.n, arguments.label, np.int32)


def given_of(arguments: Arguments, config: Config, model: OfIntegers) -> tuple[Known, np.ndarray]:
    """Pictures of test of which the upper half is given, or their codes, and their labels (N,)."""
    source = make_source(with_path(config, arguments.data.path).data, "test")
    if size_of(source) != (shape := config.model.shape[:2]):
        raise UserError(f"--complete: row {config.row} draws {shape} pixels, test has {size_of(source)}")
    chosen = [source[index % len(source)] for index in range(arguments.n)]
    image = np.asarray(integers(model, jnp.asarray(np.stack([each["image"] for each in chosen]))))
    upper = np.arange(model.shape[0])[:, None] < model.shape[0] // 2
    return Known(image, np.broadcast_to(upper, image.shape[:3])), np.array([x["label"] for x in chosen], np.int32)


def sampler(name: str, window: int | None = None) -> Callable[..., Sampled]:
    """One of SAMPLERS; all but fixed-point disregard `limit`."""
    if name == "fixed-point":
        return functools.partial(SAMPLERS[name], window=window)
    return lambda model, noise, *, limit, **given: SAMPLERS[name](model, noise, **given)


def make_draw(model: OfIntegers, sample: Callable[..., T], seed: int, batch: int) -> Callable[..., T]:
    """`draw(first, label, known, limit)`: what `sample` gives of a batch from picture number `first` on, compiled."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, first, label, known, limit):
        model = nnx.merge(graphdef, state)
        noise = make_noise(model, jax.random.key(seed), batch, first)
        return sample(model, noise, label=label, known=known, limit=limit)

    return lambda first, label, known, limit=2**30: jax.block_until_ready(run(state, first, label, known, limit))


CALIBRATION = 256
"""Pictures that the model draws to solve its threshold on; their numbers are beyond those of all that are kept."""


def within_budget(model: OfIntegers, budget: float | None, seed: int, config: Config, classes: int) -> OfIntegers:
    """The model, compact, whose pictures take a share `budget` of the static twin's MACs on average; None keeps all.

    Raises UserError.
    """
    if not steers(model):
        if budget is not None and budget < 1:
            raise UserError(f"--budget {budget:g}: row {config.row} has no gates and no exits that a budget could move")
        return model
    if budget is None:
        model = nnx.clone(views.compact(model))
        set_threshold(model, LOWEST)
        return model
    twin = static_macs(fresh_twin(config, classes), jax.ShapeDtypeStruct((1, *model.shape), np.int32))
    size = CALIBRATION // 4
    label = np.arange(size, dtype=np.int32) % model.classes if model.classes else None
    draw = make_draw(model, sampler("coarse-to-fine" if isinstance(model, InScales) else "cached"), seed, size)
    drawn = [jax.device_get(draw(2**30 + k * size, label, None).image) for k in range(4)]
    found = solve(model, twin, [budget], drawn)[budget]
    print(told(budget, found.report, twin))
    return found.model


def spent_on(model: OfIntegers, images: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray | None]:
    """MACs that each picture (N, H, W, C) of a model with a budget took, (N,), and of a model with exits the blocks of
    each pixel (N, H, W), else None: they are a function of the picture."""
    graphdef, state = nnx.split(views.masked(model))

    @jax.jit
    def run(state, x):
        trace = traced(nnx.merge(graphdef, state))(x)[1]
        blocks = [each.keep.sum(-1) for each in trace.decisions.values() if (each.place, each.rule) == ("tile", PREFIX)]
        return trace.macs(), *blocks

    index = [np.minimum(np.arange(k, k + batch), len(images) - 1) for k in range(0, len(images), batch)]
    macs, *blocks = (
        np.concatenate(each)[: len(images)] for each in zip(*(run(state, images[i]) for i in index), strict=True)
    )
    return macs, blocks[0].astype(int) if blocks else None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be drawn, by which model, and how."""

    arguments: Arguments
    model: OfIntegers
    to_pictures: Callable[[jax.Array], jax.Array]
    """Of what the model draws, pixels or codes."""
    label: np.ndarray | None
    given: Known | None

    @property
    def batch(self) -> int:
        return min(self.arguments.batch_size, self.arguments.n)

    @property
    def refines(self) -> bool:
        return self.arguments.sampler == "coarse-to-fine"

    def part(self, first: int, size: int) -> tuple[int, np.ndarray | None, Known | None]:
        """What a batch is drawn from; the last one is filled up with pictures that are drawn and not kept."""
        index = np.minimum(np.arange(first, first + size), self.arguments.n - 1)
        return first, *jax.tree.map(lambda each: each[index], (self.label, self.given))

    def draw(self, model: OfIntegers, name: str) -> tuple[Sampled, np.ndarray]:
        """What a sampler gives of all pictures, and the milliseconds of each."""
        number, batch, found, took = self.arguments.n, self.batch, [], []
        draw = make_draw(model, sampler(name, self.arguments.window), self.arguments.seed, batch)
        draw(*self.part(0, batch))  # compiles
        for first in tqdm(range(0, number, batch), desc=name, unit="batch", disable=None):
            began = time.perf_counter()
            found.append(jax.device_get(draw(*self.part(first, batch))))
            took += [1e3 * (time.perf_counter() - began) / batch] * batch
        return jax.tree.map(lambda *each: np.concatenate(each)[:number], *found), np.array(took[:number])

    def flips(self, drawn: Sampled) -> np.ndarray | None:
        """How many pixels of each picture another way of drawing has otherwise (N,); None where none is asked for."""
        check = self.arguments.check
        if check in ("none", self.arguments.sampler):
            return None
        model = views.masked(self.model) if self.refines else self.model
        other, _ = self.draw(model, "coarse-to-fine" if self.refines else check)
        return (drawn.image != other.image).any(-1).sum((1, 2))

    def films(self, drawn: Sampled, images: np.ndarray) -> np.ndarray:
        """How the first pictures come to be, (N, T, H, W, 3)."""
        return np.stack([self._film(index, drawn, images) for index in range(min(FILMED, self.arguments.n))])

    @functools.cached_property
    def _moments(self) -> Callable[..., list[jax.Array] | Sampled]:
        """Of one picture: the states between scales, or what is there after so many calls."""
        scales = lambda model, noise, *, label, known, limit: model.draw(noise, label, known)[3]  # noqa: E731
        way = scales if self.refines else sampler(self.arguments.sampler, self.arguments.window)
        return make_draw(self.model, way, self.arguments.seed, 1)

    def _film(self, index: int, drawn: Sampled, images: np.ndarray) -> np.ndarray:
        part = self.part(index, 1)
        if self.refines:
            moments = self._moments(*part)
        elif self.arguments.sampler == "fixed-point":
            limits = np.linspace(0, drawn.calls[index], MOMENTS).round().astype(int)
            moments = [self._moments(*part, int(limit)).image for limit in limits]
        else:
            # What is not drawn yet is grey. Pixels, or codes, come in the order of rows.
            order = np.arange(drawn.visits[0].size).reshape(drawn.visits.shape[1:])
            there = [order < share * order.size for share in np.linspace(0, 1, MOMENTS)]
            there = there if self.given is None else [each | self.given.where[index] for each in there]
            side = images.shape[1] // order.shape[0]
            there = [each.repeat(side, 0).repeat(side, 1) for each in there]
            return np.stack([np.where(each[..., None], images[index], np.uint8(film.PAPER)) for each in there])
        return np.stack([np.asarray(self.to_pictures(each))[0] for each in moments])


AT_ONCE = ("adversarial", "variational")
"""Tasks of models that make a picture of noise in one go, without a sampler."""


def wanted(arguments: Arguments, row: str) -> Wanted:
    """What is asked for of a model that draws at once. Raises UserError for options that say how to sample."""
    given = {"sampler": arguments.sampler, "window": arguments.window, "complete": arguments.complete or None}
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name} {value}: row {row} draws a picture at once and has no sampler; leave it out")
    a = arguments
    return Wanted(a.workdir, a.out, a.budget, a.n, a.seed, a.label, a.batch_size, a.size, a.check != "none")


def make_job(arguments: Arguments) -> tuple[Job, str]:
    """The job, and the title of what comes of it. Raises UserError."""
    config, names = read_config(arguments.workdir)
    if models.task_of(config.model) != "autoregressive":
        raise UserError(
            f"--workdir {arguments.workdir}: row {config.row} draws no pictures; the rows *_pixelcnn, "
            "*_transformer, *_codes, *_nextscale, *_gan_* and *_vae_* do"
        )
    if arguments.size is not None:
        raise UserError(f"--size {arguments.size}: row {config.row} draws pictures of one size; leave it out")
    config, whole, step = checkpoint.load(arguments.workdir)
    scales = isinstance(whole, InScales)
    own = "coarse-to-fine" if scales else "fixed-point"
    arguments = dataclasses.replace(arguments, sampler=arguments.sampler or own)
    refines = arguments.sampler == "coarse-to-fine"
    if refines and arguments.window is not None:
        raise UserError(f"--window is of fixed-point, and row {config.row} is drawn by coarse-to-fine")
    if refines != scales:
        way = "coarse-to-fine and by no other sampler" if not refines else "pixel, cached or fixed-point"
        raise UserError(f"--sampler {arguments.sampler}: row {config.row} is drawn by {way}")
    label, given = labels_of(arguments, config, whole.classes), None
    if arguments.complete:
        given, labels = given_of(arguments, config, whole)
        label = labels if label is not None and arguments.label is None else label
    model, decode = whole, functools.partial(to_bytes, values=whole.likelihood.values)
    if isinstance(whole, Encodes):
        model, decode = whole.prior, whole.decode
    model = within_budget(model, arguments.budget, arguments.seed, config, len(names))
    title = f"{config.row}, step {step}, {arguments.sampler}, seed {arguments.seed}"
    return Job(arguments, model, jax.jit(decode), label, given), title


def main(raw: list[str]) -> None:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    cli.check_folder(arguments.out, "out")
    config, _ = read_config(arguments.workdir)
    if models.task_of(config.model) in AT_ONCE:
        return generate(wanted(arguments, config.row))
    job, title = make_job(arguments)
    out, number = cli.make_folder(arguments.out, "out"), arguments.n
    drawn, took = job.draw(job.model, job.arguments.sampler)
    flips, images = job.flips(drawn), np.asarray(job.to_pictures(drawn.image))
    moments = job.films(drawn, images)
    sizes = [film.png_bytes(image) for image in images]
    visits = drawn.visits.mean((1, 2))
    macs, blocks = spent_on(job.model, drawn.image, job.batch) if steers(job.model) else (None, None)
    what = "tiles refined" if job.refines else "calls"
    shown = (drawn.visits, drawn.calls, what, "evaluations")
    if blocks is not None:
        shown = (blocks, blocks.sum((1, 2)), "blocks", "blocks")
    correlation = film.rank_correlation(shown[1], np.array(sizes))
    # The most, the least and what is between: pictures over the whole range of calls.
    order = np.argsort(shown[1], kind="stable")[np.linspace(0, number - 1, min(SHOWN, number)).round().astype(int)]
    unknown = [""] * number
    columns = {
        "picture": range(number),
        "label": unknown if job.label is None else job.label,
        "calls": drawn.calls,
        "evaluations_per_pixel": [f"{each:.3f}" for each in visits],
        "macs": unknown if macs is None else [round(float(each)) for each in macs],
        "ms": [f"{each:.3f}" for each in took],
        "png_bytes": sizes,
        "flipped": unknown if flips is None else flips,
        "rank_correlation": [f"{correlation:.4f}"] * number,
    }
    with files.writing(f"in {out}"):
        film.save_grid(out / "grid.png", images)
        film.save_film(out / "film.png", moments)
        film.plot_calls(
            out / "calls.png", images[order], shown[0][order], shown[1][order], shown[2], counted=shown[3], title=title
        )
        with open(out / "calls.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
    calls = f"{drawn.calls.mean():.1f} {what} ({drawn.calls.min()} to {drawn.calls.max()})"
    print(f"{title}: {number} pictures, {calls}, {visits.mean():.1f} evaluations of a pixel, {took.mean():.2f} ms each")
    if macs is not None:
        print(f"{macs.mean() / 1e6:.2f} MMAC a picture ({macs.min() / 1e6:.2f} to {macs.max() / 1e6:.2f})")
    if flips is not None:
        other = "the masked execution" if job.refines else f"--check {arguments.check}"
        print(f"{int(flips.sum())} of {drawn.visits.size} pixels differ from those of {other}")
    if correlation == correlation:
        print(f"rank correlation of {shown[2]} with the size as PNG: {correlation:.2f}")
    print(f"{out}: grid.png film.png calls.png calls.csv")


if __name__ == "__main__":
    cli.run(main)
