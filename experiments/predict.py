"""Masks and compute maps, or classes: python -m experiments.predict --workdir W --out DIR [--budget 0.5] IMAGE ...

Writes DIR/STEM_mask.png (class ids with a palette) and DIR/STEM_overlay.png in the picture's own size, and
DIR/STEM_compute.png, where the MACs were spent. A row that classifies writes DIR/predictions.csv: picture, class,
its probability, MACs.
A file that is no picture is named on stderr, the others are done, and the exit status is 2.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from dynjax.config import Config, UserError
from experiments import cli
from experiments.evaluate import Place, find_twin, with_path

COMMAND = "experiments.predict"
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


def read_evaluation(workdir: str, step: int) -> dict:
    """What experiments.evaluate left in the workdir, if it was for this step; else empty."""
    try:
        found = json.loads((Path(workdir) / "evaluation.json").read_text())
        return found if found["step"] == step else {}
    except (OSError, ValueError, KeyError):
        return {}


def at_budget(model: Any, config: Config, classes: int, budget: float | None, known: dict) -> Any:
    """The model as it skips: with the threshold that evaluate solved, otherwise solved on val now. Raises UserError."""
    from flax import nnx

    from dynjax.budget import set_threshold
    from dynjax.data import calibration_batches, make_source
    from dynjax.deploy import compact
    from dynjax.evaluate import solve, static_macs

    if config.model.dynamics == "static":
        if budget not in (None, 1.0):
            raise UserError(f"--budget {budget:g}: row {config.row} is static, it always spends all of its MACs")
        return model
    budget = config.budget.target if budget is None else budget
    threshold = known.get("thresholds", {}).get(f"{budget:g}")
    if threshold is not None:
        model = nnx.clone(compact(model))
        set_threshold(model, threshold)
        return model
    try:
        val = make_source(config.data, "val")
    except UserError as error:
        hint = f"run experiments.evaluate with --budgets {budget:g} first"
        raise UserError(f"budget {budget:g} must be solved on val: {error}; or {hint}") from None
    size, count = CALIBRATION
    twin, _ = find_twin(dataclasses.replace(config, init_from=""), classes, "")
    pictures = calibration_batches(val, min(size, len(val)), count)
    return solve(model, static_macs(twin, val.size), [budget], pictures)[budget]


def picture_size(config: Config, known: dict) -> tuple[int, int]:
    """Height and width that the model works at."""
    from dynjax.data import make_source

    if config.data.size or known.get("size"):
        return tuple(config.data.size or known["size"])
    return make_source(config.data, "val").size


def stems(images: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Each picture and the name of its results: its stem, numbered where an earlier picture has the same."""
    taken: set[str] = set()
    for image in map(Path, images):
        name, number = image.stem, 1
        while name in taken:
            number += 1
            name = f"{image.stem}-{number}"
        if number > 1:
            print(
                f"{image}: another picture is called {image.stem} too, this one's results are {name}_*.png",
                file=sys.stderr,
            )
        taken.add(name)
        yield image, name


def main(raw: list[str]) -> int:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    if not arguments.images:
        raise UserError("no picture given: python -m experiments.predict --workdir W --out DIR IMAGE ...")
    if arguments.budget is not None and not 0 < arguments.budget <= 1:
        raise UserError(f"--budget {arguments.budget:g}: a budget is a share of the static twin's MACs, in (0, 1]")

    import jax
    import numpy as np
    from flax import nnx
    from PIL import Image
    from tqdm.auto import tqdm

    from dynjax import checkpoint, models, report
    from dynjax.data.pictures import BadFile, read_image
    from dynjax.trace import traced

    out = cli.make_folder(arguments.out, "out")
    _, classes = checkpoint.read_config(arguments.workdir)
    config, model, step = checkpoint.load(arguments.workdir)
    config = with_path(config, arguments.data.path)
    known = read_evaluation(arguments.workdir, step)
    graphdef, state = nnx.split(at_budget(model, config, len(classes), arguments.budget, known))
    height, width = picture_size(config, known)

    segments = models.segments(config.model)

    @jax.jit
    def run(state: nnx.State, image: jax.Array) -> tuple:
        logits, trace = traced(nnx.merge(graphdef, state))(image)
        heat = trace.heatmap((height, width))[0] if segments else None
        sure = jax.nn.softmax(logits[0]).max(-1)
        return logits[0].argmax(-1), sure, heat, trace.macs()[0], trace.full_macs

    failed, found = 0, []
    for path, name in tqdm(list(stems(arguments.images)), unit="picture", disable=len(arguments.images) < 4 or None):
        try:
            image = read_image(path)
        except BadFile as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        own = image.shape[1::-1]
        small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        prediction, sure, heat, macs, full = jax.device_get(run(state, small[None]))
        if not segments:
            found.append((str(path), classes[int(prediction)], f"{sure:.4f}", f"{macs:.0f}"))
            continue
        mask = np.asarray(Image.fromarray(prediction.astype(np.uint8)).resize(own, Image.Resampling.NEAREST))
        title = f"{macs / 1e6:.1f} MMAC, {100 * macs / full:.0f} % of all"
        try:
            report.save_mask(out / f"{name}_mask.png", mask, len(classes))
            report.save_pictures(out, {f"{name}_overlay": report.overlay(image, mask.astype(np.int32), len(classes))})
            report.plot_compute(out / f"{name}_compute.png", image, heat, title=title)
        except OSError as error:
            raise UserError(f"cannot write in {out}: {error.strerror or error}") from None
    if not segments:
        try:
            with open(out / "predictions.csv", "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("picture", "class", "probability", "macs"), *found])
        except OSError as error:
            raise UserError(f"cannot write in {out}: {error.strerror or error}") from None
        print("\n".join(f"{path}: {name} ({probability})" for path, name, probability, _ in found))
    print(f"{out}: {len(arguments.images) - failed} of {len(arguments.images)} pictures done")
    return cli.BAD_INPUT if failed else 0


if __name__ == "__main__":
    cli.run(main)
