"""Fixtures of the scenarios, beyond those of all tests."""

import pytest
import torch

import fedproc as fp


@pytest.fixture
def hooked():
    """``x.send(bob)`` and ``model.send(bob)``, as the tutorials write them."""
    fp.hook_torch()
    try:
        yield
    finally:
        fp.unhook_torch()


@pytest.fixture
def x():
    """A small tensor, never changed by a test."""
    return torch.tensor([1.0, 2.0])


@pytest.fixture
def pair(transport):
    """A cluster of bob and alice, in that order."""
    with fp.Cluster(["bob", "alice"], transport=transport) as cluster:
        yield cluster
