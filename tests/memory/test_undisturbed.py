"""Ctrl-C in the middle of what must not be interrupted comes at its end."""

import signal
import threading

import pytest

from fedproc.errors import FedprocError
from fedproc.memory.undisturbed import SteadyLock, undisturbed


@pytest.fixture(autouse=True)
def ctrl_c():
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, old)


def test_ctrl_c_comes_at_the_end():
    steps = []

    @undisturbed()
    def work():
        signal.raise_signal(signal.SIGINT)
        steps.append("after it")
        signal.raise_signal(signal.SIGINT)
        steps.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["after it", "after the second"]


def test_one_within_another_waits_for_the_outer_end():
    steps = []

    @undisturbed()
    def work():
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
        steps.append("between the ends")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["between the ends"]


def test_an_error_of_the_body_is_the_context_of_the_interrupt():
    @undisturbed()
    def work():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("also")

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value.__context__, ValueError)


def test_without_ctrl_c_an_error_of_the_body_is_raised():
    with pytest.raises(ValueError, match="alone"), undisturbed():
        raise ValueError("alone")


def test_the_users_own_handler_is_called_once_with_the_frame():
    calls = []
    old = signal.signal(signal.SIGINT, lambda number, frame: calls.append((number, frame)))
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert calls == []
    signal.signal(signal.SIGINT, old)
    ((number, frame),) = calls
    assert number == signal.SIGINT
    assert frame is not None


def test_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with undisturbed():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_touches_no_handler():
    seen = []

    def work():
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_steady_lock_is_let_go_before_ctrl_c_is_heard():
    lock, steps = SteadyLock(), []

    def work():
        with lock.held():
            signal.raise_signal(signal.SIGINT)
            steps.append("whole")

    with pytest.raises(KeyboardInterrupt):
        work()
    with lock.held():
        assert steps == ["whole"]


def test_a_steady_lock_refuses_a_signal_handler_of_its_own_thread():
    lock, found = SteadyLock(), []

    def use(*_):
        with pytest.raises(FedprocError, match="a signal handler cannot use shared memory here"):
            lock.held().__enter__()
        found.append("refused")

    old = signal.signal(signal.SIGUSR1, use)
    try:
        with lock.held():
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert found == ["refused"]
    with lock.held():
        pass
