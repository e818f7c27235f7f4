"""Training that is killed or stopped at random moments and resumed ends with the bits of a run that was left alone."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dynjax.run import checkpoint, log

ROOT = Path(__file__).parents[1]
STEPS = 40
COMMAND = f"-m experiments.train digits_unet_tiles --steps {STEPS} --checkpoint-every 7 --evaluate-every 20".split()
COMMAND += "--model.backbone.widths 8 12 --model.backbone.blocks 1 0 --model.head.blocks 1".split()
COMMAND += "--model.dynamics.tiles 4 --data.size 48 48 --data.examples 20 --batch-size 8".split()
LIMIT = 300
"""Seconds after which a process that has not ended hangs."""
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
AT_MOST = 5
"""Interruptions of one run."""


def rounds(seed: int) -> Iterator[list[tuple[str, str | None]]]:
    """A round is one run that is interrupted a few times, always by the same signal."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        _end(start(whole))  # the second has its programs compiled, as those that are resumed
        begun = time.monotonic()
        ended = _end(start(whole.with_name("again")))
        seconds, out = time.monotonic() - begun, ended[1]
        outcomes = [("runs left alone", _differs(whole, whole.with_name("again"), *ended, out))]
        for turn in itertools.count():
            number = SIGNALS[turn % len(SIGNALS)]
            workdir = Path(folder) / f"{turn}"
            outcomes += _interrupted(workdir, number, seconds, rng)
            short = _differs(whole, workdir, *_end(start(workdir)), out)
            yield [*outcomes, (f"the same bits after {number.name}", short)]
            outcomes = []


def _interrupted(workdir: Path, number: signal.Signals, seconds: float, rng: np.random.Generator) -> Iterator:
    for _ in range(int(rng.integers(1, AT_MOST + 1))):
        process = start(workdir)
        trained = _wait(process, workdir, seconds, rng)
        process.send_signal(number)  # nothing happens when it has ended already
        sent = time.monotonic()
        status, _, said = _end(process)
        yield number.name, _answer(number, status, said, trained, time.monotonic() - sent)
        if status == 0:
            return


def _wait(process: subprocess.Popen, workdir: Path, seconds: float, rng: np.random.Generator) -> bool:
    """Until a random moment: one in four anywhere, from the start on, the others once steps are taken.

    Returns whether steps were taken. `seconds` is how long a run takes that is left alone.
    """
    anywhere, metrics = rng.random() < 0.25, workdir / "metrics.jsonl"
    end = time.monotonic() + (0.2 + rng.random() * seconds if anywhere else LIMIT)

    def size() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    before = size()
    while process.poll() is None and time.monotonic() < end and (anywhere or size() <= before):
        time.sleep(0.002)
    if not anywhere:
        time.sleep(rng.random() * 0.3 * seconds)
    return size() > before


def _answer(number: signal.Signals, status: int | None, said: str, trained: bool, seconds: float) -> str | None:
    """How the process that was sent a signal fell short."""
    if status is None:
        return f"it had not ended {LIMIT} s after it"
    if status == 0 or (number is signal.SIGKILL and status == -number):
        return None
    if number is signal.SIGTERM and status == -number and not trained and not said.strip():
        return None  # before there is anything to save
    last = said.strip().splitlines()[-1:] or [""]
    # Before Python has come to the first line of the command its own traceback is no fault of ours.
    if status in (1, -signal.SIGINT) and "KeyboardInterrupt" in said and "/experiments/" not in said:
        return None
    if status != 130 or "Traceback" in said or "stopped" not in last[0]:
        return f"status {status} after {seconds:.1f} s, {said[-500:]!r}"
    return None


def _differs(whole: Path, workdir: Path, status: int | None, again: str, said: str, out: str) -> str | None:
    """How what is in `workdir` at the end, and what the command printed, differs from `whole` and `out`."""
    if status != 0:
        return f"status {status}: {said[-500:]!r}"
    (one, position), (other, other_position) = (checkpoint.read(folder, STEPS) for folder in (whole, workdir))
    if one.keys() != other.keys() or position != other_position:
        return "other arrays, or another position in the data"
    for name, array in one.items():
        if np.asarray(array).tobytes() != np.asarray(other[name]).tobytes():
            return f"{name} has other bits"
    logged = [record["step"] for record in log.read_metrics(workdir) if "loss" in record]
    if logged != list(range(1, STEPS + 1)):
        return f"the steps that were logged are {logged}"
    return None if json.loads(out) == json.loads(again) else f"scores {again}, not {out}"


def start(workdir: Path) -> subprocess.Popen:
    """The command, in a group of its own: Ctrl-C is for the soak run and not for it."""
    return subprocess.Popen(
        [sys.executable, *COMMAND, "--workdir", str(workdir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def _end(process: subprocess.Popen) -> tuple[int | None, str, str]:
    """Exit status (None: it hung and was killed), stdout and stderr."""
    try:
        out, said = process.communicate(timeout=LIMIT)
        return process.returncode, out, said
    except subprocess.TimeoutExpired:
        process.kill()
        return None, *process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
