"""Checkpoints of a workdir: written, read, tidied up, and made a model again.

One appears under its name only when its arrays are complete (orbax writes elsewhere and renames); checksums come last
and tell one that was cut or changed later. What else lies in checkpoints/ is left alone.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynjax.config import Config, UserError
from dynjax.core.views import still
from dynjax.run import files, mesh
from dynjax.run.arrays import fill, named_arrays
from dynjax.run.build import build
from dynjax.run.workdir import read_config

KEEP = 3
"""How many checkpoints stay on disk; the newest may turn out to be unreadable."""
SEAL = "checksums.json"
LARGEST_ARRAY = 1 << 40
"""Elements that an array of a checkpoint may have."""


@dataclasses.dataclass
class Sidecar:
    """What a checkpoint holds beside its arrays, one JSON file per process (orbax' StatefulCheckpointable protocol)."""

    content: dict

    @staticmethod
    def file(directory: Any) -> Any:
        return directory / f"process_{jax.process_index()}.json"

    async def save(self, directory: Any) -> Any:
        text = json.dumps(self.content)

        async def write() -> None:
            self.file(await directory.await_creation()).write_text(text)

        return write()

    async def load(self, directory: Any) -> Any:
        async def read() -> None:
            self.content = json.loads(self.file(directory).read_text())

        return read()


def steps(workdir: str | Path) -> list[int]:
    """The steps that have a checkpoint, oldest first. Folders of other names and files are none."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in _inside(folder) if _is_step(path.name) and path.is_dir())


def _is_step(name: str) -> bool:
    """Whether `save` gives this name: 12, but not 012 or ²."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def any_finished(workdir: str | Path) -> bool:
    """Whether there is a checkpoint that was written to its end, readable or not."""
    return any((Path(workdir) / "checkpoints" / str(step) / SEAL).exists() for step in steps(workdir))


def save(workdir: str | Path, step: int, state: Any, position: Any, good: int = -1) -> None:
    """Write every array of `state` and the JSON value `position` as checkpoint `step`; the oldest beyond KEEP go, but
    for the last that is not after step `good`.

    Raises UserError when the disk is full, or the workdir cannot be written or is there no more.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(workdir).resolve() / "checkpoints"
    if not folder.parent.is_dir():
        raise UserError(f"workdir {workdir} is there no more: it was moved or removed while training")
    arrays = named_arrays(state)
    shapes = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
    sidecar = Sidecar({"position": position, "arrays": shapes})
    try:
        folder.mkdir(exist_ok=True)
        if jax.process_index() == 0 and os.path.lexists(folder / str(step)) and not _is_folder(folder / str(step)):
            _move_aside(folder / str(step))
        _check_room(folder, arrays)
        with _orbax(), _quiet():
            ocp.save_checkpointables(folder / str(step), {"state": arrays, "sidecar": sidecar}, overwrite=True)
        if jax.process_index() == 0:
            _seal(folder / str(step))
            kept = steps(workdir)
            safe = max((each for each in kept if each <= good), default=None)
            for old in kept[:-KEEP]:
                if old != safe:
                    _remove(folder / str(old))
        return
    except Exception as error:
        if (reason := _disk_trouble(error)) is None:
            raise
    # Outside of `except`, where nothing refers to the failed tasks any more: they log their own tracebacks as they go.
    with _quiet():
        gc.collect()
        time.sleep(0.5)  # and its threads
    if jax.process_index() == 0:
        _remove_unfinished(folder, step)
    raise UserError(f"cannot write checkpoint {step} in {folder}: {reason}; earlier ones are untouched")


def _check_room(folder: Path, arrays: dict[str, jax.Array]) -> None:
    """Raises OSError where the disk is too full: better than to fail in the middle of writing."""
    needed, free = sum(x.nbytes for x in arrays.values()) + 2**17, shutil.disk_usage(folder).free
    if free < needed:
        text = f"{os.strerror(errno.ENOSPC)} ({free / 1e6:.1f} MB are free, it may take {needed / 1e6:.1f} MB)"
        raise OSError(errno.ENOSPC, text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the logs of orbax and asyncio, which show the traceback of what they raise anyway, and without the
    complaints of tensorstore's threads that nobody waits for them after that."""
    before, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)
    try:
        yield
    finally:
        logging.disable(before)
        sys.unraisablehook = hook


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    """Remove a folder, or the link to one. What cannot be removed (another owner's) stays: no reason to stop."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _remove_unfinished(folder: Path, step: int | None = None) -> None:
    """Remove what orbax left half-written, and checkpoint `step` if it has no checksums."""
    for path in _inside(folder):
        if ".orbax-checkpoint-tmp" in path.name:
            _remove(path)
    if step is not None and _is_folder(folder / str(step)) and not (folder / str(step) / SEAL).exists():
        _remove(folder / str(step))


def _move_aside(path: Path) -> None:
    """Move what cannot be read from checkpoints/ to unreadable/, in the place of an earlier one of this name."""
    aside = path.parents[1] / "unreadable" / path.name
    aside.parent.mkdir(exist_ok=True)
    if os.path.lexists(aside) and not _is_folder(aside):
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _orbax() -> Any:
    """Orbax without cutting replicated arrays into one slice per device, which compiles a program for each."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_replica_parallel = False
    return context


def _disk_trouble(error: BaseException) -> str | None:
    """What is wrong with the disk, in words, or None when `error` is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    troubles = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG)
    return next((os.strerror(number) for number in troubles if os.strerror(number) in str(error)), None)


def _sums(folder: Path) -> dict[str, list[int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): [path.stat().st_size, zlib.crc32(path.read_bytes())] for path in files}


def _seal(folder: Path) -> None:
    """Write the size and checksum of every file; a checkpoint without this was not finished."""
    part = folder / f"{SEAL}.part"
    part.write_text(json.dumps(_sums(folder), indent=0))
    os.replace(part, folder / SEAL)


def _fault(folder: Path) -> str | None:
    """The first file that is not as it was written; orbax itself is loud about damage. None where all are."""
    try:
        wanted = files.typed(files.read_json(folder / SEAL), dict[str, list[int]])
        found = _sums(folder)
    except (OSError, ValueError) as error:
        return f"{SEAL}: {error}"
    changed = (name for name, sums in wanted.items() if found.get(name) != sums)
    return next((f"{name} is {'damaged' if name in found else 'missing'}" for name in changed), None)


def read(workdir: str | Path, step: int, sharding: Any = None) -> tuple[dict[str, jax.Array], Any]:
    """Arrays by name and position of checkpoint `step`. Raises ValueError when anything is missing or changed.

    The position is what this process saved, or process 0 where there were fewer.
    """
    folder = Path(workdir).resolve() / "checkpoints" / str(step)
    if fault := _fault(folder):
        raise ValueError(fault)
    return _read_sealed(folder, sharding)


def _read_sealed(folder: Path, sharding: Any) -> tuple[dict[str, jax.Array], Any]:
    from orbax.checkpoint import v1 as ocp

    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    mine = Sidecar.file(folder / "sidecar")
    shapes, position = _read_sidecar(mine if mine.exists() else mine.with_name("process_0.json"))
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }
    try:
        with _quiet():
            return ocp.load_checkpointables(folder, {"state": wanted})["state"], position
    except Exception as error:  # orbax raises whatever its damaged files lead to
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(first[:200]) from error


def _read_sidecar(path: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], Any]:
    """Shape and type of every array, and the position. Raises ValueError."""
    try:
        content = files.typed(files.read_json(path), dict[str, Any])
        if missing := {"arrays", "position"} - content.keys():
            raise ValueError(f"{sorted(missing)[0]} is missing")
        arrays = files.typed(content["arrays"], dict[str, tuple[tuple[int, ...], str]], "arrays")
        for name, (shape, dtype) in arrays.items():
            try:
                kind = jnp.dtype(dtype)
            except TypeError:
                kind = None
            if kind is None or kind.hasobject or min(shape, default=0) < 0 or math.prod(shape) > LARGEST_ARRAY:
                raise ValueError(f"arrays.{name} is {dtype}{list(shape)}, which is no array")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent.name}/{path.name}: {error}") from None
    return arrays, content["position"]


def read_newest(
    workdir: str | Path, sharding: Any = None, say: Callable[[str], None] | None = None
) -> tuple[int, dict[str, jax.Array], Any] | None:
    """Step, arrays and position of the newest checkpoint that can be read; None when there is none that was finished.

    `say` is told (None: stderr) of every one that had to be passed over. Several processes take the same one: process 0
    looks. Raises UserError when all of them are damaged.
    """
    say = say or (lambda text: print(text, file=sys.stderr))
    first = jax.process_index() == 0
    found, damaged = mesh.of_first(steps(workdir)), []
    for index, step in reversed(list(enumerate(found))):
        folder = Path(workdir).resolve() / "checkpoints" / str(step)
        finished, reason = mesh.of_first([(folder / SEAL).exists(), _fault(folder)] if first else None)
        if reason is None:
            try:
                return step, *_read_sealed(folder, sharding)
            except ValueError as error:
                reason = str(error)
        reason = reason if finished else "it was not finished"
        before = f"falling back to checkpoint {found[index - 1]}" if index else "there is none before it"
        say(f"checkpoint {step} of {workdir} cannot be read ({reason}): {before}")
        damaged += [step] if finished else []
    if damaged:
        raise UserError(
            f"no checkpoint of {workdir} can be read (steps {damaged}): "
            f"remove {Path(workdir) / 'checkpoints'} to train again"
        )
    return None


def tidy(workdir: str | Path, newest: int | None) -> None:
    """Before training goes on from checkpoint `newest`: drop what orbax left half-written, move later ones aside."""
    folder = Path(workdir) / "checkpoints"
    if jax.process_index() != 0:
        return
    _remove_unfinished(folder)
    try:
        for step in steps(workdir):
            if newest is not None and step > newest:
                _move_aside(folder / str(step))
    except OSError as error:
        raise UserError(f"cannot move {error.filename} to {folder.parent / 'unreadable'}: {error.strerror}") from None


# Models


def fill_model(
    template: Any, arrays: dict[str, jax.Array], workdir: str | Path, step: int, row: str, prefix: str = ""
) -> Any:
    """As `fill`, of checkpoint `step` of `workdir`; raises UserError."""
    try:
        return fill(template, arrays, prefix)
    except ValueError as error:
        raise UserError(f"checkpoint {step} of {workdir} does not fit the model of row {row}: {error}") from None


def load(workdir: str | Path) -> tuple[Config, nnx.Module, int]:
    """Configuration, model (averaged parameters, evaluation view) and step of the newest readable checkpoint.

    Raises UserError when there is none.
    """
    config, classes = read_config(workdir)
    newest = read_newest(workdir)
    if newest is None:
        raise UserError(f"workdir {workdir} has no checkpoint yet")
    step, arrays, _ = newest
    graphdef, params, *others = nnx.split(build(config, len(classes)), nnx.Param, ...)
    (rest,) = others
    params = fill_model(params, arrays, workdir, step, config.row, "ema." if config.optimizer.ema else "params.")
    rest = fill_model(rest, arrays, workdir, step, config.row, "rest.")
    return config, still(nnx.merge(graphdef, params, rest)), step
