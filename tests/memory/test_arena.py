"""The arena: sizes, limits, leases and what other processes may do with it.

``test_arena_machine.py`` tests the same allocator with random sequences of calls.
"""

import errno
import fcntl
import gc
import json
import math
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedproc.errors import ArenaFullError, ClosedError
from fedproc.memory import pages
from fedproc.memory.arena import Arena, Block, Mapped

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PAGE = mmap.PAGESIZE
LIMIT = 64 * MIB


@pytest.fixture
def arena():
    arena = Arena("test", LIMIT)
    yield arena
    arena.close()


@pytest.fixture
def mapped(arena):
    mapped = Mapped(arena.fd, arena.size_bytes)
    yield mapped
    mapped.close()


def resident_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def filled(arena: Arena, nbytes: int, value: int) -> Block:
    block = arena.allocate(nbytes)
    arena.write_view(block)[:] = value
    return block


def descriptors() -> list[str]:
    return sorted(str(path) for path in Path("/proc/self/fd").iterdir())


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=50,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        (0, 64),
        (1, 64),
        (64, 64),
        (65, 128),
        (257, 320),
        (1000, 1024),
        (3585, 4096),
        (4096, 4096),
        (4097, 8192),
        (32 * 1024, 32 * 1024),
        (33 * 1024, 40 * 1024),
        (MIB, MIB),
        (MIB + 1, MIB * 5 // 4),
        (32 * MIB, 32 * MIB),
        (32 * MIB + 1, 32 * MIB + 4096),
    ],
)
@pytest.mark.skipif(PAGE != 4096, reason="the table is for pages of 4 KiB")
def test_a_block_takes_its_size_class(arena, asked, taken):
    block = arena.allocate(asked)
    assert block.nbytes == asked
    assert arena.used_bytes == taken
    arena.free(block)
    assert arena.used_bytes == 0


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000, 4095, 4096, 5000, 70_000, 3 * MIB])
def test_blocks_are_aligned_for_their_size(arena, nbytes):
    for _ in range(5):
        assert arena.allocate(nbytes).offset % (64 if nbytes < 4096 else PAGE) == 0


def test_the_file_is_sparse_and_a_page_longer_than_the_limit(arena):
    assert arena.size_bytes == os.fstat(arena.fd).st_size - PAGE == LIMIT
    assert resident_bytes(arena) == 0
    filled(arena, 3 * PAGE, 1)
    assert resident_bytes(arena) == 3 * PAGE


@pytest.mark.parametrize(("limit", "size"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_the_limit_is_rounded_up_to_pages(limit, size):
    arena = Arena("tiny", limit)
    assert arena.size_bytes == size
    arena.close()


def test_without_a_limit_the_file_is_twice_the_memory():
    arena = Arena("large")
    assert arena.size_bytes == 2 * pages.psutil.virtual_memory().total
    assert resident_bytes(arena) == 0
    arena.close()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match=f"positive, not {limit}"):
        Arena("none", limit)


def test_a_negative_size_is_refused(arena):
    with pytest.raises(ValueError, match="cannot have -1 bytes"):
        arena.allocate(-1)


@pytest.mark.parametrize("nbytes", [0, 100, 5000, 100_000, 33 * MIB])
def test_the_block_freed_last_is_reused_first(arena, nbytes):
    first = arena.allocate(nbytes)
    arena.free(first)
    assert arena.allocate(nbytes) == first


def test_small_survivors_do_not_pin_large_memory(arena):
    """A small block between two large ones lies in a chunk, not between them."""
    large, small = [], []
    for _ in range(12):
        large.append(arena.allocate(4 * MIB))
        small.append(arena.allocate(100))
    for block in large:
        arena.free(block)
    assert len({block.offset // (64 * 1024) for block in small}) == 1
    arena.allocate(LIMIT - 4 * MIB - 64 * 1024)  # the first large block and the chunk lie before


def test_all_memory_can_be_used_again_in_one_piece(arena):
    """Free lists and empty chunks of every size go back before anything fails."""
    blocks = [arena.allocate(nbytes) for nbytes in [0, 70, 500, 5000, 40_000, MIB, 33 * MIB]]
    blocks += [arena.allocate(100) for _ in range(2000)]
    for block in blocks:
        arena.free(block)
    assert arena.allocate(LIMIT) == Block(0, LIMIT)


def test_the_last_pages_are_usable(arena):
    """Where no whole chunk fits any more, a small block takes a single page."""
    arena.allocate(LIMIT - 2 * PAGE)
    small = [filled(arena, 64, 1) for _ in range(PAGE // 64)]
    page = filled(arena, PAGE, 2)
    assert arena.used_bytes == LIMIT
    with pytest.raises(ArenaFullError):
        arena.allocate(0)
    for block in [page, *small]:
        arena.free(block)


def test_touched_memory_is_preferred_to_fresh_memory(arena):
    for block in [arena.allocate(MIB) for _ in range(8)]:
        arena.free(block)
    assert arena.allocate(6 * MIB).offset + 6 * MIB <= 8 * MIB


@pytest.mark.parametrize("nbytes", [100, 5000, 100_000, 40 * MIB])
def test_freeing_twice_is_an_error(arena, nbytes):
    block = arena.allocate(nbytes)
    arena.free(block)
    with pytest.raises(ValueError, match=f"nbytes={nbytes}.* not allocated in 'test'"):
        arena.free(block)
    assert arena.used_bytes == 0


def test_a_block_that_was_never_given_out_is_refused(arena):
    block = arena.allocate(100)
    for wrong in [Block(block.offset, 99), Block(block.offset + 64, 100), Block(-64, 100)]:
        for use in [arena.free, arena.lease, arena.write_view]:
            with pytest.raises(ValueError, match="not allocated"):
                use(wrong)
    assert arena.used_bytes == 128


def test_empty_blocks_are_blocks(arena, mapped):
    one, two = arena.allocate(0), arena.allocate(0)
    assert one != two
    for shown in [arena.write_view(one), mapped.view(one), mapped.borrow(one), arena.lease(two)]:
        assert (shown.shape, shown.dtype) == ((0,), np.uint8)
    del shown
    assert arena.used_bytes == 64
    arena.free(one)
    assert arena.used_bytes == 0


def test_write_view_shows_the_block(arena):
    left, block, right = (filled(arena, 64, value) for value in (1, 2, 3))
    arena.write_view(block)[:] = 9
    assert set(arena.write_view(left)) == {1}
    assert set(arena.write_view(block)) == {9}
    assert set(arena.write_view(right)) == {3}


def test_offset_of_finds_addresses_inside(arena):
    block = arena.allocate(5000)
    address = arena.write_view(block).ctypes.data
    assert arena.offset_of(address) == block.offset
    assert arena.offset_of(address + 17) == block.offset + 17
    assert arena.offset_of(address - block.offset - 1) is None
    assert arena.offset_of(address - block.offset + arena.size_bytes) is None


# ---------------------------------------------------------------- waste


def soak(arena: Arena, rng: random.Random, steps: int, level: float) -> float:
    """Allocate and free sizes of all orders around ``level`` of the limit; the worst waste."""
    live: list[Block] = []
    asked, worst = 0, 0.0
    for _ in range(steps):
        nbytes = int(math.exp(rng.uniform(math.log(64), math.log(8 * MIB))))
        if asked + nbytes <= level * arena.size_bytes and (not live or rng.random() < 0.75):
            live.append(arena.allocate(nbytes))
            asked += nbytes
        elif live:
            place = rng.randrange(len(live))
            live[place], live[-1] = live[-1], live[place]
            block = live.pop()
            asked -= block.nbytes
            arena.free(block)
        if asked > arena.size_bytes // 4:
            worst = max(worst, arena.used_bytes / asked - 1)
    for block in live:
        arena.free(block)
    return worst


@pytest.mark.parametrize("level", [0.6, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_mixed_sizes_never_run_out_early(seed, level):
    arena = Arena("soak", 256 * MIB)
    assert soak(arena, random.Random(seed), 20_000, level) < 0.25
    assert arena.used_bytes == 0
    assert resident_bytes(arena) == 0, "the allocator itself must not touch the memory"
    arena.close()


# ---------------------------------------------------------------- leases


def derived_views():
    """Ways to keep a lease alive without holding the array that lease() returned."""
    return {
        "slice": lambda a: a[3:5],
        "slice of a slice": lambda a: a[3:50][1:2],
        "reshaped": lambda a: a.reshape(8, 8).T,
        "other dtype": lambda a: a.view(np.float32),
        "memoryview": memoryview,
        "tensor": torch.from_numpy,
        "tensor of a slice": lambda a: torch.from_numpy(a[8:16]),
        "bfloat16": lambda a: torch.from_numpy(a).view(torch.bfloat16),
        "detached": lambda a: torch.from_numpy(a).view(torch.float32).detach(),
        "storage": lambda a: torch.from_numpy(a).untyped_storage(),
        "empty slice": lambda a: torch.from_numpy(a)[:0],
        "parameter": lambda a: torch.nn.Parameter(torch.from_numpy(a).view(torch.float32)),
        "saved for backward": lambda a: (
            torch.from_numpy(a).view(torch.float32) * torch.ones(16, requires_grad=True)
        ),
        "numpy of a tensor": lambda a: torch.from_numpy(a).view(torch.float32)[2:].numpy(),
    }


@pytest.mark.parametrize("derive", derived_views().values(), ids=derived_views().keys())
def test_a_lease_ends_with_its_last_view(arena, derive):
    block = arena.allocate(64)
    view = derive(arena.lease(block))
    assert arena.used_bytes == 64
    assert arena.allocate(64) != block
    del view
    assert arena.used_bytes == 64  # the other one
    assert arena.allocate(64) == block


def test_a_lease_is_writable_and_plain(arena):
    view = arena.lease(arena.allocate(1000))
    assert type(view) is np.ndarray
    assert (view.dtype, view.shape, view.flags.writeable) == (np.uint8, (1000,), True)


def test_dead_leases_are_noticed_by_the_next_call(arena):
    block = arena.allocate(1)
    calls = [
        arena.collect,
        lambda: arena.free(arena.allocate(1)),
        lambda: arena.lease(block),
        lambda: arena.used_bytes,
    ]
    for call in calls:
        other = arena.allocate(5000)
        arena.lease(other)
        assert other in arena._live
        call()
        assert other not in arena._live


def test_a_leased_block_cannot_be_freed_or_leased_again(arena):
    block = arena.allocate(100)
    view = arena.lease(block)
    with pytest.raises(ValueError, match="freed when its last view dies"):
        arena.free(block)
    with pytest.raises(ValueError, match="already leased"):
        arena.lease(block)
    assert arena.used_bytes == 128
    del view
    for use in [arena.free, arena.lease]:
        with pytest.raises(ValueError, match="not allocated"):
            use(block)


def test_a_lease_in_a_cycle_ends_with_the_garbage_collector(arena):
    cycle = [arena.lease(arena.allocate(100))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert arena.used_bytes == 0


def test_a_lease_may_die_while_the_arena_is_locked(arena):
    """A garbage collection may start anywhere, also inside allocate(), with its lock held."""
    view = arena.lease(arena.allocate(100))
    with arena._lock.held():
        del view
    assert arena.used_bytes == 0


def test_a_lease_outlives_the_arena():
    arena = Arena("gone", MIB)
    view = arena.lease(arena.allocate(100))
    view[:] = 7
    arena.close()
    del arena
    gc.collect()
    assert set(view) == {7}


# ---------------------------------------------------------------- threads


def test_four_threads_share_an_arena(arena):
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        held: list[tuple[np.ndarray, Block | None]] = []
        try:
            for _ in range(1500):
                block = arena.allocate(int(math.exp(rng.uniform(0, math.log(100_000)))))
                leased = rng.random() < 0.5
                view = arena.lease(block) if leased else arena.write_view(block)
                view[:] = seed
                held.append((view, None if leased else block))
                if len(held) > 20:
                    old, to_free = held.pop(rng.randrange(len(held)))
                    assert (old == seed).all()
                    if to_free is not None:
                        arena.free(to_free)
            for _, to_free in held:
                if to_free is not None:
                    arena.free(to_free)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert arena.used_bytes == 0


# ---------------------------------------------------------------- full


def test_the_error_names_the_numbers_and_a_remedy(arena):
    arena.allocate(16 * MIB)
    with pytest.raises(ArenaFullError) as caught:
        arena.allocate(50 * MIB)
    text = str(caught.value)
    assert isinstance(caught.value, MemoryError)
    assert (
        "shared memory 'test' has no room for 50.0 MiB: 16.0 MiB of its limit of 64.0 MiB" in text
    )
    assert "of the memory available here may be touched" in text
    assert text.endswith("Free objects (drop their pointers), or raise Cluster(memory_limit=...).")
    assert arena.used_bytes == 16 * MIB


def test_a_failed_allocation_changes_nothing(arena):
    block = filled(arena, MIB, 5)
    for _ in range(3):
        with pytest.raises(ArenaFullError):
            arena.allocate(LIMIT)
    assert set(arena.write_view(block)) == {5}
    assert (arena.used_bytes, resident_bytes(arena)) == (MIB, MIB)
    arena.allocate(LIMIT - MIB)


def test_scattered_memory_is_named_as_the_cause(arena):
    blocks = [arena.allocate(8 * MIB) for _ in range(8)]
    for block in blocks[::2]:
        arena.free(block)
    with pytest.raises(ArenaFullError, match="lies in smaller pieces"):
        arena.allocate(9 * MIB)


def machine(monkeypatch, available: int, total: int = 100 * MIB) -> SimpleNamespace:
    """Pretend that the machine has so much memory (bytes)."""
    memory = SimpleNamespace(total=total, available=available)
    monkeypatch.setattr(pages.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(pages, "_cgroup_rooms", lambda most: [])
    return memory


def test_memory_of_others_is_not_taken(arena, monkeypatch):
    machine(monkeypatch, available=25 * MIB)  # 5 MiB of it are the reserve
    with pytest.raises(ArenaFullError, match=r"20.0 MiB of the memory available.* fewer workers"):
        arena.allocate(24 * MIB)
    assert resident_bytes(arena) == 0
    arena.allocate(20 * MIB)


def test_promised_pages_count_before_they_are_touched(arena, monkeypatch):
    machine(monkeypatch, available=25 * MIB)
    held = [arena.allocate(10 * MIB), arena.allocate(10 * MIB)]
    with pytest.raises(ArenaFullError):
        arena.allocate(10 * MIB)
    for block in held:
        arena.free(block)
    arena.allocate(20 * MIB)  # the same pages


def test_written_pages_count_once(arena, monkeypatch):
    memory = machine(monkeypatch, available=25 * MIB)
    filled(arena, 10 * MIB, 1)
    memory.available -= 10 * MIB
    arena.allocate(10 * MIB)


def test_small_steps_are_checked_too(arena, monkeypatch):
    machine(monkeypatch, available=25 * MIB)
    for _ in range(20):
        arena.allocate(MIB)
    with pytest.raises(ArenaFullError):
        arena.allocate(MIB)


def test_warm_pages_need_no_memory_but_collected_ones_do(arena, monkeypatch):
    blocks = [filled(arena, 8 * MIB, 1), filled(arena, 8 * MIB, 2)]
    memory = machine(monkeypatch, available=0)
    for block in blocks:
        arena.free(block)
    arena.free(arena.allocate(16 * MIB))
    arena.collect()
    arena.collect()
    arena._credit_bytes = 0  # what was granted before the machine changed
    with pytest.raises(ArenaFullError):
        arena.allocate(8 * MIB)
    memory.available = 100 * MIB
    arena.allocate(8 * MIB)


def cgroup(folder: Path, limit: str, used: int, cache: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\nslab 7\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "top", "names"),
    [("0::/a/b", "", V2), ("4:memory:/a/b", "memory", V1), ("4:cpu,memory:/a/b", "memory", V1)],
)
def test_limits_of_all_parent_groups_count(tmp_path, line, top, names):
    membership = tmp_path / "cgroup"
    membership.write_text(f"1:name=systemd:/\n{line}\n")
    root = tmp_path / "fs"
    cgroup(root / top / "a", "1000", 300, 100, names)
    cgroup(root / top / "a" / "b", "max" if names is V2 else str(2**63 - 4096), 1, 1, names)
    rooms = pages._cgroup_rooms(10**9, membership, root)
    assert list(rooms) == [1000 - 50 - 300 + 100]


def test_a_container_sees_its_limit_at_the_top(tmp_path):
    """There the path of the group is the host's, and does not exist inside."""
    membership = tmp_path / "cgroup"
    membership.write_text("7:memory:/docker/0123\n")
    cgroup(tmp_path / "fs" / "memory", "2000", 500, 0, V1)
    assert list(pages._cgroup_rooms(10**9, membership, tmp_path / "fs")) == [1400]


def test_no_cgroups_no_limit(tmp_path):
    assert list(pages._cgroup_rooms(10**9, tmp_path / "absent", tmp_path)) == []


def test_the_tightest_bound_counts(monkeypatch):
    machine(monkeypatch, available=50 * MIB)
    monkeypatch.setattr(pages, "_cgroup_rooms", lambda most: [30 * MIB, 20 * MIB])
    assert pages.machine_room_bytes() == 20 * MIB
    monkeypatch.setattr(pages, "_cgroup_rooms", lambda most: [60 * MIB])
    assert pages.machine_room_bytes() == 45 * MIB


# ---------------------------------------------------------------- giving memory back


def test_memory_stays_warm_up_to_the_peak_of_use(arena):
    keep = filled(arena, MIB, 7)
    for block in [filled(arena, 8 * MIB, 1), filled(arena, 8 * MIB, 2)]:
        arena.free(block)
    assert resident_bytes(arena) == 17 * MIB
    arena.collect()
    assert resident_bytes(arena) == 17 * MIB, "needed a moment ago"
    arena.free(arena.allocate(8 * MIB))
    arena.collect()
    assert resident_bytes(arena) == 9 * MIB, "as much as was needed lately"
    arena.collect()
    assert resident_bytes(arena) == MIB, "nothing was needed since"
    assert set(arena.write_view(keep)) == {7}


def test_collected_memory_is_zero_and_usable(arena, mapped):
    block = filled(arena, 4 * MIB, 1)
    arena.free(block)
    arena.collect()
    arena.collect()
    again = arena.allocate(4 * MIB)
    assert again == block
    assert not mapped.view(again).any()
    arena.write_view(again)[:] = 3
    assert (mapped.view(again) == 3).all()


def test_memory_stays_where_the_system_takes_nothing_back(arena, monkeypatch):
    block = filled(arena, MIB, 1)
    arena.free(block)
    monkeypatch.setattr(mmap, "MADV_REMOVE", 9999)
    arena.collect()
    arena.collect()
    assert resident_bytes(arena) == MIB
    assert arena.allocate(MIB) == block


# ---------------------------------------------------------------- what others see


PEER = """
import json, mmap, os, socket, sys
import numpy as np
from fedproc.memory.arena import Block, Mapped

sock = socket.socket(fileno=int(sys.argv[1]))
message, fds, flags, address = socket.recv_fds(sock, 4096, 1)
size_bytes, *blocks = json.loads(message)
fd, = fds
report = {}

def refused(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "allowed"

def write(prot, flags):
    return lambda: mmap.mmap(fd, size_bytes, flags, prot)

both = mmap.PROT_READ | mmap.PROT_WRITE
report["shrink"] = refused(lambda: os.ftruncate(fd, 0))
report["grow"] = refused(lambda: os.ftruncate(fd, 2 * size_bytes))
report["shared writable"] = refused(write(both, mmap.MAP_SHARED))
report["write"] = refused(lambda: os.write(fd, b"x"))
report["private"] = refused(lambda: mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, both))
mapped = Mapped(fd, size_bytes)
os.close(fd)
block, small = (Block(*block) for block in blocks)
report["view"] = mapped.view(block).tolist()
borrowed = mapped.borrow(block)
borrowed[:] = 99
mapped.borrow(small)[:] = 98
report["borrowed"] = borrowed.tolist()
report["later borrows"] = mapped.borrow(block).tolist(), mapped.borrow(small).tolist()
report["view after"] = mapped.view(block).tolist()
sock.sendall(json.dumps(report).encode())
sock.recv(1)
print(json.dumps(mapped.view(block).tolist()))
"""


def test_another_process_reads_but_cannot_write(arena):
    block, small = filled(arena, 5000, 1), filled(arena, 100, 2)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(50)
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        socket.send_fds(ours, [json.dumps([arena.size_bytes, block, small]).encode()], [arena.fd])
        received = b""
        while not received.endswith(b"}"):
            received += ours.recv(2**16) or b"}"
        report = json.loads(received)
        assert set(arena.write_view(block)) == {1}, "a borrow is written, the owner sees nothing"
        assert set(arena.write_view(small)) == {2}
        arena.write_view(block)[:] = 3
        ours.sendall(b".")
        shown, _ = peer.communicate(timeout=50)
    assert (peer.returncode, set(json.loads(shown))) == (0, {3})
    assert report.pop("private") == "allowed"
    assert report.pop("view") == [1] * 5000
    assert report.pop("borrowed") == [99] * 5000
    assert report.pop("later borrows") == [[1] * 5000, [2] * 100]
    assert report.pop("view after") == [1] * 5000
    assert set(report) == {"shrink", "grow", "shared writable", "write"}
    assert set(report.values()) <= {"OSError", "PermissionError"}


def test_the_file_is_sealed_for_its_owner_too(arena):
    seals = fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS)
    assert seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) == 6
    for size in [0, 2 * LIMIT]:
        with pytest.raises(PermissionError):
            os.ftruncate(arena._writable, size)


def test_a_borrow_leaves_owner_and_later_borrows_alone(arena, mapped):
    block = filled(arena, 5000, 1)
    borrowed = mapped.borrow(block)
    borrowed[100:200] = 9
    assert set(arena.write_view(block)) == {1}
    assert set(mapped.view(block)) == {1}
    assert set(mapped.borrow(block)) == {1}
    assert borrowed.sum() == 4900 + 900


def test_a_borrowed_tensor_can_be_written(arena, mapped):
    block = filled(arena, 4000, 0)
    borrowed = torch.from_numpy(mapped.borrow(block)).view(torch.float32)
    borrowed += 1
    assert borrowed.sum() == 1000
    assert not arena.write_view(block).any()


def test_a_view_follows_the_owner(arena, mapped):
    block = filled(arena, 5000, 1)
    view = mapped.view(block)
    arena.write_view(block)[:] = 2
    assert set(view) == {2}


@pytest.mark.parametrize("inset", [0, 64, 100, 5000])
def test_part_of_a_block_can_be_shown(arena, mapped, inset):
    block = arena.allocate(20_000)
    arena.write_view(block)[:] = np.arange(20_000) % 251
    part = Block(block.offset + inset, 10_000)
    expected = (np.arange(inset, inset + 10_000) % 251).tolist()
    assert mapped.view(part).tolist() == expected
    assert mapped.borrow(part).tolist() == expected


def test_borrows_take_no_descriptors(arena, mapped):
    block = filled(arena, 100, 1)
    before = descriptors()
    held = [mapped.borrow(block) for _ in range(50)]
    assert descriptors() == before
    del held


def test_a_borrow_is_unmapped_with_its_last_view(arena, mapped):
    def mappings() -> int:
        text = Path("/proc/self/maps").read_text()
        return sum("memfd:fedproc-test" in line for line in text.splitlines())

    block = filled(arena, 5000, 1)
    before = mappings()
    tensor = torch.from_numpy(mapped.borrow(block))[10:20]
    assert mappings() == before + 1
    assert set(tensor.tolist()) == {1}
    del tensor
    assert mappings() == before


def test_what_is_outside_cannot_be_shown(arena, mapped):
    outside = [Block(LIMIT - 10, 11), Block(LIMIT, 1), Block(-1, 1), Block(0, -1)]
    for block in outside:
        for show in [mapped.view, mapped.borrow]:
            with pytest.raises(ValueError, match="not inside an arena of"):
                show(block)
    assert mapped.view(Block(LIMIT, 0)).size == mapped.borrow(Block(LIMIT, 0)).size == 0


def test_a_file_that_is_too_short_is_refused(arena):
    with pytest.raises(ValueError, match="shorter than"):
        Mapped(arena.fd, LIMIT + PAGE + 1)


# ---------------------------------------------------------------- the end


def test_close_is_final_and_may_be_repeated(arena, mapped):
    block = filled(arena, 100, 1)
    mine, theirs, borrowed = arena.write_view(block), mapped.view(block), mapped.borrow(block)
    fd = arena.fd
    for _ in range(2):
        arena.close()
        mapped.close()
    assert arena.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    for use in [arena.write_view, arena.lease, mapped.view, mapped.borrow]:
        with pytest.raises(ClosedError, match="closed"):
            use(block)
    for use in [lambda: arena.allocate(1), arena.collect]:
        with pytest.raises(ClosedError, match="'test' is closed"):
            use()
    assert arena.offset_of(mine.ctypes.data) is None
    assert set(mine) == set(theirs) == set(borrowed) == {1}
    arena.free(block)  # what still holds blocks may let go of them
    assert arena.used_bytes == 0


def test_nothing_is_left_of_a_forgotten_arena():
    before = descriptors()
    arena = Arena("forgotten", MIB)
    mapped = Mapped(arena.fd, arena.size_bytes)
    block = filled(arena, 100, 1)
    mapped.view(block)
    del arena, mapped  # no cycle: without the garbage collector
    assert descriptors() == before
    assert "fedproc-forgotten" not in Path("/proc/self/maps").read_text()


FORKED = """
import os
from fedproc.errors import ClosedError
from fedproc.memory.arena import Arena

arena = Arena("parent", 2**20)
block = arena.allocate(100)
view = arena.lease(block)
view[:] = 5
child = os.fork()
if not child:
    del view
    assert arena.used_bytes == 0  # its own copy of the books
    for use in (lambda: arena.allocate(1), arena.collect):
        try:
            use()
        except ClosedError as error:
            assert f"belongs to process {os.getppid()}" in str(error)
        else:
            os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert arena.used_bytes == 128
assert arena.allocate(100) != block
assert set(view) == {5}
"""


def test_a_forked_child_cannot_disturb_its_parent():
    done = run(FORKED)
    assert (done.returncode, done.stderr) == (0, "")


AT_EXIT = """
import threading
from fedproc.memory.arena import Arena, Mapped

class Late:
    def __init__(self, *held):
        self.held = held
    def __del__(self):
        self.held = None

arena = Arena("exit", 2**20)
mapped = Mapped(arena.fd, arena.size_bytes)
view = arena.lease(arena.allocate(100))
cycle = [arena.lease(arena.allocate(100)), arena, mapped.borrow(arena.allocate(10))]
cycle.append(cycle)
late = Late(arena.lease(arena.allocate(100)))
threading.late = Late(arena.lease(arena.allocate(100)), mapped.view(arena.allocate(10)))
"""


def test_leases_may_be_alive_at_interpreter_exit():
    done = run(AT_EXIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- other systems


def test_old_kernels_do_not_know_the_newest_flag(monkeypatch):
    asked = []

    def memfd_create(label, flags):
        asked.append(flags)
        if flags & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(label, flags)

    create = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", memfd_create)
    arena = Arena("old", MIB)
    assert asked == [os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | more for more in (8, 0)]
    assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) & 6 == 6
    arena.close()


def test_long_names_are_cut():
    arena = Arena("ü" * 500, MIB)
    assert "memfd:fedproc-ü" in str(Path(f"/proc/self/fd/{arena.fd}").readlink())
    arena.close()


def test_without_proc_the_seal_keeps_writers_out(monkeypatch):
    def no_proc(*args):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_proc)
        arena = Arena("chroot", MIB)
    block = filled(arena, 5000, 4)
    mapped = Mapped(arena.fd, arena.size_bytes)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.fd, MIB)
    assert set(mapped.view(block)) == set(mapped.borrow(block)) == {4}
    arena.free(block)
    arena.collect()
    arena.collect()  # refused by the kernel under that seal: the memory stays
    assert arena.allocate(5000) == block
    mapped.close()
    arena.close()


@pytest.fixture
def fallback(monkeypatch):
    """An arena on a system without memfd."""
    monkeypatch.delattr(os, "memfd_create")
    arena = Arena("fallback", 8 * MIB)
    yield arena
    arena.close()


def test_without_memfd_an_unlinked_file_does(fallback):
    assert "(deleted)" in str(Path(f"/proc/self/fd/{fallback.fd}").readlink())
    block = filled(fallback, 5000, 1)
    mapped = Mapped(fallback.fd, fallback.size_bytes)
    assert set(mapped.view(block)) == {1}
    with pytest.raises(PermissionError):
        mmap.mmap(fallback.fd, MIB)
    fallback.free(block)
    fallback.collect()
    fallback.collect()
    assert resident_bytes(fallback) == 0
    mapped.close()


def test_without_memfd_pages_are_reserved_before_use(fallback):
    fallback.allocate(MIB)
    assert resident_bytes(fallback) == MIB


def test_without_memfd_a_full_file_system_is_an_error(fallback, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ArenaFullError):
        fallback.allocate(MIB)
    assert fallback.used_bytes == 0
    monkeypatch.undo()
    fallback.allocate(MIB)


def test_a_mapping_that_the_system_refuses_is_an_error():
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="cannot map shared memory"):
            pages.map_private(read, PAGE, 0)
    finally:
        os.close(read)
        os.close(write)
