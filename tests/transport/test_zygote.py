"""The parent's end of a zygote: one that is slow, stopped, or interrupted at its launch."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from fedproc.errors import WorkerStartError
from fedproc.transport import zygote as transport
from fedproc.transport.zygote import Zygote

PATIENT_SECONDS = 60.0


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def stopped():
    """Makes a zygote that is stopped before it could say anything."""
    with contextlib.ExitStack() as stack:

        def make(*preload: str) -> Zygote:
            zygote = Zygote(preload)
            os.kill(zygote.pid, signal.SIGSTOP)
            stack.callback(zygote.close)
            stack.callback(resume, zygote)
            return zygote

        yield make


def resume(zygote: Zygote) -> None:
    if zygote.alive:
        os.kill(zygote.pid, signal.SIGCONT)


def test_the_short_patience_of_one_does_not_end_what_others_wait_for(stopped):
    zygote = stopped()
    with pytest.raises(
        WorkerStartError, match=r"it is too slow.*raise start_timeout \(now 0\.05 s"
    ):
        zygote.wait_ready(0.05)
    assert zygote.alive
    resume(zygote)
    zygote.wait_ready(PATIENT_SECONDS)
    assert zygote.forkable


def test_one_that_nobody_else_has_ends_when_it_is_too_slow(stopped, monkeypatch):
    monkeypatch.setattr(transport, "_END_SECONDS", 0.05)
    zygote = stopped("json")
    with pytest.raises(WorkerStartError, match=r"it is too slow.*preload=\['json'\]"):
        zygote.wait_ready(0.05)
    assert not zygote.alive
    assert not Path(f"/proc/{zygote.pid}").exists()


def test_a_stopped_one_does_not_hold_up_the_end_of_the_program(stopped, monkeypatch):
    monkeypatch.setattr(transport, "_END_SECONDS", 0.05)
    zygote = stopped()
    zygote.close()
    assert not Path(f"/proc/{zygote.pid}").exists()
    zygote.close()


def test_a_module_that_cannot_be_imported_is_named():
    zygote = Zygote(("no_such_module_anywhere",))
    with pytest.raises(WorkerStartError, match="No module named 'no_such_module_anywhere'"):
        zygote.wait_ready(PATIENT_SECONDS)
    assert not zygote.alive


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no more processes")])
def test_a_launch_that_fails_leaves_no_descriptor(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(transport, "execute", fail)
    before = descriptors()
    with pytest.raises((KeyboardInterrupt, WorkerStartError)) as caught:
        Zygote(())
    if isinstance(error, OSError):
        assert "could not be started: no more processes" in str(caught.value)
    assert descriptors() == before


@pytest.fixture
def ctrl_c():
    """A program in the background of a shell would ignore it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_during_the_launch_comes_at_its_end_and_nothing_stays(monkeypatch):
    started = []
    execute = transport.execute

    def interrupted(*args):
        process = execute(*args)
        started.append(process)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(transport, "execute", interrupted)
    before = descriptors()
    with pytest.raises(KeyboardInterrupt):
        Zygote(())
    assert started[0].poll() is not None
    assert descriptors() == before
