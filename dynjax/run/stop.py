"""Being asked to stop: Ctrl-C and SIGTERM, answered at once by all processes of a run, with everything saved."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Stopped(Exception):
    """Raised inside an evaluation that stops between two batches; it is done anew when the run goes on."""


class Stop:
    """Calling it says whether to stop. Several processes have to call it equally often: they get the same answer.

    They ask each other about once a second, since each time waits for the devices.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._calls, self._every, self._due, self._then = 0, 1, 1, time.monotonic()

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._asked.is_set()
        self._calls += 1
        if self._calls < self._due:
            return False
        from jax.experimental import multihost_utils

        seconds, self._then = time.monotonic() - self._then, time.monotonic()
        found = multihost_utils.process_allgather(np.array([self._asked.is_set(), seconds], np.float32))
        # From a number that all have, so that all ask again after equally many calls.
        self._every = int(np.clip(self._every / max(float(found[:, 1].max()), 1e-3), 1, 100))
        self._due = self._calls + self._every
        return bool(found[:, 0].any())

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask to stop inside this; a second one acts as usual. Only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            self._asked.set()
            # Python's own, and not those of before: a command's ends it at once, also for this signal, at which it may
            # look only now.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
