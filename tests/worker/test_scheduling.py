"""Workers do not take the core from the parent while it gives work to others."""

import os
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


def test_an_inline_worker_leaves_the_process_as_it_is() -> None:
    before = os.sched_getscheduler(0)
    with fp.Cluster(1, transport="inline") as cluster:
        assert cluster.workers[0].run(os.sched_getscheduler, 0).get() == before


def test_a_class_that_somebody_chose_for_the_parent_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NICE], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "True\n"
