"""What the tests of faults hand to workers, and how they wait."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def eventually(check, timeout=10.0):
    """Polls ``check`` until it is true."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def touch(path):
    Path(path).touch()


def hold(path, value=None):
    """Returns when the file exists."""
    eventually(Path(path).exists, 20)
    return value


def ended(pid):
    """Whether a process has ended; one that waits to be reaped has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def python(code, *, timeout=50, **environment):
    """Runs a program to its end: the completed process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ---------------------------------------------------------------- ways to die


def segfault():
    ctypes.string_at(0)


def c_exit():
    ctypes.CDLL(None).exit(4)


def leave():
    os._exit(0)


def killed_by(number):
    os.kill(os.getpid(), number)


DEATHS = {
    "SIGSEGV": segfault,
    "SIGABRT": os.abort,
    "_exit": leave,
    "C exit": c_exit,
}
CODES = {"SIGSEGV": -signal.SIGSEGV, "SIGABRT": -signal.SIGABRT, "_exit": 0, "C exit": 4}


class DiesWhenLoaded:
    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        return DEATHS[self.how], ()


class DiesWhenPickled:
    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        DEATHS[self.how]()


class DiesWhenFreed:
    def __init__(self, how):
        self.how = how

    def __del__(self):
        DEATHS[self.how]()


def make(kind, how):
    return globals()[kind](how)


def make_garbage(how):
    """A cycle that only the garbage collector can free, and does."""
    import gc

    dying = DiesWhenFreed(how)
    dying.me = dying
    del dying
    gc.collect()


# ---------------------------------------------------------------- a small federated world

cross_entropy = nn.CrossEntropyLoss()


def gradient_step(model, x, y):
    cross_entropy(model(x), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
