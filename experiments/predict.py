"""Masks and compute maps, or classes: python -m experiments.predict --workdir W --out DIR [--budget 0.5] IMAGE ...

Writes DIR/STEM_mask.png (class ids with a palette) in the picture's own size, DIR/STEM_overlay.png, of at most 2
megapixels, and DIR/STEM_compute.png, where the MACs were spent. A row that classifies writes DIR/predictions.csv:
picture, class, its probability, MACs.
A file that is no picture is named on stderr, the others are done, and the exit status is 2.
"""

import contextlib
import csv
import dataclasses
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.core.budget import set_threshold
from dynjax.core.trace import traced
from dynjax.core.views import compact
from dynjax.data import calibration_batches
from dynjax.data.pictures import BadFile, read_image
from dynjax.data.source import size_of
from dynjax.run import checkpoint, files
from dynjax.run.evaluate import solve, static_macs
from dynjax.run.workdir import read_config
from dynjax.show import report
from experiments import cli
from experiments.evaluate import Place, Record, check_budget, fresh_twin, read_record, source_of, unmet, with_path

COMMAND = "experiments.predict"
OF_A_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # errors of one file's name, and not of the folder
CALIBRATION = (8, 12)  # batch size and batches of val, where evaluate has not solved this budget


@dataclasses.dataclass(frozen=True)
class Arguments:
    workdir: str
    """Folder of a training run."""
    out: str
    """Folder for the results; made when it is missing."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Pictures of any size."""
    budget: float | None = None
    """Share of the static twin's MACs, in (0, 1]; the one of the training when it is not given."""
    data: Place = dataclasses.field(default_factory=Place)


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


def picture_size(config: Config, classes: tuple[str, ...], known: Record | None) -> tuple[int, int]:
    """Height and width that the model works at."""
    if config.data.size is not None:
        return config.data.size
    if known is None:
        return size_of(source_of(config, "val", classes))
    if len(known.size) != 2:
        raise UserError(f"row {config.row} is not of pictures: an example has the sides {known.size}")
    height, width = known.size
    return height, width


def stems(images: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
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


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    if not arguments.images:
        raise UserError("no picture given: python -m experiments.predict --workdir W --out DIR IMAGE ...")
    if arguments.budget is not None:
        check_budget("budget", arguments.budget)
    cli.check_folder(arguments.out, "out")


def make_run(model: nnx.Module, size: tuple[int, int], segments: bool) -> Callable[[np.ndarray], tuple]:
    """`run(image (H, W, 3))`: prediction, its probability, heat map (of a mask), MACs, all MACs; compiled."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, image: jax.Array) -> tuple:
        logits, trace = traced(nnx.merge(graphdef, state))(image)
        heat = trace.heatmap(size)[0] if segments else None
        sure = jax.nn.softmax(logits[0]).max(-1)
        return logits[0].argmax(-1), sure, heat, trace.macs()[0], trace.full_macs

    return lambda image: jax.device_get(run(state, image[None]))


def draw(
    out: Path, name: str, picture: Image.Image, prediction: np.ndarray, heat: np.ndarray, classes: int, title: str
) -> None:
    """The three files of one picture. The mask is as large as the picture; what is only to be looked at is not."""
    ids = Image.fromarray(prediction.astype(np.uint8 if classes <= 256 else np.int32))
    report.save_mask(out / f"{name}_mask.png", np.asarray(ids.resize(picture.size, Image.Resampling.NEAREST)), classes)
    image = np.asarray(report.preview(picture))
    mask = np.asarray(ids.resize(image.shape[1::-1], Image.Resampling.NEAREST))
    report.save_pictures(out, {f"{name}_overlay": report.overlay(image, mask, classes)})
    report.plot_compute(out / f"{name}_compute.png", image, heat, title=title)


def predict(run: Callable, images: tuple[str, ...], size: tuple[int, int], classes: tuple[str, ...], out: Path) -> int:
    """Masks and maps, or with a `run` without heat maps the table, of all pictures; how many could not be done."""
    failed, table = 0, None
    with contextlib.ExitStack() as stack:
        for path, name in tqdm(list(stems(images)), unit="picture", disable=len(images) < 4 or None):
            try:
                picture = Image.fromarray(read_image(path))
                small = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
                prediction, sure, heat, macs, full = run(small)
                if heat is not None:
                    title = f"{macs / 1e6:.1f} MMAC, {100 * macs / full:.0f} % of all"
                    draw(out, name, picture, prediction, heat, len(classes), title)
                    continue
                # Line by line, so that nothing is lost whatever a later picture does.
                if table is None:
                    file = open(out / "predictions.csv", "w", newline="", encoding="utf-8", buffering=1)
                    table = csv.writer(stack.enter_context(file), lineterminator="\n")
                    table.writerow(("picture", "class", "probability", "macs"))
                told = cli.printable(path), cli.printable(classes[int(prediction)]), f"{sure:.4f}"
                table.writerow((*told, f"{macs:.0f}"))
                tqdm.write("{}: {} ({})".format(*told))
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


def main(raw: list[str]) -> int:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    _, classes = read_config(arguments.workdir)
    config, model, step = checkpoint.load(arguments.workdir)
    config = with_path(config, arguments.data.path)
    known = read_evaluation(arguments.workdir, step)
    model, said = at_budget(model, config, classes, arguments.budget, known)
    if said:
        print(said, file=sys.stderr)
    size = picture_size(config, classes, known)
    run = make_run(model, size, models.task_of(config.model) == "segmentation")
    out, number = cli.make_folder(arguments.out, "out"), len(arguments.images)
    with files.writing(f"in {out}"):
        failed = predict(run, arguments.images, size, classes, out)
    print(f"{out}: {number - failed} of {number} pictures done")
    return cli.BAD_INPUT if failed else 0


if __name__ == "__main__":
    cli.run(main)
