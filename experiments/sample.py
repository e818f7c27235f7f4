"""Draw pictures: python -m experiments.sample --workdir W --sampler fixed-point --n 64 --out DIR [--seed 0]

Samplers: pixel (the whole model for every pixel), cached (one pixel of every layer), fixed-point (many pixels at once,
until none changes). All three are exact: the seed fixes the noise, and the same noise is the same grid.png.
--label 3 asks a conditional row for one class; --complete gives the upper half of pictures of the test set.

Writes DIR/grid.png, film.png (how the first ones come to be), calls.png (how often each pixel was evaluated), and
calls.csv (per picture: label, calls, evaluations per pixel, milliseconds, size as PNG, pixels that differ).
"""

import csv
import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from dynjax.config import Config, UserError
from experiments import cli
from experiments.evaluate import Place, with_path

COMMAND = "experiments.sample"
FILMED, MOMENTS, SHOWN = 6, 10, 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    workdir: str
    """Folder of a training run."""
    out: str
    """Folder for the results; made when it is missing."""
    sampler: Literal["pixel", "cached", "fixed-point"] = "fixed-point"
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
    """Exact sampler that draws the pictures once more, to count the pixels that differ."""
    data: Place = dataclasses.field(default_factory=Place)


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    for name in ("n", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if arguments.window is not None and arguments.window < 1:
        raise UserError(f"--window {arguments.window} must be at least 1")
    if arguments.window is not None and arguments.sampler != "fixed-point":
        raise UserError(f"--window is of --sampler fixed-point; {arguments.sampler} has none")
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
    """Pictures of test (N, H, W, C), which pixels are given (N, H, W), and labels (N,); None without --complete."""
    import jax.numpy as jnp
    import numpy as np

    from dynjax.data import make_source
    from dynjax.models.likelihoods import quantise

    if not arguments.complete:
        return None
    source = make_source(with_path(config, arguments.data.path).data, "test")
    if tuple(source.size) != model.shape[:2]:
        raise UserError(f"--complete: row {config.row} draws {model.shape[:2]} pixels, test has {source.size}")
    chosen = [source[index % len(source)] for index in range(arguments.n)]
    pictures = jnp.asarray(np.stack([each["image"] for each in chosen]))
    image = np.asarray(quantise(pictures, model.likelihood.values, model.shape[2]))
    upper = np.arange(model.shape[0])[:, None] < model.shape[0] // 2
    return image, np.broadcast_to(upper, image.shape[:3]), np.array([each["label"] for each in chosen], np.int32)


def make_draw(model: Any, name: str, seed: int, batch: int, **options: Any) -> Any:
    """`draw(first, label, known, limit)`: a batch of pictures from number `first` on, compiled."""
    import jax
    from flax import nnx

    from dynjax import sampling

    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, first: Any, label: Any, known: Any, limit: Any) -> Any:
        model = nnx.merge(graphdef, state)
        noise = sampling.make_noise(model, jax.random.key(seed), batch, first)
        more = options | ({"limit": limit} if name == "fixed-point" else {})
        return sampling.SAMPLERS[name](model, noise, label=label, known=known, **more)

    return lambda first, label, known, limit=2**30: jax.block_until_ready(run(state, first, label, known, limit))


def main(raw: list[str]) -> None:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    import jax
    import numpy as np
    from tqdm.auto import tqdm

    from dynjax import checkpoint, film, models
    from dynjax.models.likelihoods import to_bytes
    from dynjax.sampling import Known, Sampled

    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    config, _ = checkpoint.read_config(arguments.workdir)
    if not models.generates(config.model):
        raise UserError(f"--workdir {arguments.workdir}: row {config.row} draws no pictures; the rows *_pixelcnn do")
    config, model, step = checkpoint.load(arguments.workdir)
    label, given = labels_of(arguments, config, model.classes), given_of(arguments, config, model)
    if given is not None and label is not None and arguments.label is None:
        label = given[2]
    number, batch = arguments.n, min(arguments.batch_size, arguments.n)
    options = {"window": arguments.window} if arguments.sampler == "fixed-point" else {}

    def part(first: int, size: int) -> tuple:
        # The last batch is filled up with pictures that are drawn and not kept.
        index = np.minimum(np.arange(first, first + size), number - 1)
        known = None if given is None else Known(given[0][index], given[1][index])
        return first, None if label is None else label[index], known

    def all_of(name: str, **options: Any) -> tuple[Sampled, np.ndarray]:
        """What a sampler gives of all pictures, and the milliseconds of each."""
        draw, found, took = make_draw(model, name, arguments.seed, batch, **options), [], []
        draw(*part(0, batch))  # compiles
        for first in tqdm(range(0, number, batch), desc=name, unit="batch", disable=None):
            began = time.perf_counter()
            found.append(jax.device_get(draw(*part(first, batch))))
            took += [1e3 * (time.perf_counter() - began) / batch] * batch
        return jax.tree.map(lambda *each: np.concatenate(each)[:number], *found), np.array(took[:number])

    drawn, took = all_of(arguments.sampler, **options)
    flips = None
    if arguments.check not in ("none", arguments.sampler):
        flips = (drawn.image != all_of(arguments.check)[0].image).any(-1).sum((1, 2))

    def picture(x: Any) -> np.ndarray:
        return np.asarray(to_bytes(jax.numpy.asarray(x), model.likelihood.values))

    images = picture(drawn.image)
    moments = []
    draw = make_draw(model, arguments.sampler, arguments.seed, 1, **options) if options else None
    for index in range(min(FILMED, number)):
        if draw is not None:
            limits = np.linspace(0, drawn.calls[index], MOMENTS).round().astype(int)
            frames = [picture(draw(*part(index, 1), int(limit)).image)[0] for limit in limits]
        else:
            # What is not drawn yet is grey. Pixels come in the order of rows.
            pixels = np.arange(images[0, ..., 0].size).reshape(images.shape[1:3])
            there = [pixels < share * pixels.size for share in np.linspace(0, 1, MOMENTS)]
            there = there if given is None else [each | given[1][index] for each in there]
            frames = [np.where(each[..., None], images[index], np.uint8(film.PAPER)) for each in there]
        moments.append(np.stack(frames))

    sizes = np.array([film.png_bytes(image) for image in images])
    correlation = film.rank_correlation(drawn.calls, sizes)
    visits = drawn.visits.mean((1, 2))
    # The most, the least and what is between: pictures over the whole range of calls.
    order = np.argsort(drawn.calls, kind="stable")[np.linspace(0, number - 1, min(SHOWN, number)).round().astype(int)]
    title = f"{config.row}, step {step}, {arguments.sampler}, seed {arguments.seed}"
    header = ("picture", "label", "calls", "evaluations_per_pixel", "ms", "png_bytes", "flipped", "rank_correlation")
    try:
        film.save_grid(out / "grid.png", images)
        film.save_film(out / "film.png", np.stack(moments))
        film.plot_calls(out / "calls.png", images[order], drawn.visits[order], drawn.calls[order], title=title)
        with open(out / "calls.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for index in range(number):
                own = "" if label is None else int(label[index])
                flipped = "" if flips is None else int(flips[index])
                each = (index, own, int(drawn.calls[index]), f"{visits[index]:.3f}", f"{took[index]:.3f}")
                writer.writerow((*each, int(sizes[index]), flipped, f"{correlation:.4f}"))
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror or error}") from None
    calls = f"{drawn.calls.mean():.1f} calls ({drawn.calls.min()} to {drawn.calls.max()})"
    print(f"{title}: {number} pictures, {calls}, {visits.mean():.1f} evaluations of a pixel, {took.mean():.2f} ms each")
    if flips is not None:
        print(f"{int(flips.sum())} of {drawn.visits.size} pixels differ from those of --check {arguments.check}")
    if correlation == correlation:
        print(f"rank correlation of calls with the size as PNG: {correlation:.2f}")
    print(f"{out}: grid.png film.png calls.png calls.csv")


if __name__ == "__main__":
    cli.run(main)
