"""What a run says while it runs: one JSON line a step, TensorBoard, a progress bar. Only process 0 writes."""

import contextlib
import io
import json
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from dynjax.config import UserError
from dynjax.run import files
from dynjax.show import film

SHOWN = {"miou": "mIoU", "accuracy": "accuracy", "bits_per_dim": "bits/dim", "frechet": "distance"}
"""Scores that the progress bar has, and how they are called there."""
LEFT_OUT = frozenset({"class_dice", "class_boundary_f1"})
"""Scores, one a class, that are not recorded while a run trains: its log has the IoU of each class."""


def read_metrics(workdir: str | Path) -> list[dict]:
    """The records of `workdir`/metrics.jsonl, oldest first, without lines that are none, such as one that a killed run
    left half-written. Raises UserError where the file cannot be read."""
    path = Path(workdir) / "metrics.jsonl"
    records = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            record = files.parse_json(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def finite(value: Any) -> Any:
    """`value` with None for floats that are not finite (the IoU of a class that does not occur): JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluated(workdir: str | Path, step: int) -> bool:
    """Whether the log has scores of `step`."""
    return any(r.get("step") == step and any(name.startswith("val/") for name in r) for r in read_metrics(workdir))


def _append(file: IO[bytes], data: bytes) -> None:
    """Write all of it to an unbuffered file: buffers keep what a full disk refused, and fail again at their end."""
    while data:
        data = data[file.write(data) :]


class _Board:
    """Scalars for TensorBoard, written here and now: tensorboardX' own writer is a thread that nobody hears fail, with
    a queue that needs /dev/shm."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(folder / name, "ab", buffering=0)
        self.waiting, self.written = b"", time.monotonic()
        self._add(Event(file_version="brain.Event:2"))
        # TensorBoard drops what an earlier file has of later steps.
        self._add(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        try:
            self.flush()
        except OSError:
            self.file.close()
            raise

    def add(self, name: str, value: float, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self._add(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() > self.written + 30:
            self.flush()

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """A picture (H, W, 3)."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import image as summary

        self._add(Event(step=step, summary=summary(name, image, dataformats="HWC")))
        self.flush()

    def _add(self, event: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        self.waiting += size + struct.pack("<I", masked_crc32c(size)) + data + struct.pack("<I", masked_crc32c(data))

    def flush(self) -> None:
        waiting, self.waiting, self.written = self.waiting, b"", time.monotonic()
        _append(self.file, waiting)


class Log:
    """Writes metrics.jsonl and tensorboard/ under `workdir` (None: nothing is written) and shows progress on stderr.

    A record is {"step": n, "time": seconds since 1970, ...}; metrics of training carry plain names, scores "val/...".
    Records after step `start` are of steps that a resumed run takes again: they are dropped.
    """

    def __init__(
        self, workdir: str | Path | None, *, start: int, steps: int, images_per_step: int, quiet: bool = False
    ):
        self.images_per_step = images_per_step
        self.file: io.FileIO | None = None
        self.board: _Board | None = None
        self.bar: Any = None
        self.shown: dict[str, str] = {}
        self.clock = time.perf_counter()
        self.seconds_per_step: float | None = None
        if jax.process_index() != 0:
            return
        if workdir is not None:
            self._open(Path(workdir), start)
        if not quiet:
            from tqdm.auto import tqdm

            interval = 0.5 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=interval, dynamic_ncols=True)

    def _open(self, workdir: Path, start: int) -> None:
        try:
            kept = [record for record in read_metrics(workdir) if record["step"] <= start]
            part = workdir / "metrics.jsonl.part"
            try:
                part.write_text("".join(json.dumps(finite(record)) + "\n" for record in kept))
                os.replace(part, workdir / "metrics.jsonl")
            finally:
                part.unlink(missing_ok=True)
            self.file = open(workdir / "metrics.jsonl", "ab", buffering=0)
            self.board = _Board(workdir / "tensorboard", start)
        except OSError as error:
            self.close()
            raise UserError(f"cannot write the log in {workdir}: {error.strerror or error}") from None

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of step `step` (counted from 1) and move the bar there."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        # The first step compiles: it is no measure of speed. After it, a running mean over about twenty steps.
        if self.seconds_per_step is None:
            self.seconds_per_step = math.inf
        elif math.isinf(self.seconds_per_step):
            self.seconds_per_step = seconds
        else:
            self.seconds_per_step += 0.05 * (seconds - self.seconds_per_step)
        rate = self.images_per_step / self.seconds_per_step
        self._write(step, {**metrics, "images_per_second": rate})
        self.shown |= {"loss": f"{metrics['loss']:.3f}"}
        if "macs_fraction" in metrics:
            self.shown |= {"MACs": f"{metrics['macs_fraction']:.0%}"}
        self.shown |= {"images/s": f"{rate:.1f}"}
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of an evaluation after `step` steps; its time does not count as training time."""
        self._write(step, {f"val/{name}": value for name, value in scores.items() if name not in LEFT_OUT})
        for score, name in SHOWN.items():
            if score not in scores:
                continue
            self.shown = {name: f"{scores[score]:.3f}"} | {k: v for k, v in self.shown.items() if k != name}
            if self.bar is not None:
                self.bar.set_postfix(self.shown, refresh=False)
        self.clock = time.perf_counter()

    def pictures(self, step: int, images: np.ndarray) -> None:
        """Keep what is drawn after `step` steps (N, H, W, 3): samples/STEP.png, and in TensorBoard."""
        if self.file is None or self.board is None:
            return
        sheet = film.tile(images, math.ceil(math.sqrt(len(images)))).repeat(2, 0).repeat(2, 1)
        folder = Path(self.file.name).parent / "samples"
        with files.writing(f"in {folder}"):
            folder.mkdir(exist_ok=True)
            (folder / f"{step:07d}.png").write_bytes(film.png(sheet))
            self.board.picture("samples", sheet, step)
        self.clock = time.perf_counter()

    def pause(self) -> None:
        """Leave the time since the last record out of the images per second (a checkpoint was written)."""
        self.clock = time.perf_counter()

    def say(self, text: str) -> None:
        """One line for the person at the terminal, without breaking the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def _write(self, step: int, record: Mapping[str, float]) -> None:
        if self.file is None or self.board is None:
            return
        with files.writing(self.file.name):
            if os.fstat(self.file.fileno()).st_nlink == 0:
                raise UserError(f"{self.file.name} was removed while training")
            line = json.dumps(finite({"step": step, "time": round(time.time(), 3), **record})) + "\n"
            _append(self.file, line.encode())
            for name, value in record.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self.board.add(name if "/" in name else f"train/{name}", value, step)

    def flush(self) -> None:
        """Write what TensorBoard still waits for. Raises UserError."""
        if self.board is not None:
            with files.writing(self.board.file.name):
                self.board.flush()

    def close(self) -> None:
        """Without a word about what cannot be written: by then it was said, or `flush` says it."""
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            with contextlib.suppress(OSError):
                self.board.flush()
            self.board.file.close()
        if self.file is not None:
            self.file.close()
