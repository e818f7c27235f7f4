import platform
import subprocess
import sys

import pytest

from dynjax.run import memory

TOUCHED = """
import resource, threading
import numpy as np
from dynjax.run import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 23).fill(0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if {kept}:
    memory.keep()
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


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted on Linux")
def test_what_is_freed_is_not_asked_of_the_system_again():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("memory is kept with glibc's malloc only")
    assert min(faults(False)) > 16  # 64 MB in pages of up to 2 MB
    assert max(faults(True)) < 8


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep()
