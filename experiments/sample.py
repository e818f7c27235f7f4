"""Draw pictures: python -m experiments.sample --workdir W --sampler fixed-point --n 64 --out DIR [--seed 0]

Samplers: pixel (the whole model for every pixel), cached (one pixel of every layer), fixed-point (many pixels at once,
until none changes). All three are exact: the seed fixes the noise, and the same noise is the same grid.png, but where
rounding flips a pixel; --check counts such.
Rows *_nextscale have a sampler of their own, coarse-to-fine, with a dial: --budget is the share of the static twin's
MACs that pictures may take on average, solved on pictures that the model draws itself. Rows *_exits have the same dial,
under which every pixel takes blocks until its prediction is sure, whatever the sampler.
--label 3 asks a conditional row for one class; --complete gives the upper half of pictures of the test set.
Of rows *_codes the codes are drawn, and decoded: what is said of pixels is then said of codes.

Writes DIR/grid.png, film.png (how the first ones come to be), calls.png (how often each pixel was evaluated, of *_exits
the blocks that it took), and calls.csv (per picture: label, calls or refined tiles, evaluations per pixel, MACs where a
budget steers, milliseconds, size as PNG, pixels that differ).
"""

import dataclasses
import time
from typing import Any, Literal

from dynjax.config import Config, UserError
from experiments import cli
from experiments.evaluate import Place, find_twin, with_path

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
    label: int | None = None
    """Class of all pictures, of a conditional row; else every class in turn, or those of the pictures to complete."""
    complete: bool = False
    """Give the upper half of pictures of the test set."""
    batch_size: int = 1
    """Pictures drawn at once. At 1 the milliseconds are each picture's own, otherwise its share of the batch's."""
    window: int | None = None
    """Rows (transformer: pixels) that fixed-point draws at once; the family's own when it is not given."""
    check: Literal["none", "cached", "pixel"] = "cached"
    """Exact sampler that draws the pictures once more, to count the pixels that differ. Of coarse-to-fine, which has no
    exact one beside it, the masked execution, which computes everything, does; none turns it off."""
    data: Place = dataclasses.field(default_factory=Place)


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    for name in ("n", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if arguments.window is not None and arguments.window < 1:
        raise UserError(f"--window {arguments.window} must be at least 1")
    if arguments.window is not None and arguments.sampler not in (None, "fixed-point"):
        raise UserError(f"--window is of --sampler fixed-point; {arguments.sampler} has none")
    if arguments.budget is not None and not 0 < arguments.budget <= 1:
        raise UserError(f"--budget {arguments.budget:g} must be a share of the static twin's MACs in (0, 1]")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} must be in 0 to 4294967295")


def labels_of(arguments: Arguments, config: Config, classes: int) -> Any:
    """The class of every picture (N,), or None for a row without. Raises UserError."""
    import numpy as np

    if not classes:
        if arguments.label is not None:
            raise UserError(f"--label {arguments.label}: row {config.row} was not trained by label")
        return None
    if arguments.label is None:
        return np.arange(arguments.n, dtype=np.int32) % classes
    if not 0 <= arguments.label < classes:
        raise UserError(f"--label {arguments.label}: row {config.row} has the classes 0 to {classes - 1}")
    return np.full(arguments.n, arguments.label, np.int32)


def given_of(arguments: Arguments, config: Config, model: Any) -> Any:
    """Pictures of test (N, H, W, C), which pixels are given (N, H, W), and labels (N,); None without --complete. Of a
    model of codes: codes of pictures, and which are given."""
    import jax.numpy as jnp
    import numpy as np

    from dynjax.data import make_source
    from dynjax.data.source import size_of
    from dynjax.tasks.autoregressive import integers

    if not arguments.complete:
        return None
    source = make_source(with_path(config, arguments.data.path).data, "test")
    if size_of(source) != config.model.shape[:2]:
        raise UserError(
            f"--complete: row {config.row} draws {config.model.shape[:2]} pixels, test has {size_of(source)}"
        )
    chosen = [source[index % len(source)] for index in range(arguments.n)]
    image = np.asarray(integers(model, jnp.asarray(np.stack([each["image"] for each in chosen]))))
    upper = np.arange(model.shape[0])[:, None] < model.shape[0] // 2
    return image, np.broadcast_to(upper, image.shape[:3]), np.array([each["label"] for each in chosen], np.int32)


def make_draw(model: Any, name: str, seed: int, batch: int, **options: Any) -> Any:
    """`draw(first, label, known, limit)`: a batch of pictures from number `first` on, compiled."""
    import jax
    from flax import nnx

    from dynjax.ops import sampling

    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, first: Any, label: Any, known: Any, limit: Any) -> Any:
        model = nnx.merge(graphdef, state)
        noise = sampling.make_noise(model, jax.random.key(seed), batch, first)
        more = options | ({"limit": limit} if name == "fixed-point" else {})
        return sampling.SAMPLERS[name](model, noise, label=label, known=known, **more)

    return lambda first, label, known, limit=2**30: jax.block_until_ready(run(state, first, label, known, limit))


def make_steps(model: Any, seed: int) -> Any:
    """`steps(first, label, known)`: how picture number `first` of a *_nextscale model comes to be, compiled."""
    import jax
    from flax import nnx

    from dynjax.ops import sampling

    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, first: Any, label: Any, known: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return model.draw(sampling.make_noise(model, jax.random.key(seed), 1, first), label, known)[3]

    return lambda first, label, known: run(state, first, label, known)


CALIBRATION = 256
"""Pictures that the model draws to solve its threshold on; their numbers are beyond those of all that are kept."""


def within_budget(model: Any, budget: float | None, seed: int, config: Config, classes: int) -> Any:
    """The model, compact, whose pictures take a share `budget` of the static twin's MACs on average; None keeps all.

    Raises UserError.
    """
    import jax
    import numpy as np
    from flax import nnx

    from dynjax.core.budget import LOWEST, set_threshold
    from dynjax.core.views import compact
    from dynjax.run.evaluate import solve, static_macs, steers

    if not steers(model):
        if budget is not None and budget < 1:
            raise UserError(f"--budget {budget:g}: row {config.row} has no gates and no exits that a budget could move")
        return model
    if budget is None:
        model = nnx.clone(compact(model))
        set_threshold(model, LOWEST)
        return model
    static, _ = find_twin(dataclasses.replace(config, init_from=""), classes, "")
    twin = static_macs(static, jax.ShapeDtypeStruct((1, *model.shape), np.int32))
    size = CALIBRATION // 4
    label = np.arange(size, dtype=np.int32) % model.classes if model.classes else None
    draw = make_draw(model, "coarse-to-fine" if hasattr(model, "draw") else "cached", seed, size)
    drawn = [jax.device_get(draw(2**30 + k * size, label, None).image) for k in range(4)]
    found = solve(model, twin, [budget], drawn)[budget]
    told, met = found.report, "met" if found.report.met else "NOT met"
    print(
        f"budget {budget:.0%} {met}: mean {told.mean / 1e6:.2f} MMAC ({told.mean / twin:.1%} of the static twin's "
        f"{twin / 1e6:.2f}), p95 {told.p95 / 1e6:.2f}, max {told.max / 1e6:.2f}; threshold {told.threshold:.2f}"
    )
    return found.model


def spent_on(model: Any, images: Any, batch: int) -> Any:
    """MACs that each picture (N, H, W, C) of a model with a budget took, (N,), and of a model with exits the blocks of
    each pixel (N, H, W), else None: they are a function of the picture."""
    import jax
    import numpy as np
    from flax import nnx

    from dynjax.core import views
    from dynjax.core.decision import PREFIX
    from dynjax.core.trace import traced

    graphdef, state = nnx.split(views.masked(model))

    @jax.jit
    def run(state: nnx.State, x: Any) -> Any:
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
    model: Any
    to_pictures: Any
    """Of what the model draws, pixels or codes."""
    label: Any
    given: Any

    @property
    def batch(self) -> int:
        return min(self.arguments.batch_size, self.arguments.n)

    @property
    def refines(self) -> bool:
        return self.arguments.sampler == "coarse-to-fine"

    @property
    def options(self) -> dict[str, Any]:
        return {"window": self.arguments.window} if self.arguments.sampler == "fixed-point" else {}

    def part(self, first: int, size: int) -> tuple:
        """What a batch is drawn from; the last one is filled up with pictures that are drawn and not kept."""
        import numpy as np

        from dynjax.ops.sampling import Known

        index = np.minimum(np.arange(first, first + size), self.arguments.n - 1)
        known = None if self.given is None else Known(self.given[0][index], self.given[1][index])
        return first, None if self.label is None else self.label[index], known

    def draw(self, model: Any, name: str, **options: Any) -> tuple[Any, Any]:
        """What a sampler gives of all pictures, and the milliseconds of each."""
        import jax
        import numpy as np
        from tqdm.auto import tqdm

        number, batch = self.arguments.n, self.batch
        draw, found, took = make_draw(model, name, self.arguments.seed, batch, **options), [], []
        draw(*self.part(0, batch))  # compiles
        for first in tqdm(range(0, number, batch), desc=name, unit="batch", disable=None):
            began = time.perf_counter()
            found.append(jax.device_get(draw(*self.part(first, batch))))
            took += [1e3 * (time.perf_counter() - began) / batch] * batch
        return jax.tree.map(lambda *each: np.concatenate(each)[:number], *found), np.array(took[:number])

    def flips(self, drawn: Any) -> Any:
        """How many pixels of each picture another way of drawing has otherwise (N,); None where none is asked for."""
        from dynjax.core import views

        check = self.arguments.check
        if check in ("none", self.arguments.sampler):
            return None
        model = views.masked(self.model) if self.refines else self.model
        other, _ = self.draw(model, "coarse-to-fine" if self.refines else check)
        return (drawn.image != other.image).any(-1).sum((1, 2))

    def films(self, drawn: Any, images: Any) -> Any:
        """How the first pictures come to be, (N, T, H, W, 3)."""
        import numpy as np

        from dynjax.show import film

        draw = make_draw(self.model, self.arguments.sampler, self.arguments.seed, 1, **self.options)
        steps = make_steps(self.model, self.arguments.seed) if self.refines else None
        found = []
        for index in range(min(FILMED, self.arguments.n)):
            if steps is not None:
                frames = [np.asarray(self.to_pictures(each))[0] for each in steps(*self.part(index, 1))]
            elif self.options:
                limits = np.linspace(0, drawn.calls[index], MOMENTS).round().astype(int)
                moments = [draw(*self.part(index, 1), int(limit)).image for limit in limits]
                frames = [np.asarray(self.to_pictures(each))[0] for each in moments]
            else:
                # What is not drawn yet is grey. Pixels, or codes, come in the order of rows.
                order = np.arange(drawn.visits[0].size).reshape(drawn.visits.shape[1:])
                there = [order < share * order.size for share in np.linspace(0, 1, MOMENTS)]
                there = there if self.given is None else [each | self.given[1][index] for each in there]
                side = images.shape[1] // order.shape[0]
                there = [each.repeat(side, 0).repeat(side, 1) for each in there]
                frames = [np.where(each[..., None], images[index], np.uint8(film.PAPER)) for each in there]
            found.append(np.stack(frames))
        return np.stack(found)


@dataclasses.dataclass(frozen=True)
class Line:
    """One picture's line of calls.csv; empty where nobody looked."""

    picture: int
    label: int | str
    calls: int
    evaluations_per_pixel: str
    macs: int | str
    ms: str
    png_bytes: int
    flipped: int | str
    rank_correlation: str


def make_job(arguments: Arguments) -> tuple[Job, str]:
    """The job, and the title of what comes of it. Raises UserError."""
    import jax

    from dynjax import models
    from dynjax.models.likelihoods import to_bytes
    from dynjax.run import checkpoint
    from dynjax.run.workdir import read_config

    config, names = read_config(arguments.workdir)
    if models.task_of(config.model) != "autoregressive":
        raise UserError(
            f"--workdir {arguments.workdir}: row {config.row} draws no pictures; the rows *_pixelcnn, "
            "*_transformer, *_codes and *_nextscale do"
        )
    scales = config.model.family == "nextscale"
    own = "coarse-to-fine" if scales else "fixed-point"
    arguments = dataclasses.replace(arguments, sampler=arguments.sampler or own)
    refines = arguments.sampler == "coarse-to-fine"
    if refines and arguments.window is not None:
        raise UserError(f"--window is of fixed-point, and row {config.row} is drawn by coarse-to-fine")
    if refines != scales:
        way = "coarse-to-fine and by no other sampler" if not refines else "pixel, cached or fixed-point"
        raise UserError(f"--sampler {arguments.sampler}: row {config.row} is drawn by {way}")
    config, whole, step = checkpoint.load(arguments.workdir)
    label, given = labels_of(arguments, config, whole.classes), given_of(arguments, config, whole)
    if given is not None and label is not None and arguments.label is None:
        label = given[2]
    codes = config.model.family == "codes"
    model = whole.prior if codes else whole
    values = model.likelihood.values
    to_pictures = jax.jit(whole.decode if codes else lambda x: to_bytes(x, values))
    model = within_budget(model, arguments.budget, arguments.seed, config, len(names))
    title = f"{config.row}, step {step}, {arguments.sampler}, seed {arguments.seed}"
    return Job(arguments, model, to_pictures, label, given), title


def main(raw: list[str]) -> None:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    import numpy as np

    from dynjax.run.evaluate import steers
    from dynjax.show import film, report

    cli.check_folder(arguments.out, "out")
    job, title = make_job(arguments)
    out, number = cli.make_folder(arguments.out, "out"), arguments.n
    drawn, took = job.draw(job.model, job.arguments.sampler, **job.options)
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
    lines = [
        Line(
            index,
            "" if job.label is None else int(job.label[index]),
            int(drawn.calls[index]),
            f"{visits[index]:.3f}",
            "" if macs is None else round(float(macs[index])),
            f"{took[index]:.3f}",
            sizes[index],
            "" if flips is None else int(flips[index]),
            f"{correlation:.4f}",
        )
        for index in range(number)
    ]
    try:
        film.save_grid(out / "grid.png", images)
        film.save_film(out / "film.png", moments)
        film.plot_calls(
            out / "calls.png", images[order], shown[0][order], shown[1][order], shown[2], counted=shown[3], title=title
        )
        report.write_points(out / "calls.csv", lines)
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror or error}") from None
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
