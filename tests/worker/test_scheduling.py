"""Workers do not take the core from the parent while it gives work to others; long turns."""

import ctypes
import os
import platform
import struct
import subprocess
import sys

import pytest

import fedproc as fp

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="needs Linux")

NICE = """
import os
import fedproc as fp

os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
with fp.Cluster(1) as cluster:
    print(cluster.workers[0].run(os.sched_getscheduler, 0).get() == os.SCHED_IDLE)
"""


def test_a_worker_is_of_the_batch_class_and_the_parent_stays_as_it_was() -> None:
    before = os.sched_getscheduler(0)
    with fp.Cluster(2) as cluster:
        found = fp.gather([worker.run(os.sched_getscheduler, 0) for worker in cluster])

    assert found == [os.SCHED_BATCH] * 2
    assert os.sched_getscheduler(0) == before


SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine())


def slice_and_nice():
    """Nanoseconds of a turn, and the nice value, of the calling thread."""
    found = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR, 0, found, 48, 0) == 0
    _, _, _, nice, _, turn, _, _ = struct.unpack("IIQiIQQQ", found.raw)
    return turn, nice


@pytest.mark.skipif(SCHED_GETATTR is None, reason="the number of the system call is not known")
def test_a_worker_takes_long_turns_and_keeps_its_nice_value() -> None:
    usual, nice = slice_and_nice()
    if not usual:
        pytest.skip("Linux before 6.12 has one length of turns for all")
    with fp.Cluster(1) as cluster:
        assert cluster.workers[0].run(slice_and_nice).get() == (20_000_000, nice)
    assert slice_and_nice() == (usual, nice)


def test_an_inline_worker_leaves_the_process_as_it_is() -> None:
    before = os.sched_getscheduler(0)
    with fp.Cluster(1, transport="inline") as cluster:
        assert cluster.workers[0].run(os.sched_getscheduler, 0).get() == before


def test_a_class_that_somebody_chose_for_the_parent_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NICE], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "True\n"
