"""Damaged files of every kind: each gives a result or one clear line, and never another error, a crash or a hang.

They are read by processes of their own (`python tests/soak_files.py WORKDIR`) that have a limit on memory and a limited
time: what crashes or hangs is counted and ends no soak run.
"""

import dataclasses
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import damage  # noqa: E402
import damage_json  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from dynjax.config import DataConfig, UserError  # noqa: E402
from dynjax.data import camvid  # noqa: E402
from dynjax.run import checkpoint, log, train  # noqa: E402
from experiments import deployed, evaluate, results, rows  # noqa: E402

AT_ONCE = 10
"""Files of a kind in a round."""
SECONDS = 120
"""For AT_ONCE files."""
MEMORY = 3 << 30
"""Bytes that a reader may take beyond what it has when it starts."""
READY = "ready\n"


def rounds(seed: int) -> Iterator[list[tuple[str, str | None]]]:
    """A round is some files of every kind."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = _make_workdir(Path(folder) / "w")
        readers = [Reader(workdir) for _ in range(min(4, os.cpu_count() or 1))]
        names, turn = list(KINDS), 0
        try:
            with ThreadPoolExecutor(len(readers)) as threads:
                while True:
                    parts = [names[index :: len(readers)] for index in range(len(readers))]
                    found = threads.map(Reader.ask, readers, parts, [1000 * seed + turn] * len(readers))
                    yield [outcome for each in found for outcome in each]
                    turn += 1
        finally:
            for reader in readers:
                reader.close()


def _make_workdir(folder: Path) -> Path:
    """Two checkpoints of a tiny row, evaluated."""
    config = rows.tiny(rows.get_row("digits_resnet_exits"))
    train.train(dataclasses.replace(config, checkpoint_every=1), folder, quiet=True)
    arguments = "--budgets 0.7 1 --timing 2 --calibration 8 --timing-batches 2".split()
    said, sys.stdout = sys.stdout, io.StringIO()
    try:
        evaluate.main(["--workdir", str(folder), *arguments])
    finally:
        sys.stdout = said
    return folder


# Readers


class Reader:
    """A process that reads damaged files; another takes its place when it crashes or hangs."""

    def __init__(self, workdir: Path):
        self.workdir = workdir
        self.process, self.ready = self._start(), False

    def _start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, __file__, str(self.workdir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,  # Ctrl-C is for the soak run
        )

    def ask(self, names: list[str], seed: int) -> list[tuple[str, str | None]]:
        """What came of AT_ONCE files of each kind."""
        return [(f"damaged {name}", short) for name in names for short in self._ask(name, seed)]

    def _ask(self, name: str, seed: int) -> list[str | None]:
        timer = threading.Timer(SECONDS, self.process.kill)
        try:
            if not self.ready:
                self.ready = self.process.stdout.readline() == READY
            self.process.stdin.write(json.dumps([name, seed]) + "\n")
            self.process.stdin.flush()
            timer.start()
            answer = self.process.stdout.readline()
        except OSError:
            answer = ""
        late = not timer.is_alive() and not answer
        timer.cancel()
        if answer:
            short = json.loads(answer)
            return [*short, *[None] * (AT_ONCE - len(short))]
        self.close()
        status, self.process, self.ready = self.process.returncode, self._start(), False
        why = f"took more than {SECONDS} s" if late else f"ended with {_status(status)}"
        return [f"the process that read files of seed {seed} {why}"] + [None] * (AT_ONCE - 1)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def serve(workdir: Path) -> None:
    """Answer lines of [kind, seed] by a list of what fell short."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        _watch_ghostscript(Path(folder))
        checkpoint.load(workdir)
        jax.device_get(jax.jit(lambda x: x + 1)(0))
        _limit_memory()
        answers.write(READY)
        answers.flush()
        for line in sys.stdin:
            name, seed = json.loads(line)
            place = Path(folder) / "files"
            place.mkdir()
            found = KINDS[name](workdir, place, seed)
            shutil.rmtree(place)
            print(json.dumps(found), file=answers, flush=True)


def _limit_memory() -> None:
    """Where it can be read how much there is now: Linux."""
    if (used := Path("/proc/self/statm")).exists():
        limit = int(used.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# Kinds: (a good workdir, an empty folder, a seed) -> what fell short of AT_ONCE damaged files

Kind = Callable[[Path, Path, int], list[str]]


def _short(what: str, read: Callable[[], Any]) -> list[str]:
    try:
        read()
    except (UserError, damage.BadFile) as error:
        said = str(error)
        return [] if said and "\n" not in said and len(said) < 1000 else [f"{what}: {said[:1500]!r}"]
    except BaseException as error:
        return [f"{what}: {type(error).__name__}: {str(error)[:300]}"]
    return []


def _of_source(name: str) -> Kind:
    return lambda workdir, folder, seed: damage.short_of(name, folder, AT_ONCE, seed)


def _lists(workdir: Path, folder: Path, seed: int) -> list[str]:
    for part in ("train", "trainannot"):
        (folder / part).mkdir()
        for name in ("a", "b c"):
            values = np.random.default_rng(0).integers(0, 12, (6, 8, 3), np.uint8)
            Image.fromarray(values if part == "train" else values[..., 0]).save(folder / part / f"{name}.png")
    good = b"/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\ntrain/a.png trainannot/a.png\n" * 3
    found = []
    for number, content in enumerate(damage.damaged(good, AT_ONCE, seed)):
        (folder / "train.txt").write_bytes(content)
        found += _short(f"{seed}, {number}", lambda: camvid.make(DataConfig(name="camvid", path=str(folder)), "train"))
    return found


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"


def _watch_ghostscript(folder: Path) -> None:
    """A `gs` first in the path that leaves a mark when it is run."""
    script = folder / "gs"
    script.write_text(f"#!/bin/sh\ntouch {folder}/ran\necho 10.0\n")
    script.chmod(0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


def _other_formats(workdir: Path, folder: Path, seed: int) -> list[str]:
    """What is another format than its name says; PostScript among them, which must not be run."""
    rng, mark, found = random.Random(seed), folder.parent / "ran", []
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8))
    for number in range(AT_ONCE):
        file, form = folder / f"x{rng.choice(('.png', '.jpg', '.tif', '.bmp', '.webp'))}", "EPS"
        if number % 2:
            form = rng.choice(("GIF", "PPM", "PCX", "ICO", "TGA", "SGI", "PDF", "JPEG2000"))
            stream = io.BytesIO()
            picture.save(stream, form)
            file.write_bytes(stream.getvalue())
        else:
            file.write_bytes(next(iter(damage.damaged(EPS, 1, seed * AT_ONCE + number))) if number > 2 else EPS)
        what = f"{seed}, {number}: {form} called {file.suffix}"
        found += _short(what, functools.partial(damage.read_image, file))
        if mark.exists():
            mark.unlink()
            found.append(f"{what}: Ghostscript was run")
    return found


def _copy(workdir: Path, folder: Path) -> Path:
    """Of a workdir what is read again."""
    copy = folder / "w"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("tensorboard", "*.png", "examples"))
    return copy


def _document(name: str, read: Callable[[Path], Any]) -> Kind:
    """A JSON file of a workdir; of lines of JSON the first."""

    def kind(workdir: Path, folder: Path, seed: int) -> list[str]:
        copy, found = _copy(workdir, folder), []
        (file,) = copy.glob(name)
        first, *others = file.read_text().splitlines(True) if name.endswith("l") else [file.read_text()]
        for what, content in damage_json.mutants(first, seed, AT_ONCE):
            file.write_bytes(content + "\n".join(["", *others]).encode())
            found += _short(what, lambda: read(copy))
        return found

    return kind


def _read_evaluation(workdir: Path) -> None:
    deployed.read_evaluation(str(workdir), 2)
    results.collect((str(workdir),), "")


def _read_sidecar(workdir: Path) -> None:
    """With checksums that say that it is as it should be."""
    checkpoint._seal(workdir / "checkpoints" / "2")
    checkpoint.load(workdir)


def _changed(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content) or 1)])


@functools.cache
def _saved(workdir: Path) -> dict[int, dict[str, bytes]]:
    """The bytes of every array of every checkpoint."""
    return {step: _bytes(checkpoint.read(workdir, step)[0]) for step in checkpoint.steps(workdir)}


def _bytes(arrays: dict[str, jax.Array]) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def _checkpoint(spoil: Callable[[Path, random.Random], Any]) -> Kind:
    """One file of the newest checkpoint, and in one case of four of the one before too."""

    def kind(workdir: Path, folder: Path, seed: int) -> list[str]:
        rng, found, saved = random.Random(seed), [], _saved(workdir)
        for _ in range(AT_ONCE):
            copy = _copy(workdir, folder)
            for step in sorted(saved, reverse=True)[: 1 + (rng.random() < 0.25)]:
                files = sorted(path for path in (copy / "checkpoints" / str(step)).rglob("*") if path.is_file())
                file = rng.choice(files)
                spoil(file, rng)
            what = f"{seed}: {file.relative_to(copy)}"
            found += _short(what, functools.partial(_read_newest, copy, saved))
        return found

    return kind


def _read_newest(workdir: Path, saved: dict[int, dict[str, bytes]]) -> None:
    said: list[str] = []
    newest = checkpoint.read_newest(workdir, say=said.append)
    assert newest is None or _bytes(newest[1]) == saved[newest[0]], f"other bits in checkpoint {newest[0]}"
    assert said or (newest is not None and newest[0] == max(saved)), "nothing was said"
    assert not [line for line in said if "\n" in line], said


KINDS: dict[str, Kind] = {
    **{name: _of_source(name) for name in damage.names()},
    "CamVid list": _lists,
    "picture of another format": _other_formats,
    "config.json": _document("config.json", checkpoint.load),
    "evaluation.json": _document("evaluation.json", _read_evaluation),
    "metrics.jsonl": _document("metrics.jsonl", log.read_metrics),
    "sidecar of a checkpoint": _document("checkpoints/2/sidecar/process_0.json", _read_sidecar),
    "checkpoint, a bit": _checkpoint(_changed),
    "checkpoint, cut": _checkpoint(_cut),
    "checkpoint, a file gone": _checkpoint(lambda file, rng: file.unlink()),
}

if __name__ == "__main__":
    serve(Path(sys.argv[1]))
