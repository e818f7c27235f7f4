"""Workdirs: what a run leaves on disk, and how the same command finds its way back.

    config.json            the configuration, the names of the classes and the number of training examples
    checkpoints/STEP/      orbax: every array of the training state; sidecar/: data position per process; checksums.json
    unreadable/            checkpoints that could not be read, moved aside
    lock                   held by the run that trains here (lock.py)

A checkpoint appears under its name only when its arrays are complete (orbax writes elsewhere and renames); checksums
come last and tell one that was cut or changed later. What else lies in checkpoints/ is left alone.
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

from dynjax import models
from dynjax.config import Config, UserError
from dynjax.core.views import still
from dynjax.run import checks, files, mesh

KEEP = 3
"""How many checkpoints stay on disk; the newest may turn out to be unreadable."""

SEAL = "checksums.json"

SMALL = 512
"""A model whose options are no larger is not looked at for its memory: that takes seconds."""

LARGEST_ARRAY = 1 << 40
"""Elements that an array of a checkpoint may have."""

FREE_TO_CHANGE = ("checkpoint_every", "evaluate_every", "data.path", "init_from")
"""Fields that a resumed run may change: they say when to look at the numbers, or where things are now, and never what
the numbers are."""


# Configuration on disk


def config_to_dict(config: Config) -> dict:
    """The configuration as JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@dataclasses.dataclass(frozen=True)
class Run:
    """What config.json says of a run."""

    config: Config
    classes: tuple[str, ...]
    """Names, in the order of the model's outputs."""
    examples: int | None = None
    """Of the training data; None where nobody said."""


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """The fields of nested dicts by their path, such as budget.target."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_run(workdir: str | Path) -> Run:
    """What made `workdir`; fields that are missing take their default. Raises UserError when there is none, or it makes
    no sense."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is no workdir of a training run: it has no config.json")
    try:
        run = files.typed(files.read_json(path), Run)
        checks.check_config(run.config)
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return run


def read_config(workdir: str | Path) -> tuple[Config, tuple[str, ...]]:
    """The configuration that made `workdir` and the names of its classes. Raises UserError when there is none."""
    run = read_run(workdir)
    return run.config, run.classes


def check_workdir(
    workdir: str | Path, config: Config, classes: tuple[str, ...] = (), examples: int | None = None
) -> None:
    """Makes and changes nothing. Raises UserError when another configuration, other classes or another number of
    training examples made the folder, or nothing can be written there; what is not given is not compared."""
    workdir = Path(workdir)
    if (workdir / "config.json").exists():
        run = read_run(workdir)
        if run.config.row != config.row:
            made = f"was made by row {run.config.row}, this is row {config.row}"
            raise UserError(f"workdir {workdir} {made}: give another --workdir")
        then, now = flat(config_to_dict(run.config)), flat(config_to_dict(config))
        changed = [name for name in now if then.get(name) != now[name] and name not in FREE_TO_CHANGE]
        if changed:
            what = "; ".join(f"{name} is {then.get(name)} there and {now[name]} here" for name in changed)
            raise UserError(f"workdir {workdir} was made with another configuration: {what}: give another --workdir")
        if classes and run.classes and (other := other_classes(run.classes, classes)):
            raise UserError(f"workdir {workdir} was trained for other classes than this data has: {other}")
        if None not in (examples, run.examples) and examples != run.examples:
            what = f"{run.examples} training examples there and {examples} here"
            raise UserError(f"workdir {workdir} was made with other data: {what}: give another --workdir")
    for folder in (workdir / "checkpoints", workdir / "unreadable"):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder} is no folder: move it away")
    if trouble := files.folder_trouble(workdir):
        raise UserError(f"cannot write in workdir {workdir}: {trouble}")


def other_classes(there: tuple[str, ...], here: tuple[str, ...]) -> str:
    """How the names of two lists of classes, or their order, differ, in words; empty where they do not."""
    if there == here:
        return ""
    first = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))

    def told(names: tuple[str, ...]) -> str:
        start = max(0, min(first - 5, len(names) - 10)) if len(names) > 10 else 0
        shown = ", ".join(names[start : start + 10]) or "none"
        return f"{'..., ' if start else ''}{shown}{', ...' if start + 10 < len(names) else ''} ({len(names)})"

    return f"{told(there)} there and {told(here)} here, which differ from class {first} on"


def write_config(workdir: str | Path, config: Config, classes: tuple[str, ...], examples: int | None = None) -> None:
    """Make the folder if need be, and write config.json whole or not at all. Raises UserError."""
    path = Path(workdir) / "config.json"
    part = path.with_suffix(".part")
    stored = {"config": config_to_dict(config), "classes": list(classes), "examples": examples}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            part.write_text(json.dumps(stored, indent=1) + "\n")
            os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


# Arrays by name


def named_arrays(tree: Any) -> dict[str, jax.Array]:
    """The arrays of a pytree by their path, such as params.stem.kernel; typed random keys as their data."""
    return {_name(path): _key_data(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fill(template: Any, arrays: dict[str, jax.Array], prefix: str = "") -> Any:
    """`template` with its arrays replaced by those called `prefix` + their path.

    Raises ValueError naming the first that is missing or has another shape or type.
    """

    def one(path: Any, leaf: Any) -> Any:
        name = prefix + _name(path)
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        array, wanted = arrays[name], _key_data(leaf)
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            is_, should_be = (f"{x.dtype}{list(x.shape)}" for x in (array, wanted))
            raise ValueError(f"{name} is {is_}, the model wants {should_be}")
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array

    return jax.tree_util.tree_map_with_path(one, template)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


# Checkpoints


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


def save(workdir: str | Path, step: int, state: Any, position: Any) -> None:
    """Write every array of `state` and the JSON value `position` as checkpoint `step`; the oldest beyond KEEP go.

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
            for old in steps(workdir)[:-KEEP]:
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


def _check_seal(folder: Path) -> None:
    """Raises ValueError naming the first file that is not as it was written; orbax itself is loud about damage."""
    try:
        wanted = files.typed(files.read_json(folder / SEAL), dict[str, list[int]])
        found = _sums(folder)
        changed = [name for name, sums in wanted.items() if found.get(name) != sums]
    except (OSError, ValueError) as error:
        raise ValueError(f"{SEAL}: {error}") from None
    if changed:
        raise ValueError(f"{changed[0]} is {'damaged' if changed[0] in found else 'missing'}")


def read(workdir: str | Path, step: int, sharding: Any = None) -> tuple[dict[str, jax.Array], Any]:
    """Arrays by name and position of checkpoint `step`. Raises ValueError when anything is missing or changed.

    The position is what this process saved, or process 0 where there were fewer.
    """
    folder = Path(workdir).resolve() / "checkpoints" / str(step)
    _check_seal(folder)
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


def _fault(folder: Path) -> str | None:
    try:
        _check_seal(folder)
    except ValueError as error:
        return str(error)
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


def build(config: Config, classes: int, twin: nnx.State | None = None) -> nnx.Module:
    """The row's model with fresh parameters, or with those of its static `twin` under the wrappers.

    Raises UserError where its options make no model, or one that the memory does not hold.
    """
    try:
        check_memory(config, classes)
        return models.build(config.model, classes, rngs=nnx.Rngs(config.seed), twin_params=twin)
    except ValueError as error:
        raise UserError(f"row {config.row}: its --model options make no model: {error}") from error


def check_memory(config: Config, classes: int, copies: int = 1) -> None:
    """Raises UserError where so many copies of the model's variables are more than this machine's memory; looks at
    models with large numbers alone."""
    numbers = jax.tree.leaves(dataclasses.asdict(config.model))
    if max(number for number in numbers if isinstance(number, int)) <= SMALL:
        return
    model = jax.eval_shape(lambda: nnx.state(models.build(config.model, classes, rngs=nnx.Rngs(0))))
    need = copies * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(model))
    if need > (there := _memory()):
        what = f"{copies} copies of the model" if copies > 1 else "the model"
        raise UserError(
            f"row {config.row}: {what} would take {need / 2**30:.1f} GB, and there are {there / 2**30:.1f} GB: "
            "give smaller numbers to the --model options"
        )


def _memory() -> int:
    """Bytes of memory that this process may have, on its device if that has its own."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    found += [stats["bytes_limit"] for stats in [jax.local_devices()[0].memory_stats()] if stats]
    return min(found)


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
