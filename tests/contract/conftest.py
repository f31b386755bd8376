"""Fixtures of the contract tests, beyond those of all tests."""

import os
import time
from pathlib import Path

import pytest
import torch


class Gate:
    """Holds a remote command until the test opens it: an event, not a guess about time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.hold = _holder(str(path))

    def open(self) -> None:
        self._path.touch()


def _holder(path: str):
    def hold(value=None):
        deadline = time.monotonic() + 10
        while not os.path.exists(path):  # noqa: PTH110 - runs in a worker: one light import
            if time.monotonic() > deadline:
                raise TimeoutError("the gate was never opened")
            time.sleep(0.002)
        return value

    return hold


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "open")
    yield gate
    gate.open()


@pytest.fixture
def x():
    """A small tensor, never changed by a test."""
    return torch.tensor([1.0, 2.0, 3.0])
