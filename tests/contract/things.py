"""What contract tests hand to workers. Light on purpose: workers import it."""

import os
import random
import sys
import time

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """A linear layer with a buffer and a counter."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.fc = nn.Linear(rows, columns)
        self.register_buffer("offset", torch.full((columns,), 0.5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.fc(x) * scale + self.offset


class Adder(nn.Module):
    """Writes into what it is given."""

    def forward(self, x):
        return x.add_(1)


class Counter:
    """An object with state, plain attributes and names that clash with a pointer's."""

    kind = "counter"

    def __init__(self, start=0):
        self.total = start
        self.id = "the object's own id"
        self._hidden = 1

    def add(self, n=1, *, times=1):
        self.total += n * times
        return self.total

    def keep(self, tensor):
        self.tensor = tensor

    def fail(self):
        raise ValueError("counted too far")


class AwkwardError(Exception):
    """Cannot be rebuilt from ``args``."""

    def __init__(self, code, *, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code


class FinalError(Exception):
    """Cannot be subclassed."""

    def __init_subclass__(cls, **kwargs):
        raise TypeError("FinalError is final")


def raise_awkward():
    raise AwkwardError(7, reason="seven is too many")


def raise_final():
    raise FinalError("no heirs")


def fail(text="no good"):
    raise ValueError(text)


def fail_late(text):
    time.sleep(0.2)
    raise ValueError(text)


def explode(tensor):
    raise ValueError(f"the value was {tensor.tolist()}")


def leave():
    sys.exit(3)


def interrupt():
    raise KeyboardInterrupt


def generator_exit():
    raise GeneratorExit("odd")


def die(code):
    os._exit(code)


def signal_self(number):
    os.kill(os.getpid(), number)
    time.sleep(1)


def forever():
    while True:
        time.sleep(0.01)


def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002


def divide(a, b):
    return a / b


def fill(n, value):
    return torch.full((n,), float(value))


def outcome(action):
    """What the action gives, or the exception it raises."""
    try:
        return action()
    except Exception as error:
        return error.with_traceback(None)


def each(cases, check):
    """Runs the check on every case of a table: what went wrong, by name."""
    wrong = {}
    for name, case in cases.items():
        try:
            check(case)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    return wrong


def eventually(check, timeout=10.0):
    """Polls ``check`` until it is true."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
