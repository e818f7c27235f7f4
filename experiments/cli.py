"""What every command shares: arguments as dataclasses, bad input as one line on stderr with exit status 2."""

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import tyro

from dynjax.config import UserError
from dynjax.run import files, mesh

T = TypeVar("T")

BAD_INPUT, STOPPED = 2, 130


def parse(kind: type[T], arguments: Sequence[str], *, command: str, default: T | None = None) -> T:
    """The dataclass `kind` from arguments (tyro). --help prints and exits; raises UserError in one line."""
    said = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(arguments), prog=command, **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_one_line(said.getvalue())} (python -m {command} --help lists the options)") from None


def _one_line(box: str) -> str:
    """The message in tyro's box, and the options that it suggests."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.strip()]
    # The title is in the frame; where the terminal is not UTF-8 it is a line of its own with a rule under it.
    lines = lines[1:-1] if lines and lines[0].startswith("╭") else lines[2:]
    breaks = [i for i, line in enumerate(lines) if not line.strip("─-")] + [len(lines)]
    options = [line.split()[0] for line in lines if line.startswith("--") and line.strip("-")]
    message = " ".join(" ".join(lines[: breaks[0]]).split()).partition(" Got errors:")[0]
    if message.startswith("Missing from"):
        return f"missing: {', '.join(options)}"
    return message + (f"; perhaps you meant {' or '.join(options)}" if "Perhaps you meant:" in lines else "")


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/dynjax/xla, if that can be made."""
    try:
        folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "dynjax" / "xla")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nobody knows a home
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def use_all_cores(batch_size: int, accumulate: int = 1) -> None:
    """On a CPU, one device for each core, as far as they share a batch equally in parts of at least 4 examples.

    XLA's gradients of convolutions use one core of a CPU device. Does nothing where the number of CPU devices is given
    (XLA_FLAGS, JAX_NUM_CPU_DEVICES) or training is distributed, whose processes bring their own.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    distributed = os.environ.get("JAX_NUM_PROCESSES") or os.environ.get("DYNJAX_DISTRIBUTED")
    if given or distributed or jax.config.jax_num_cpu_devices != -1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    part = 4 * max(accumulate, 1)
    fitting = [n for n in range(1, cores + 1) if batch_size % (n * max(accumulate, 1)) == 0 and batch_size >= n * part]
    jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


def printable(text: Any) -> str:
    """As text that any UTF-8 file or terminal takes: bytes of a file's name that are not UTF-8 become \\udcXX."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def check_least(arguments: object, *names: str) -> None:
    """Raises UserError for an option that is given and is less than 1."""
    for name in names:
        if (value := vars(arguments)[name]) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def check_folder(path: str, option: str) -> None:
    """Raises UserError where the folder that an option names cannot be made or written in; makes nothing."""
    if not path:
        raise UserError(f"--{option} is empty: give a folder")
    if trouble := files.folder_trouble(path):
        raise UserError(f"--{option} {path}: {trouble}")


def make_folder(path: str, option: str) -> Path:
    """The folder that an option names, made where it is missing. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{option} {path}: {error.strerror or error}") from None
    return Path(path)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a command and exit with the status it returns (None: 0), 2 after one line for a UserError, 130 after Ctrl-C.

    Any other exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names of files may be no UTF-8, and what the terminal cannot show must not end a command.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        use_compilation_cache()
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        _leave_the_others(BAD_INPUT)
        status = BAD_INPUT
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        _leave_the_others(STOPPED)
        status = STOPPED
    except Exception as error:
        _blame_the_others(error)
        raise
    sys.exit(status or 0)


def _leave_the_others(status: int) -> None:
    """End this process of several at once: on its way out JAX would wait for the others, and they wait for this one.

    The first process ends last, since with it all the others end.
    """
    if jax.distributed.is_initialized():
        time.sleep(2 if jax.process_index() == 0 else 0)
        sys.stderr.flush()
        os._exit(status)


def _blame_the_others(error: Exception) -> None:
    """Where an error may come from another process that is gone, wait for JAX, which finds out and ends this one."""
    if not jax.distributed.is_initialized():
        return
    traceback.print_exc()
    said = "".join(traceback.format_exception(error))
    if any(word in said for word in ("Gloo", "NCCL", "UNAVAILABLE", "coordination", "DEADLINE_EXCEEDED")):
        time.sleep(mesh.seconds_to_wait() + 30)
    sys.stderr.flush()
    os._exit(1)
