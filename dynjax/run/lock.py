"""One run at a time in a workdir, by a lock that the system takes back when its process ends, however it ends."""

import contextlib
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from dynjax.config import UserError
from dynjax.run import files

if sys.platform != "win32":
    import fcntl

FILE = "lock"
"""Stays in the workdir, empty when nobody holds it; it names who does and is no lock by its presence."""


@contextlib.contextmanager
def hold(workdir: str | Path, option: str = "workdir") -> Iterator[None]:
    """Nobody else holds `workdir`, which an option names and which is made if need be, inside this. Raises UserError
    naming who does.

    By flock, which other hosts see on NFS as Linux has it since 2.6.12; a file system without locks goes without. Of a
    run of several processes the first one holds it for all.
    """
    path = Path(workdir) / FILE
    with contextlib.ExitStack() as stack:
        with files.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+b", buffering=0))
            if not _locked(file):
                file.seek(0)
                who = file.read(200).decode(errors="replace").strip() or "another process"
                raise UserError(f"{option} {workdir} is in use by {who}: wait for it, or give another --{option}")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            stack.callback(_empty, file)
        yield


def _locked(file: io.FileIO) -> bool:
    """Whether the lock is ours now, or there are no locks here."""
    try:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: a file system without locks
        return True
    return True


def _empty(file: io.FileIO) -> None:
    with contextlib.suppress(OSError):
        file.truncate(0)
