"""Memory that a training process keeps and gives back, in a process of its own: the settings are for good."""

import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from jaxseek.machine.host_memory import keep_freed_memory, release_freed_memory, resident

def use(mib):
    np.ones(mib << 17)

keep_freed_memory()
before = resident()
use(200)
kept = resident() - before
release_freed_memory()
use(100)
again = resident() - before
release_freed_memory()
print(kept >> 20, again >> 20, (resident() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="by glibc")
def test_freed_memory_is_kept_and_given_back_only_where_the_process_has_grown():
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept, again, in_the_end = map(int, found.split())
    assert kept > 190
    assert 90 < again < 150
    assert in_the_end > 90  # no more than the first time: kept
