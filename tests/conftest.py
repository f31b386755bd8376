"""What every test gets: a check that it leaves nothing behind, and a cluster of three workers.

The check compares what this process holds before and after a test: processes, threads, file
descriptors, shared memory. Things end a moment after they are told to, so it polls, with a
deadline. One process may stay: fedproc keeps one start helper for all clusters of a process; it is
started before the first test.
"""

import contextlib
import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Hashable, Iterator
from itertools import chain
from pathlib import Path

import hypothesis
import psutil
import pytest

import fedproc
from fedproc.transport.process import zygote_pid
from tests.interrupts import Interrupts

DEADLINE_S = 2.0
POLL_S = 0.01

# Every process that a test starts inherits this variable, so that orphans are found too: the
# workers of a killed parent are nobody's children any more.
MARK = "FEDPROC_TEST_RUN"
os.environ[MARK] = f"{os.getpid()}-{time.time_ns()}"

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if "CI" in os.environ else "local")

Holding = tuple[str, Hashable]
passed = pytest.StashKey[bool]()


# ---------------------------------------------------------------- Ctrl-C


@pytest.fixture
def interrupts():
    """Ctrl-C at a chosen moment."""
    made = Interrupts()
    old = signal.signal(signal.SIGALRM, made.handle)
    # what a shell starts in the background ignores Ctrl-C
    old_of_ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield made
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)
    signal.signal(signal.SIGINT, old_of_ctrl_c)


# ---------------------------------------------------------------- the cluster


@pytest.fixture(params=["process", "inline"])
def transport(request):
    """Both ways to run workers: a test that uses this must hold for each."""
    return request.param


@pytest.fixture
def cluster(transport):
    """Three workers, closed at the end without waiting for work a test left unfinished."""
    cluster = fedproc.Cluster(["alice", "bob", "carol"], transport=transport)
    yield cluster
    cluster.close()


@pytest.fixture
def alice(cluster):
    return cluster["alice"]


@pytest.fixture
def bob(cluster):
    return cluster["bob"]


@pytest.fixture
def carol(cluster):
    return cluster["carol"]


# ---------------------------------------------------------------- nothing is left behind


@pytest.fixture(scope="session", autouse=True)
def has_start_helper():
    """Start the helper once, so that no test is blamed for it; False where there is none."""
    warm_up()
    return zygote_pid() is not None


@pytest.fixture(autouse=True)
def nothing_left_behind(request, has_start_helper):
    """Fail a test that leaves a process, thread, descriptor or shared memory behind."""
    if has_start_helper and zygote_pid() is None:
        warm_up()  # the test before killed the helper
    before = holdings()
    yield
    # A failed test keeps its frames, and so its objects, alive in the traceback: no second error.
    succeeded = request.node.stash.get(passed, False)
    left = wait_released(before) if succeeded else holdings() - before
    named = [describe(kind, what) for kind, what in left]
    end_processes(left)
    if left and succeeded:
        pytest.fail("the test left behind:\n" + "\n".join(named), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note whether the test itself passed, for the check that runs after it."""
    report = yield
    if report.when == "call":
        item.stash[passed] = report.passed
    return report


def warm_up() -> None:
    fedproc.Cluster(["warm"]).close()


def wait_released(before: Counter[Holding]) -> Counter[Holding]:
    """What is held beyond ``before``, after giving it time to go."""
    left = holdings() - before
    if left:
        gc.collect()  # cycles may hold pointers and clusters; costs too much to do always
    deadline = time.monotonic() + DEADLINE_S
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = holdings() - before
    return left


def holdings() -> Counter[Holding]:
    """Everything this process holds, each as (kind, what)."""
    return Counter(chain(processes(), threads(), descriptors(), mappings(), shared_files()))


def processes() -> Iterator[Holding]:
    """Descendants and orphans of this run, without the start helper itself."""
    spared = {os.getpid(), zygote_pid()}
    found = set(psutil.Process().children(recursive=True))
    for pid in marked_pids():
        try:
            found.add(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return (("process", process) for process in found if process.pid not in spared)


def marked_pids() -> Iterator[int]:
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes():
                yield int(environ.parent.name)
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue


def threads() -> Iterator[Holding]:
    return (("thread", thread) for thread in threading.enumerate())


def descriptors() -> Iterator[Holding]:
    """Open descriptors by what they point to, numbers taken out.

    The helper may be replaced during a test: then its sockets are others, but as many as before.
    """
    for link in list_or_empty("/proc/self/fd"):
        try:
            target = link.readlink()
        except OSError:  # the descriptor that listed the directory
            continue
        yield "descriptor", re.sub(r"\[\d+\]", "", str(target))


def mappings() -> Iterator[Holding]:
    """Mapped arenas, each once: the kernel may split a mapping into several lines."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    arenas = [line.split(maxsplit=5) for line in lines if "memfd:" in line and "fedproc" in line]
    return (("mapping", arena) for arena in {f"{path} inode {inode}" for *_, inode, path in arenas})


def shared_files() -> Iterator[Holding]:
    """Files in /dev/shm, which all runs on the machine share.

    The test of this check leaves one there on purpose, named by its process. Whatever test of
    another run was at work just then was blamed for it.
    """
    planted = re.compile(rf"fedproc-left-(?!{os.getpid()}$)")
    files = (path for path in list_or_empty("/dev/shm") if not planted.match(path.name))
    return (("shared memory", str(path)) for path in files)


def list_or_empty(folder: str) -> list[Path]:
    return list(Path(folder).iterdir()) if Path(folder).is_dir() else []


def end_processes(left: Counter[Holding]) -> None:
    """Kill what a test left running, so that it does not disturb the next ones."""
    for _, what in left:
        if isinstance(what, psutil.Process):
            with contextlib.suppress(psutil.NoSuchProcess):
                what.kill()


def describe(kind: str, what: Hashable) -> str:
    if isinstance(what, psutil.Process):
        try:
            return f"- {kind}: {what}, {' '.join(what.cmdline())}"
        except psutil.Error:
            return f"- {kind}: {what}"
    if isinstance(what, threading.Thread):
        frame = sys._current_frames().get(what.ident)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        return f"- {kind}: {what.name}\n{stack}"
    return f"- {kind}: {what}"
