"""Proposed masks for pictures without: python -m experiments.label --workdir W --out DIR [--unsure 0.9] FOLDER

For every picture of FOLDER (not of folders inside it), in the layout of data.name=folder, so that DIR can be moved to
PATH/train:

images/NAME        a copy
masks/STEM.png     the proposed class ids, 8-bit with a palette, in the picture's own size; with --ignore-unsure 255,
                   which is ignored in training, where the model is not sure
unsure/STEM.png    the picture, of at most 2 megapixels, and in red where its class's probability is below --unsure
labels.csv         picture, share of unsure pixels, mean probability, MACs; least sure first when the command has ended
classes.txt        the names of the classes, one a line; its place is PATH
label.json         by what the masks were made; `lock` keeps a second command out meanwhile

A mask that is there is never written again: after Ctrl-C the same command goes on with the pictures that have none, and
what a person has corrected stays. A file that is no picture is named on stderr, the others are done, and the exit
status is 2.
"""

import csv
import dataclasses
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from dynjax import models
from dynjax.config import UserError
from dynjax.data.files import IGNORE_255
from dynjax.data.pictures import IMAGE_SUFFIXES, read_image
from dynjax.run import files, lock
from dynjax.run.workdir import read_config
from dynjax.show import report
from experiments import cli, deployed
from experiments.deployed import Answer, Deployed

COMMAND = "experiments.label"
COLUMNS = ("picture", "unsure", "probability", "macs")
OWN = ("images", "masks", "unsure")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(deployed.Asked):
    folder: tyro.conf.Positional[str] = ""
    """Folder of pictures."""
    unsure: float = 0.9
    """A pixel is unsure where the probability of its class is below this."""
    ignore_unsure: bool = False
    """Write unsure pixels as 255, which is ignored in training."""


@dataclasses.dataclass(frozen=True)
class Made:
    """By what the masks of a folder were made; the same command goes on, another is refused."""

    folder: str
    row: str
    step: int
    budget: float
    whole: str
    overlap: float | None
    unsure: float
    ignore_unsure: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """Of labels.csv."""

    picture: str
    unsure: float
    probability: float
    macs: int

    def cells(self) -> tuple[str, ...]:
        return self.picture, f"{self.unsure:.4f}", f"{self.probability:.4f}", f"{self.macs}"


def check(arguments: Arguments) -> None:
    """Raises UserError."""
    if not arguments.folder:
        raise UserError(f"no folder given: python -m {COMMAND} --workdir W --out DIR FOLDER")
    deployed.check(arguments)
    if not 0 <= arguments.unsure <= 1:
        raise UserError(f"--unsure {arguments.unsure:g} must be a probability in [0, 1]")
    config, classes = read_config(arguments.workdir)
    if not deployed.segments(config):
        task = models.task_of(config.model)
        raise UserError(f"--workdir {arguments.workdir}: row {config.row} is of {task} and has no masks to propose")
    if len(classes) > IGNORE_255:
        raise UserError(
            f"row {config.row} has {len(classes)} classes, an 8-bit mask holds {IGNORE_255} and what is ignored"
        )
    folder, out = Path(arguments.folder), Path(arguments.out)
    if not folder.is_dir():
        what = "it is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"FOLDER {arguments.folder}: {what}; give a folder of pictures")
    if folder.resolve() in (out.resolve(), *((out / each).resolve() for each in OWN)):
        raise UserError(f"FOLDER {arguments.folder} is where --out {arguments.out} writes: give another --out")


def pictures_of(folder: Path, out: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder by their name's end, sorted, and those whose masks would have the name of another's;
    says what is left out. Raises UserError where there is none."""
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"FOLDER {folder}: {error.strerror or error}") from None
    found = [path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]
    if not found:
        folders = ", only folders, whose pictures are not taken" if any(path.is_dir() for path in inside) else ""
        raise UserError(f"FOLDER {folder}: no picture in it ({' '.join(IMAGE_SUFFIXES)}){folders}")
    if len(found) < len(inside):
        what = (
            f"{folder}: {len(inside) - len(found)} files and folders left out that are not {' '.join(IMAGE_SUFFIXES)}"
        )
        print(cli.printable(what), file=sys.stderr)
    first: dict[str, Path] = {}
    for path in sorted(
        found, key=lambda path: not (out / "images" / path.name).exists()
    ):  # those begun keep their name
        first.setdefault(path.stem, path)
    return sorted(first.values()), [path for path in found if first[path.stem] != path]


def claim(out: Path, made: Made, classes: tuple[str, ...]) -> None:
    """That this folder is for these masks. Raises UserError where it has others."""
    path = out / "label.json"
    if path.exists():
        try:
            there = files.typed(files.read_json(path), Made)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; give another --out") from None
        then, now = dataclasses.asdict(there), dataclasses.asdict(made)
        if changed := [f"{name} is {then[name]} there and {now[name]} here" for name in now if then[name] != now[name]]:
            raise UserError(f"--out {out} has masks that were made otherwise: {'; '.join(changed)}: give another --out")
    elif there := [name for name in (*OWN, "labels.csv", "classes.txt") if (out / name).exists()]:
        raise UserError(f"--out {out} has {there[0]}, which is not of this command: give another --out")
    text = json.dumps(dataclasses.asdict(made), indent=1) + "\n"
    write(path, lambda part: part.write_text(text, encoding="utf-8"))
    for name in OWN:
        (out / name).mkdir(exist_ok=True)
        for left in (out / name).glob(".part.*"):
            left.unlink()
    names = "".join(f"{' '.join(cli.printable(name).split())}\n" for name in classes)
    write(out / "classes.txt", lambda part: part.write_text(names, encoding="utf-8"))


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Whole or not at all, whatever ends this process; what is left of one is hidden, and `claim` removes it."""
    part = path.with_name(f".part{path.suffix}")
    make(part)
    os.replace(part, path)


def read_lines(path: Path) -> dict[str, Line]:
    """labels.csv by picture, the last line of each; one that was cut off is not there. Raises UserError."""
    try:
        text = path.read_bytes().decode("utf-8") if path.exists() else ""
        rows = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        if rows and tuple(rows[0]) != COLUMNS:
            raise ValueError(f"its first line must be {','.join(COLUMNS)}")
        lines = [Line(name, float(unsure), float(sure), int(macs)) for name, unsure, sure, macs in rows[1:]]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}; move it away, the masks stay") from None
    return {line.picture: line for line in lines}


def write_lines(path: Path, lines: dict[str, Line]) -> None:
    """Least sure first."""
    order = sorted(lines.values(), key=lambda line: (-line.unsure, line.probability))

    def make(part: Path) -> None:
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *(line.cells() for line in order)])

    write(path, make)


def marked(picture: Image.Image, unsure: np.ndarray) -> Image.Image:
    """What a person looks at: a pixel of it is marked where any of those that it stands for is unsure."""
    small = report.preview(picture)
    share = Image.fromarray(np.where(unsure, np.uint8(255), np.uint8(0))).resize(small.size, Image.Resampling.BOX)
    return Image.fromarray(report.mark(np.asarray(small), np.asarray(share) > 0))


def label(
    look: Callable[[Image.Image], Answer], images: list[tuple[Path, str]], out: Path, arguments: Arguments, classes: int
) -> int:
    """The files of all pictures, and their lines in labels.csv; how many could not be done."""
    # Its last lines may be of pictures whose masks were not written any more.
    table, again = out / "labels.csv", {cli.printable(path.name) for path, _ in images}
    write_lines(table, {name: line for name, line in read_lines(table).items() if name not in again})
    with open(table, "a", newline="", encoding="utf-8", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")

        def do(path: Path, name: str) -> None:
            picture = Image.fromarray(read_image(path))
            answer = look(picture)
            unsure = answer.sure < arguments.unsure
            ids = answer.ids.astype(np.uint8)
            if arguments.ignore_unsure:
                ids = np.where(unsure, np.uint8(IGNORE_255), ids)
            mask = np.asarray(Image.fromarray(ids).resize(picture.size, Image.Resampling.NEAREST))
            write(out / "images" / path.name, lambda part: shutil.copyfile(path, part))
            write(out / "unsure" / f"{name}.png", marked(picture, unsure).save)
            line = Line(cli.printable(path.name), float(unsure.mean()), float(answer.sure.mean()), round(answer.macs))
            writer.writerow(line.cells())
            # Last, since it says that all is there.
            write(out / "masks" / f"{name}.png", lambda part: report.save_mask(part, mask, classes))

        failed = deployed.each_picture(images, do)
    write_lines(table, read_lines(table))
    return failed


def settings(arguments: Arguments, row: Deployed) -> Made:
    target = row.config.budget.target if arguments.budget is None else arguments.budget
    return Made(
        folder=cli.printable(Path(arguments.folder).resolve()),
        row=row.config.row,
        step=row.step,
        budget=1.0 if models.is_static(row.config.model) else target,
        whole=row.whole,
        overlap=row.overlap,
        unsure=arguments.unsure,
        ignore_unsure=arguments.ignore_unsure,
    )


def main(raw: list[str]) -> int:
    arguments = cli.parse(Arguments, raw, command=COMMAND)
    check(arguments)
    found, second = pictures_of(Path(arguments.folder), Path(arguments.out))
    row = deployed.deploy(arguments)
    out = cli.make_folder(arguments.out, "out")
    with files.writing(f"in {out}"), lock.hold(out, "out"):
        claim(out, settings(arguments, row), row.classes)
        wanted = [(path, path.stem) for path in found if not (out / "masks" / f"{path.stem}.png").exists()]
        if there := len(found) - len(wanted):
            print(f"{out}: {there} of {len(found)} pictures have a mask already and are left as they are")
        failed = label(row.look, wanted, out, arguments, len(row.classes))
    for path in second:
        what = f"error: {path}: another picture is called {path.stem} too, and has the mask of that name; rename one"
        print(cli.printable(what), file=sys.stderr)
    failed += len(second)
    number = len(found) + len(second)
    print(f"{out}: {number - failed} of {number} pictures have masks; {out / 'labels.csv'} names the least sure first")
    return cli.BAD_INPUT if failed else 0


if __name__ == "__main__":
    cli.run(main)
