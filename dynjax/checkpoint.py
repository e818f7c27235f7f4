"""Workdirs: what a run leaves on disk, and how the same command finds its way back.

    config.json            the configuration and the names of the classes
    checkpoints/STEP/      orbax: every array of the training state; sidecar/: data position per process; checksums.json
    unreadable/            checkpoints that could not be read, moved aside

A checkpoint appears under its name only when its arrays are complete (orbax writes elsewhere and renames); checksums
come last and tell one that was cut or changed later.
"""

import dataclasses
import errno
import json
import os
import shutil
import sys
import typing
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynjax import models
from dynjax.config import Config, UserError

KEEP = 3
"""How many checkpoints stay on disk; the newest may turn out to be unreadable."""

SEAL = "checksums.json"

FREE_TO_CHANGE = ("checkpoint_every", "evaluate_every")
"""Fields that a resumed run may change: they say when to look at the numbers and never what they are."""


# Configuration on disk


def config_to_dict(config: Config) -> dict:
    """The configuration as JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(values: dict, kind: type = Config) -> Any:
    """The inverse of `config_to_dict`; fields that are missing take their default, unknown ones raise UserError."""
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"unknown field {unknown[0]!r} of {kind.__name__}: written by another version of dynjax?")
    return kind(**{name: _from_json(value, hints[name]) for name, value in values.items()})


def _from_json(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return config_from_dict(value, hint)
    if kinds := {kind.family: kind for kind in typing.get_args(hint) if hasattr(kind, "family")}:
        if (family := value.get("family", "unet")) not in kinds:
            raise UserError(f"unknown model.family {family!r}: written by another version of dynjax?")
        return config_from_dict(value, kinds[family])
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """The fields of nested dicts by their path, such as budget.target."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def read_config(workdir: str | Path) -> tuple[Config, tuple[str, ...]]:
    """The configuration that made `workdir` and the names of its classes. Raises UserError when there is none."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is no workdir of a training run: it has no config.json")
    try:
        stored = json.loads(path.read_text())
        return config_from_dict(stored["config"]), tuple(stored["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def check_workdir(workdir: str | Path, config: Config) -> None:
    """Make the folder if need be. Raises UserError when another configuration made it or it cannot be written."""
    workdir = Path(workdir)
    if (workdir / "config.json").exists():
        made_by, _ = read_config(workdir)
        if made_by.row != config.row:
            made = f"was made by row {made_by.row}, this is row {config.row}"
            raise UserError(f"workdir {workdir} {made}: give another --workdir")
        then, now = flat(config_to_dict(made_by)), flat(config_to_dict(config))
        changed = [name for name in now if then.get(name) != now[name] and name not in FREE_TO_CHANGE]
        if changed:
            what = "; ".join(f"{name} is {then.get(name)} there and {now[name]} here" for name in changed)
            raise UserError(f"workdir {workdir} was made with another configuration: {what}: give another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe_{jax.process_index()}"
        probe.write_text("x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write in workdir {workdir}: {error.strerror or error}") from None


def write_config(workdir: str | Path, config: Config, classes: tuple[str, ...]) -> None:
    """Write config.json whole or not at all."""
    if jax.process_index() != 0:
        return
    path = Path(workdir) / "config.json"
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps({"config": config_to_dict(config), "classes": list(classes)}, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
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
    """The steps that have a checkpoint, oldest first."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def any_finished(workdir: str | Path) -> bool:
    """Whether there is a checkpoint that was written to its end, readable or not."""
    return any((Path(workdir) / "checkpoints" / str(step) / SEAL).exists() for step in steps(workdir))


def save(workdir: str | Path, step: int, state: Any, position: Any) -> None:
    """Write every array of `state` and the JSON value `position` as checkpoint `step`; the oldest beyond KEEP go.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(workdir).resolve() / "checkpoints"
    arrays = named_arrays(state)
    shapes = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
    sidecar = Sidecar({"position": position, "arrays": shapes})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _orbax():
            ocp.save_checkpointables(folder / str(step), {"state": arrays, "sidecar": sidecar}, overwrite=True)
        if jax.process_index() == 0:
            _seal(folder / str(step))
            for old in steps(workdir)[:-KEEP]:
                shutil.rmtree(folder / str(old))
    except Exception as error:
        if (reason := _disk_trouble(error)) is None:
            raise
        raise UserError(f"cannot write checkpoint {step} in {folder}: {reason}; earlier ones are untouched") from None


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
        wanted = json.loads((folder / SEAL).read_text())
        found = _sums(folder)
        changed = [name for name, sums in wanted.items() if found.get(name) != sums]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{SEAL}: {error}") from None
    if changed:
        raise ValueError(f"{changed[0]} is {'damaged' if changed[0] in found else 'missing'}")


def read(workdir: str | Path, step: int, sharding: Any = None) -> tuple[dict[str, jax.Array], Any]:
    """Arrays by name and position of checkpoint `step`. Raises ValueError when anything is missing or changed."""
    from orbax.checkpoint import v1 as ocp

    folder = Path(workdir).resolve() / "checkpoints" / str(step)
    _check_seal(folder)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        content = json.loads(Sidecar.file(folder / "sidecar").read_text())
        wanted = {
            name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
            for name, (shape, dtype) in content["arrays"].items()
        }
        return ocp.load_checkpointables(folder, {"state": wanted})["state"], content["position"]
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(first[:200]) from error


def read_newest(
    workdir: str | Path, sharding: Any = None, say: Callable[[str], None] | None = None
) -> tuple[int, dict[str, jax.Array], Any] | None:
    """Step, arrays and position of the newest checkpoint that can be read; None when there is none that was finished.

    `say` is told (None: stderr) of every one that had to be passed over. Raises UserError when all of them are damaged.
    """
    say = say or (lambda text: print(text, file=sys.stderr))
    found, damaged = steps(workdir), []
    for index, step in reversed(list(enumerate(found))):
        finished = (Path(workdir) / "checkpoints" / str(step) / SEAL).exists()
        try:
            return step, *read(workdir, step, sharding)
        except ValueError as error:
            reason = str(error) if finished else "it was not finished"
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
    """Before training goes on from checkpoint `newest`: drop half-written ones, move unreadable later ones aside."""
    folder = Path(workdir) / "checkpoints"
    if jax.process_index() != 0 or not folder.exists():
        return
    for path in folder.iterdir():
        if not path.name.isdigit():
            shutil.rmtree(path, ignore_errors=True)
        elif newest is not None and int(path.name) > newest:
            aside = Path(workdir) / "unreadable" / path.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


# Models


def evaluation_view(model: nnx.Module) -> nnx.Module:
    """`model` with noise and training statistics off, all computed and masked; its arrays are shared."""
    return nnx.view(model, deterministic=True, use_running_average=True, execution="masked", raise_if_not_found=False)


def build(config: Config, classes: int, twin: nnx.State | None = None) -> nnx.Module:
    """The row's model with fresh parameters, or with those of its static `twin` under the wrappers."""
    return models.build(config.model, classes, rngs=nnx.Rngs(config.seed), twin_params=twin)


def load(workdir: str | Path) -> tuple[Config, nnx.Module, int]:
    """Configuration, model (averaged parameters, evaluation view) and step of the newest readable checkpoint.

    Raises UserError when there is none.
    """
    config, classes = read_config(workdir)
    newest = read_newest(workdir)
    if newest is None:
        raise UserError(f"workdir {workdir} has no checkpoint yet")
    step, arrays, _ = newest
    graphdef, params, rest = nnx.split(build(config, len(classes)), nnx.Param, ...)
    try:
        params = fill(params, arrays, "ema." if config.optimizer.ema else "params.")
        rest = fill(rest, arrays, "rest.")
    except ValueError as error:
        raise UserError(f"checkpoint {step} of {workdir} does not fit the model of row {config.row}: {error}") from None
    return config, evaluation_view(nnx.merge(graphdef, params, rest)), step
