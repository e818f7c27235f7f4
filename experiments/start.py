"""What a command does before its imports: answer Ctrl-C, and watch over a process that is one of several.

As little as can be is imported before there is a handler.
"""

import os
import signal
import sys
import threading

from experiments import memory

STOPPED, GONE = 130, 1
CHILD = "DYNJAX_CHILD_OF"
"""Set for the process that is watched over: the end of a pipe that closes when the one that watches is no more."""

_DISTRIBUTED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "DYNJAX_DISTRIBUTED")
_NOTICE = rb"[EFW]\d{4} [\d:.]+ +\d+ (coordination_service|preemption_sync|client\.h)|Traceback \(most"
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"


def begin() -> None:
    """To be called first in `python -m experiments.NAME`."""
    trains = sys.orig_argv[-len(sys.argv)].endswith("experiments.train")
    if trains:
        memory.keep()  # while there is one thread
    stop_at_once()
    if CHILD in os.environ:
        _end_with(int(os.environ.pop(CHILD)))
    elif trains and is_distributed():
        sys.exit(watch([sys.executable, *sys.orig_argv[1:]]))


def is_distributed() -> bool:
    return any(os.environ.get(name) not in (None, "", "0") for name in _DISTRIBUTED)


# Ctrl-C


def stop_at_once() -> None:
    """Until somebody else handles it, Ctrl-C ends this process with one line, wherever it is.

    A KeyboardInterrupt would wait for the end of a compilation, and the middle of an import may turn it into any other
    exception. There is nothing to lose: training takes its signals over with its first step.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def ours(number: int, frame: object) -> None:
        pass

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is ours:
                os.write(2, b"stopped\n")
                os._exit(STOPPED)

    signal.signal(signal.SIGINT, ours)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True, name="ctrl-c").start()


# One of several processes


def watch(command: list[str]) -> int:
    """Run `command` and return its exit status; says in one line when JAX ends it because another process is gone.

    JAX does so from C++, with a stack and an abort that the process itself can neither catch nor silence. Signals are
    handed on; when this process is killed the other ends too.
    """
    import subprocess

    reading, writing = os.pipe()
    child = subprocess.Popen(
        command,
        env=os.environ | {CHILD: str(reading)},
        stderr=subprocess.PIPE,
        pass_fds=[reading],
        process_group=0,  # Ctrl-C comes once, through here
    )
    os.close(reading)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    with child.stderr:
        held, said = forward(child.stderr, sys.stderr.buffer)
    status = child.wait()
    os.close(writing)
    if _FATAL not in held:
        sys.stderr.buffer.write(held)
    elif not said:
        print(f"error: {who_is_gone(held)}: the same command, on all of them, goes on from there", file=sys.stderr)
        return GONE
    return status if status >= 0 else 128 - status


def forward(source, target) -> tuple[bytes, bool]:  # two binary files
    """Pass on what is said until the first notice of trouble with other processes or traceback.

    Returns all from there on, and whether an "error: ..." was passed on.
    """
    import re

    text, said = b"", False
    while chunk := os.read(source.fileno(), 2**16):
        text += chunk
        if notice := re.search(_NOTICE, text):
            target.write(text[: notice.start()])
            target.flush()
            said |= b"error: " in text[: notice.start()]
            return text[notice.start() :] + source.read(), said
        # A progress bar ends its lines at their beginning.
        end = len(text) if b"\r" in text else text.rfind(b"\n") + 1
        said |= b"error: " in text[:end]
        target.write(text[:end])
        target.flush()
        text = text[end:]
    target.write(text)
    target.flush()
    return b"", said or b"error: " in text


def who_is_gone(held: bytes) -> str:
    """In words, from what JAX wrote about it."""
    import re

    text = held.decode(errors="replace")
    if found := re.search(r"unhealthy \(stopped sending heartbeats\):\s*((?:[^\n]*\d+\s*\n)+)", text):
        numbers = sorted({int(number) for number in re.findall(r"(\d+)\s*\n", found[1])})
        names = f"process {numbers[0]}" if len(numbers) == 1 else f"processes {', '.join(map(str, numbers))}"
    elif "Socket closed" in text or "Failed to send RPC to coordination service" in text:
        names = "process 0"
    else:
        names = "another process"
    return f"{names} of this run is gone, its own messages say why; everything up to the last checkpoint is saved"


def _end_with(pipe: int) -> None:
    """End this process when the one that watches over it is no more."""

    def wait() -> None:
        os.read(pipe, 1)
        os._exit(GONE)

    threading.Thread(target=wait, daemon=True, name="parent").start()
