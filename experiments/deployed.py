"""What the commands that use a trained row share: the model at a budget, asked about pictures of any size.

A picture is made the size that the model works at (`--whole resize`), or looked at in windows of that size that
overlap, whose probabilities are blended (`--whole windows`, see `dynjax.run.mosaic`).
"""

import dataclasses
import errno
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.core.budget import set_threshold
from dynjax.core.trace import traced
from dynjax.core.views import compact
from dynjax.data import calibration_batches
from dynjax.data.pictures import BadFile
from dynjax.data.source import size_of
from dynjax.run import checkpoint, mosaic
from dynjax.run.evaluate import solve, static_macs
from dynjax.run.workdir import read_config
from experiments import cli
from experiments.evaluate import Place, Record, check_budget, fresh_twin, read_record, source_of, unmet, with_path

OF_A_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # errors of one file's name, and not of the folder
CALIBRATION = (8, 12)  # batch size and batches of val, where evaluate has not solved this budget
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments that such commands share."""

    workdir: str
    """Folder of a training run."""
    out: str
    """Folder for the results; made when it is missing."""
    budget: float | None = None
    """Share of the static twin's MACs, in (0, 1]; the one of the training when it is not given."""
    whole: Literal["resize", "windows"] | None = None
    """Pictures that have another size than the model: resize them, or look at them in windows that overlap. Windows
    where the row was trained in windows (data.crop), otherwise resize."""
    overlap: float | None = None
    """Share of a window's side that the next one covers too, of --whole windows; a quarter when it is not given."""
    data: Place = dataclasses.field(default_factory=Place)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says of one picture: of a mask in the picture's own size, or in that which it was resized to."""

    ids: np.ndarray
    """Class of each pixel (h, w), or of the picture ()."""
    sure: np.ndarray
    """Its probability."""
    heat: np.ndarray | None
    """MACs per pixel (h, w) of a mask."""
    macs: float
    full: float
    """MACs of everything kept."""


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A trained row at a budget."""

    config: Config
    classes: tuple[str, ...]
    step: int
    size: Size
    """Height and width that the model works at."""
    whole: str
    overlap: float | None
    """Of windows."""
    look: Callable[[Image.Image], Answer]


def check(asked: Asked) -> None:
    """Raises UserError."""
    if asked.budget is not None:
        check_budget("budget", asked.budget)
    if asked.overlap is not None and not 0 <= asked.overlap <= mosaic.MOST_OVERLAP:
        most = mosaic.MOST_OVERLAP
        raise UserError(f"--overlap {asked.overlap:g} must be a share of a window's side, in [0, {most:g}]")
    cli.check_folder(asked.out, "out")


def segments(config: Config) -> bool:
    return models.task_of(config.model) == "segmentation"


def way(asked: Asked, config: Config) -> str:
    """resize or windows. Raises UserError for what does not go together."""
    if asked.whole == "windows" and not segments(config):
        raise UserError(f"--whole windows: row {config.row} gives one answer per picture and no mask; leave it out")
    windows = config.data.crop is not None and segments(config)
    whole = asked.whole or ("windows" if windows else "resize")
    if asked.overlap is not None and whole == "resize":
        raise UserError(f"--overlap {asked.overlap:g} is of --whole windows, and pictures are resized here")
    return whole


def deploy(asked: Asked) -> Deployed:
    """The row of a workdir; says on stderr where it spends more than the budget. Raises UserError."""
    config, classes = read_config(asked.workdir)
    whole = way(asked, config)
    config, model, step = checkpoint.load(asked.workdir)
    config = with_path(config, asked.data.path)
    known = read_evaluation(asked.workdir, step)
    model, said = at_budget(model, config, classes, asked.budget, known)
    if said:
        print(said, file=sys.stderr)
    size = config.data.crop or picture_size(config, classes, known)
    run = make_run(model, size, segments(config))
    if whole == "resize":
        return Deployed(config, classes, step, size, whole, None, resized(run, size))
    overlap = mosaic.OVERLAP if asked.overlap is None else asked.overlap
    before = config.data.size if config.data.crop else None
    return Deployed(config, classes, step, size, whole, overlap, in_windows(run, size, overlap, before))


def read_evaluation(workdir: str, step: int) -> Record | None:
    """What experiments.evaluate left in the workdir, if it was for this step; None, which is said, if it is damaged."""
    try:
        record = read_record(workdir)
    except UserError as error:
        print(f"{error}; until then the budget is solved anew", file=sys.stderr)
        return None
    return record if record is not None and record.step == step else None


def at_budget(
    model: nnx.Module, config: Config, classes: tuple[str, ...], budget: float | None, known: Record | None
) -> tuple[nnx.Module, str]:
    """The model as it skips: with the threshold that evaluate solved, otherwise solved on val now; and what is to be
    said where that spends more than the budget. Raises UserError."""
    if models.is_static(config.model):
        if budget not in (None, 1.0):
            raise UserError(f"--budget {budget:g}: row {config.row} is static, it always spends all of its MACs")
        return model, ""
    budget = config.budget.target if budget is None else budget
    name = f"{budget:g}"
    if known is not None and name in known.thresholds:
        model = nnx.clone(compact(model))
        set_threshold(model, known.thresholds[name])
        spent, size = known.calibration.get(name), known.size
        if spent is None or spent.met:
            return model, ""
    else:
        try:
            val = source_of(config, "val", classes)
        except UserError as error:
            hint = f"run experiments.evaluate with --budgets {name} first"
            raise UserError(f"budget {name} must be solved on val: {error}; or {hint}") from None
        wanted, count = CALIBRATION
        pictures = calibration_batches(val, min(wanted, len(val)), count)
        spent, size = None, size_of(val)
    whole = static_macs(fresh_twin(config, len(classes)), jax.ShapeDtypeStruct((1, *size, 3), np.uint8))
    if spent is None:
        found = solve(model, whole, [budget], [batch["image"] for batch in pictures])[budget]
        model, spent = found.model, found.report
    return model, unmet(config.row, budget, spent, whole)


def picture_size(config: Config, classes: tuple[str, ...], known: Record | None) -> Size:
    """Height and width that the model works at."""
    if config.data.size is not None:
        return config.data.size
    if known is None:
        return size_of(source_of(config, "val", classes))
    if len(known.size) != 2:
        raise UserError(f"row {config.row} is not of pictures: an example has the sides {known.size}")
    height, width = known.size
    return height, width


def make_run(model: nnx.Module, size: Size, segments: bool) -> Callable[[np.ndarray], tuple]:
    """`run(image (H, W, 3))`: probabilities (of a mask per pixel), heat map (of a mask), MACs, all MACs; compiled."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, image: jax.Array) -> tuple:
        logits, trace = traced(nnx.merge(graphdef, state))(image)
        heat = trace.heatmap(size)[0] if segments else None
        return jax.nn.softmax(logits[0].astype(jnp.float32)), heat, trace.macs()[0], trace.full_macs

    return lambda image: jax.device_get(run(state, image[None]))


def resized(run: Callable[[np.ndarray], tuple], size: Size) -> Callable[[Image.Image], Answer]:
    """Every picture made `size`, and asked about once."""

    def look(picture: Image.Image) -> Answer:
        likely, heat, macs, full = run(np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)))
        return Answer(likely.argmax(-1), likely.max(-1), heat, float(macs), float(full))

    return look


def in_windows(
    run: Callable[[np.ndarray], tuple], size: Size, overlap: float, before: Size | None
) -> Callable[[Image.Image], Answer]:
    """Every picture in its own size, or made of height and width `before`, by windows of `size`."""

    def look(picture: Image.Image) -> Answer:
        full = 0.0
        picture = picture.resize(before[::-1], Image.Resampling.BILINEAR) if before else picture

        def one(window: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
            nonlocal full
            likely, heat, macs, most = run(window)
            full += float(most)
            return likely, heat, float(macs)

        found = mosaic.stitch(np.asarray(picture), size, one, overlap=overlap)
        return Answer(found.ids, found.sure, found.heat, found.macs, full)

    return look


def stems(images: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """Each picture and the name of its results: its stem, numbered where an earlier picture has the same."""
    taken: set[str] = set()
    for image in map(Path, images):
        name, number = image.stem, 1
        while name in taken:
            number += 1
            name = f"{image.stem}-{number}"
        if number > 1:
            what = f"{image}: another picture is called {image.stem} too, this one's results are {name}_*.png"
            print(cli.printable(what), file=sys.stderr)
        taken.add(name)
        yield image, name


def each_picture(images: Sequence[tuple[Path, str]], do: Callable[[Path, str], None]) -> int:
    """`do(path, name)` of every picture, with progress; those that cannot be read, or whose names cannot be written,
    are named on stderr. How many these are."""
    failed = 0
    for path, name in tqdm(images, unit="picture", disable=len(images) < 4 or None):
        try:
            do(path, name)
        except BadFile as error:
            tqdm.write(cli.printable(f"error: {error}"), file=sys.stderr)
            failed += 1
        except OSError as error:
            if error.errno not in OF_A_NAME:
                raise
            what = f"error: {path}: its results cannot be written: {error.strerror}"
            tqdm.write(cli.printable(what), file=sys.stderr)
            failed += 1
    return failed
