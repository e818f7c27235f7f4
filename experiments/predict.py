"""Masks and compute maps, or classes: python -m experiments.predict --workdir W --out DIR [--budget 0.5] IMAGE ...

Writes DIR/STEM_mask.png (class ids with a palette) in the picture's own size, DIR/STEM_overlay.png, of at most 2
megapixels, and DIR/STEM_compute.png, where the MACs were spent. A row that classifies writes DIR/predictions.csv:
picture, class, its probability, MACs.
A picture of another size than the model's is resized, or with `--whole windows` looked at in windows that overlap: see
`experiments.deployed`.
A file that is no picture is named on stderr, the others are done, and the exit status is 2.
"""

import contextlib
import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from tqdm.auto import tqdm

from dynjax.config import UserError
from dynjax.data.pictures import read_image
from dynjax.run import files
from dynjax.show import report
from experiments import cli, deployed
from experiments.deployed import Answer

COMMAND = "experiments.predict"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(deployed.Asked):
    images: tyro.conf.Positional[tuple[str, ...]]
    """Pictures of any size."""


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    if not arguments.images:
        raise UserError("no picture given: python -m experiments.predict --workdir W --out DIR IMAGE ...")
    deployed.check(arguments)


def draw(out: Path, name: str, picture: Image.Image, answer: Answer, classes: int) -> None:
    """The three files of one picture. The mask is as large as the picture; what is only to be looked at is not."""
    ids = Image.fromarray(answer.ids.astype(np.uint8 if classes <= 256 else np.int32))
    report.save_mask(out / f"{name}_mask.png", np.asarray(ids.resize(picture.size, Image.Resampling.NEAREST)), classes)
    image = np.asarray(report.preview(picture))
    mask = np.asarray(ids.resize(image.shape[1::-1], Image.Resampling.NEAREST))
    report.save_pictures(out, {f"{name}_overlay": report.overlay(image, mask, classes)})
    title = f"{answer.macs / 1e6:.1f} MMAC, {100 * answer.macs / answer.full:.0f} % of all"
    report.plot_compute(out / f"{name}_compute.png", image, answer.heat, title=title)


def predict(look: Callable[[Image.Image], Answer], images: tuple[str, ...], classes: tuple[str, ...], out: Path) -> int:
    """Masks and maps, or where answers have no heat map the table, of all pictures; how many could not be done."""
    table = None
    with contextlib.ExitStack() as stack:

        def do(path: Path, name: str) -> None:
            nonlocal table
            picture = Image.fromarray(read_image(path))
            answer = look(picture)
            if answer.heat is not None:
                return draw(out, name, picture, answer, len(classes))
            # Line by line, so that nothing is lost whatever a later picture does.
            if table is None:
                file = open(out / "predictions.csv", "w", newline="", encoding="utf-8", buffering=1)
                table = csv.writer(stack.enter_context(file), lineterminator="\n")
                table.writerow(("picture", "class", "probability", "macs"))
            told = cli.printable(path), cli.printable(classes[int(answer.ids)]), f"{answer.sure:.4f}"
            table.writerow((*told, f"{answer.macs:.0f}"))
            tqdm.write("{}: {} ({})".format(*told))

        return deployed.each_picture(list(deployed.stems(images)), do)


def main(raw: list[str]) -> int:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    row = deployed.deploy(arguments)
    out, number = cli.make_folder(arguments.out, "out"), len(arguments.images)
    with files.writing(f"in {out}"):
        failed = predict(row.look, arguments.images, row.classes, out)
    print(f"{out}: {number - failed} of {number} pictures done")
    return cli.BAD_INPUT if failed else 0


if __name__ == "__main__":
    cli.run(main)
