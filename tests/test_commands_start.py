"""What commands do before their imports: Ctrl-C at any moment, and the one line where another process is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import start

ROOT = Path(__file__).parents[1]


def begin(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
def test_ctrl_c_while_importing(seconds):
    """From the moment that the package is found; what Python does before is not ours to answer."""
    process = begin("-v", "-m", "experiments.train", "--list")
    said = ""
    while "import 'experiments' #" not in said:
        said = process.stderr.readline() or pytest.fail("it ended")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 130) and "Traceback" not in said and "KeyboardInterrupt" not in said
    assert process.returncode == 0 or "stopped\n" in said  # Python goes on saying what it imports
    assert seconds > 0 or process.returncode == 130


def test_ctrl_c_in_the_middle_of_something_that_does_not_return_to_python():
    """As a compilation; the handler of Python itself would wait for its end."""
    code = "from experiments import start; start.stop_at_once(); import hashlib; print(1, flush=True); "
    code += "hashlib.pbkdf2_hmac('sha1', b'', b'', 2**31 - 1)"
    process = begin("-c", code)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopped\n")


# One of several processes, without JAX: what it writes is written by a script

JAX_SAYS = """E1129 08:20:27.69 8070 coordination_service_agent.cc:289] Polled an error from coordination service.
F1129 08:20:27.69 8070 client.h:80] Terminating process because the JAX distributed service detected fatal errors. {}
*** Check failure stack trace: ***
    @     0x7f3895840634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}The tasks have"


def watched(capfd, code: str) -> tuple[int, str]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        status = start.watch([sys.executable, "-S", "-c", f"import os, sys, time\n{code}"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status, capfd.readouterr().err


@pytest.mark.parametrize(
    ("says", "names"),
    [
        (UNHEALTHY.format("1\n"), "process 1"),
        (UNHEALTHY.format("1\n3\n"), "processes 1, 3"),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader", "process 0"),
        ("something new", "another process"),
    ],
)
def test_another_process_is_gone(capfd, says, names):
    text = "Traceback (most recent call last):\nValueError: Gloo failed\n" + JAX_SAYS.format(says)
    code = f"sys.stderr.write('\\r 10%|#'); sys.stderr.flush(); time.sleep(0.1); sys.stderr.write({text!r}); os.abort()"
    status, said = watched(capfd, code)
    assert status == start.GONE and said.startswith("\r 10%|#") and said.count("\n") == 1
    assert f"error: {names} of this run is gone" in said and "the same command, on all of them, goes on" in said


def test_everything_else_is_passed_on(capfd):
    assert watched(capfd, "print('error: no', file=sys.stderr); sys.exit(2)") == (2, "error: no\n")
    status, said = watched(capfd, "1 / 0")
    assert status == 1 and said.startswith("Traceback") and said.endswith("ZeroDivisionError: division by zero\n")
    text = "error: mine\n" + JAX_SAYS.format(UNHEALTHY.format("1\n"))
    assert watched(capfd, f"sys.stderr.write({text!r}); os._exit(2)") == (2, "error: mine\n")
    assert watched(capfd, "os.kill(os.getpid(), 9)") == (128 + signal.SIGKILL, "")


# Real processes


def pair(victim: int) -> list[subprocess.Popen]:
    """Two processes that meet again and again; the first or the second kills itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    work = f"""
import os, sys
from dynjax.run import mesh
from experiments import cli, start
if start.CHILD not in os.environ:
    sys.exit(start.watch(sys.orig_argv))
def main(arguments):
    mesh.initialize()
    while True:
        for number in range(4):
            assert mesh.of_first(number) == number
        if int(os.environ["JAX_PROCESS_ID"]) == {victim}:
            os.kill(os.getpid(), 9)
cli.run(main)
"""
    common = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "DYNJAX_WAIT": "3"}
    return [begin("-c", work, **common, JAX_PROCESS_ID=str(index)) for index in (0, 1)]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_rest_says_who_is_gone(victim):
    processes = pair(victim)
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    other = 1 - victim
    assert processes[victim].returncode == 128 + signal.SIGKILL
    assert processes[other].returncode == start.GONE, said
    assert said[other].count("\n") == 1 and f"error: process {victim} of this run is gone" in said[other]
