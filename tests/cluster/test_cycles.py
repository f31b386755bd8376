"""Starting, using and closing clusters again and again: nothing grows."""

import ctypes
import gc
import threading
from pathlib import Path

import psutil
import pytest
import torch

import fedproc as fp


def _footprint() -> tuple[int, int, int]:
    children = psutil.Process().children(recursive=True)
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(children)


def _used_bytes() -> int:
    """Memory of this process, without what the allocator keeps for later: that goes up and down."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def _cycle(transport: str) -> None:
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        alice, bob = cluster
        p = bob.send(torch.ones(20_000))
        assert (p + 1).move(alice).sum().item() == 40_000.0


@pytest.mark.timeout(180)
def test_two_hundred_cycles_leave_nothing():
    _cycle("process")
    memory, before = _used_bytes(), _footprint()
    for _ in range(200):
        _cycle("process")
    after = _used_bytes()
    assert _footprint() == before
    assert after - memory < 32 << 20


def test_inline_cycles_leave_nothing():
    _cycle("inline")
    gc.collect()
    before = _footprint()
    for _ in range(50):
        _cycle("inline")
    gc.collect()
    assert _footprint() == before


def test_many_dropped_pointers_leave_the_tables_empty():
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        x = bob.send(torch.ones(4))
        for _ in range(20_000):
            x + 1
        assert len(bob.objects) == 1
        assert len(bob.link.outbox.handles) == 1
        assert bob.link.inbox.unanswered() == 0
        assert bob.stats().arena_bytes < 4096
