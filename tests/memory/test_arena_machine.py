"""Random sequences of calls on an arena, checked against a list of what must be alive."""

import mmap
import os
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedproc.errors import ArenaFullError, ClosedError
from fedproc.memory.arena import Arena, Block, Mapped
from fedproc.memory.tensors import Exporter
from tests.fuzz.amount import amount

LIMIT = 96 * 2**20
EDGE = 256
PAGE = mmap.PAGESIZE
SLOT_MAX = 32 << 10  # larger blocks have pages of their own
CHUNK_MAX = 256 << 10

CLASSES = sorted(
    {
        size
        for power in range(6, 25)
        for quarters in (4, 5, 6, 7)
        if (size := 2**power * quarters // 4) % (64 if size < 4096 else PAGE) == 0
    }
    | {2**25}
)

SIZES = st.one_of(
    st.integers(0, 300),
    st.integers(3000, 5000),
    st.integers(16_000, 100_000),
    st.integers(2**17, 2**22),
    st.integers(2**24, 2**26),
    st.sampled_from(CLASSES),
)


def rounded(nbytes: int) -> int:
    """What a block of ``nbytes`` must take."""
    if nbytes > CLASSES[-1]:
        return (nbytes + PAGE - 1) // PAGE * PAGE
    return CLASSES[bisect_left(CLASSES, nbytes)]


class Held(NamedTuple):
    block: Block
    view: np.ndarray  # of a lease: what keeps it alive
    leased: bool
    mark: int


def stamp(view: np.ndarray, mark: int) -> None:
    """Write the ends only: large blocks would cost memory and time."""
    view[:EDGE] = mark
    view[-EDGE:] = mark


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena("machine", LIMIT)
        self.mapped = Mapped(self.arena.fd, self.arena.size_bytes)
        self.held: list[Held] = []
        self.freed: Block | None = None
        self.marks = 0

    @rule(nbytes=SIZES, leased=st.booleans())
    def allocate(self, nbytes, leased):
        try:
            block = self.arena.allocate(nbytes)
        except ArenaFullError:
            assert sum(rounded(held.block.nbytes) for held in self.held) + nbytes > LIMIT // 4
            return
        assert block.nbytes == nbytes
        view = self.arena.lease(block) if leased else self.arena.write_view(block)
        self.marks = self.marks % 255 + 1
        stamp(view, self.marks)
        self.held.append(Held(block, view[:] if leased else view, leased, self.marks))

    @rule(nbytes=st.integers(0, 5000), count=st.integers(2, 60))
    def allocate_many(self, nbytes, count):
        for _ in range(count):
            self.allocate(nbytes, leased=False)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data):
        self.drop(data.draw(st.integers(0, len(self.held) - 1)))

    @precondition(lambda self: len(self.held) > 5)
    @rule(step=st.integers(2, 4), offset=st.integers(0, 3))
    def let_go_of_some(self, step, offset):
        for place in sorted(range(offset % step, len(self.held), step), reverse=True):
            self.drop(place)

    def drop(self, place):
        held = self.held.pop(place)
        if held.leased:
            with pytest.raises(ValueError, match="leased"):
                self.arena.free(held.block)
        else:
            self.arena.free(held.block)
        self.freed = held.block

    @precondition(lambda self: self.freed and all(h.block != self.freed for h in self.held))
    @rule()
    def free_twice(self):
        with pytest.raises(ValueError, match="not allocated"):
            self.arena.free(self.freed)

    @rule()
    def collect(self):
        self.arena.collect()

    @rule()
    def collect_twice(self):
        """Two calls in a row give back every page that neither a block nor a chunk holds."""
        self.arena.collect()
        self.arena.collect()
        written = os.fstat(self.arena.fd).st_blocks * 512
        small = sum(rounded(held.block.nbytes) <= SLOT_MAX for held in self.held)
        large = sum(
            rounded(held.block.nbytes)
            for held in self.held
            if rounded(held.block.nbytes) > SLOT_MAX
        )
        assert written <= large + small * CHUNK_MAX

    @rule()
    def map_again(self):
        """A reader that comes later sees the same; one that leaves changes nothing."""
        self.mapped.close()
        with pytest.raises(ClosedError):
            self.mapped.view(Block(0, 1))
        self.mapped = Mapped(self.arena.fd, self.arena.size_bytes)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def borrow(self, data):
        """A reader's own mapping: what it writes there, nobody else sees."""
        held = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        own = self.mapped.borrow(held.block)
        assert (own[:EDGE] == held.mark).all()
        stamp(own, held.mark ^ 255)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def export_as_tensor(self, data):
        """A tensor that lies in the arena travels as a place; one beside it as a new block."""
        held = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        before = self.arena.used_bytes
        exporter = Exporter(self.arena, inline_bytes=0)
        if held.block.nbytes:
            place = exporter(torch.from_numpy(held.view), (1,))
            assert place == (held.block.offset, held.block.nbytes)
        assert self.arena.used_bytes == before
        offset, nbytes = exporter(torch.full((EDGE,), 9, dtype=torch.uint8), (1,))
        assert self.arena.used_bytes == before + rounded(EDGE)
        assert (self.mapped.view(Block(offset, nbytes)) == 9).all()
        exporter.release()
        assert self.arena.used_bytes == before

    @rule(more=st.integers(1, 2**40))
    def ask_for_more_than_the_limit(self, more):
        """Refused with the numbers, and nothing has changed: the invariants look."""
        with pytest.raises(ArenaFullError, match=r"limit of 96\.0 MiB"):
            self.arena.allocate(LIMIT + more)

    @rule()
    def use_everything(self):
        """Once all is free, all of it can be had in one piece."""
        while self.held:
            self.drop(-1)
        self.arena.free(self.arena.allocate(LIMIT))

    @invariant()
    def used_bytes_are_exact(self):
        assert self.arena.used_bytes == sum(rounded(held.block.nbytes) for held in self.held)

    @invariant()
    def blocks_are_apart_aligned_and_inside(self):
        end = 0
        for block in sorted(held.block for held in self.held):
            assert block.offset >= end
            assert block.offset % (64 if block.nbytes < 4096 else PAGE) == 0
            end = block.offset + rounded(block.nbytes)
        assert end <= LIMIT

    @invariant()
    def contents_are_undisturbed(self):
        for held in self.held:
            for view in (held.view, self.mapped.view(held.block)):
                assert (view[:EDGE] == held.mark).all()
                assert (view[-EDGE:] == held.mark).all()

    def teardown(self):
        self.use_everything()
        assert self.arena.used_bytes == 0
        self.mapped.close()
        self.arena.close()


ArenaMachine.TestCase.settings = amount(40, 40)
TestArena = pytest.mark.timeout(240)(ArenaMachine.TestCase)
