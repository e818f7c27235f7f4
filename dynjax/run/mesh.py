"""Devices: one axis, `data`, over all of them; a batch is split along it and everything else is replicated.

Several hosts: start the same command once per host with
    JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=N JAX_PROCESS_ID=I
or, under Slurm, MPI, Kubernetes or on a TPU pod, with DYNJAX_DISTRIBUTED=1 and let JAX find these three by itself.
A process that gave no sign of life for DYNJAX_WAIT seconds (30) is taken for dead, and the others end too.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynjax.config import UserError

AXIS = "data"


def initialize() -> bool:
    """Join the other processes when the environment asks for it (see the top of this file). Returns whether it did.

    To be called before anything else of JAX. Raises UserError when the variables are incomplete or no number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given and os.environ.get("DYNJAX_DISTRIBUTED", "0") in ("", "0"):
        return False
    if jax.distributed.is_initialized():
        return True
    wait = seconds_to_wait()
    if not given:
        jax.distributed.initialize(heartbeat_timeout_seconds=wait)
        return True
    if missing := [name for name in names if name not in given]:
        there, all_of = " and ".join(given), ", ".join(names)
        raise UserError(f"{there} set without {' and '.join(missing)}: set all of {all_of}, or none")
    try:
        count, index = int(given["JAX_NUM_PROCESSES"]), int(given["JAX_PROCESS_ID"])
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers: {error}") from None
    if not given["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS is {given['JAX_COORDINATOR_ADDRESS']!r}: it must be HOST:PORT")
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID is {index}: it must be from 0 to JAX_NUM_PROCESSES - 1, which is {count - 1}")
    jax.distributed.initialize(given["JAX_COORDINATOR_ADDRESS"], count, index, heartbeat_timeout_seconds=wait)
    return True


def seconds_to_wait() -> int:
    """After how long without a sign of life a process is taken for dead. Raises UserError."""
    given = os.environ.get("DYNJAX_WAIT") or "30"
    if not (given.isascii() and given.isdigit() and int(given) >= 2):
        raise UserError(f"DYNJAX_WAIT is {given!r}: it must be a whole number of seconds, at least 2")
    return int(given)


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices (None: all, of every process) along `data`, process by process.

    In this order, and not the one that suits the network best, the parts that processes have of a batch lie one after
    the other, and the examples keep their places, whatever the number of processes. Axis type Auto on purpose: Explicit
    refuses x[idx], argsort, top_k, scatter and cumsum over a sharded batch.
    """
    in_order = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[:devices]
    return Mesh(np.array(in_order), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put every array of `tree`, the same on all processes, on all devices as a fresh copy (safe to donate)."""
    sharding = replicated(mesh)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, np.array(x))

    return jax.tree.map(put, tree)


def share(mesh: Mesh, batch: Any) -> Any:
    """Put a batch on the devices: every process gives its own part, its first axis is split over `data`.

    The global batch is the parts of process 0, 1, ... one after the other.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def processes() -> dict[str, Any]:
    """Which share of the data this process reads, as arguments of a loader."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; all processes must ask together."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def of_first(value: Any) -> Any:
    """The JSON value that process 0 gives, on all processes, which must ask together."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    same_size = np.resize(text, size)  # of the others only the size counts
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(same_size), np.uint8).tobytes())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What one process refuses inside this (UserError) all refuse: none waits for one that has left."""
    refused = None
    try:
        yield
    except UserError as error:
        refused = error
    if any_process(refused is not None):
        raise refused or UserError("another process of this run refused to go on; its own message says why")
