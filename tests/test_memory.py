import subprocess
import sys
from unittest import mock

import pytest

from experiments import memory, start

TOUCHED = """
import resource, threading
from experiments import memory

if {kept}:
    memory.keep()
import numpy as np  # which has threads

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23).fill(0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def three():
    for _ in range(3):
        faults()

three()
thread = threading.Thread(target=three)
thread.start()
thread.join()
"""


def faults(kept: bool) -> list[int]:
    """Of the second and third time that 64 MB are wanted, in the main thread and in another."""
    program = TOUCHED.format(kept=kept)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    found = [int(line) for line in out.stdout.split()]
    return found[1:3] + found[-2:]


@pytest.mark.skipif(not memory.is_glibc(), reason="memory is kept with glibc's malloc only")
def test_what_is_freed_is_not_asked_of_the_system_again():
    assert min(faults(False)) > 16  # 64 MB in pages of up to 2 MB
    assert max(faults(True)) < 8


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.os, "confstr", mock.Mock(side_effect=ValueError))
    assert not memory.keep()


def test_training_keeps_it_before_there_is_a_second_thread(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(start.memory, "keep", lambda: order.append("kept"))
    monkeypatch.setattr(start, "stop_at_once", lambda: order.append("threads"))
    for command, wanted in (("train", ["kept", "threads"]), ("evaluate", ["threads"])):
        order.clear()
        monkeypatch.setattr(sys, "argv", ["-m", "row"])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", f"experiments.{command}", "row"])
        start.begin()
        assert order == wanted
