"""Pointers, borrows and memory at their ends: cases 34 to 43."""

import gc
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fedproc as fp
from tests.faults.things import eventually, python

pytestmark = pytest.mark.faults


class Cycle:
    def __init__(self, pointer):
        self.pointer, self.me = pointer, self


def test_case_34_pointers_dropped_anywhere(cluster, bob):
    """In a thread, by the collector in the middle of submitting, in a signal handler."""
    held = [[bob.send(torch.ones(2)) for _ in range(20)] for _ in range(2)]
    thread = threading.Thread(target=held[0].clear)
    thread.start()
    thread.join()
    old = signal.signal(signal.SIGALRM, lambda *_: held[1].clear())
    signal.setitimer(signal.ITIMER_REAL, 0.005)
    eventually(lambda: (bob.run(abs, -1).wait(), not held[1])[1])
    signal.signal(signal.SIGALRM, old)
    thresholds = gc.get_threshold()
    gc.set_threshold(7)
    try:
        for _ in range(50):
            Cycle(bob.send(torch.ones(2)))
            bob.run(abs, -1)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert len(bob.objects) == 0


TEARDOWN = """
import atexit, torch, fedproc as fp
cluster = fp.Cluster(["bob"])
bob = cluster["bob"]
held = [bob.send(torch.ones(2)) for _ in range(5)]
atexit.register(lambda: held.pop())      # runs before the cluster is closed
early = bob.send(torch.ones(2))
class Late:
    def __del__(self, pointer=bob.send(torch.ones(2))):
        del pointer
late = Late()
print("end")
"""


def test_case_34_pointers_dropped_at_exit_and_in_the_teardown_of_modules():
    done = python(TEARDOWN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def fail():
    raise ValueError("first")


def test_case_35_frees_race_with_use(cluster, bob):
    for n in range(300):
        p = bob.send(torch.full((2,), float(n)))
        q = p + 1
        del p  # the free follows the use in the stream
        assert q[0].item() == n + 1
    tombstone = bob.run(fail)
    dependent = bob.run(abs, tombstone)
    del tombstone
    with pytest.raises(ValueError, match="first"):
        dependent.get()
    p = bob.send(torch.ones(2))
    oid = p.id
    del p, q, dependent
    bob.link.trash.append(oid)  # a second free of the same id
    assert len(bob.objects) == 0
    assert bob.send(torch.ones(2)).get().tolist() == [1.0, 1.0]


def test_case_36_a_borrow_outlives_pointer_worker_and_cluster(transport):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
        p = bob.send(torch.arange(10_000.0))
        block = p.borrow()
        kept = block.__enter__()[5:]
        del p
        bob.send(torch.zeros(10_000)).wait()  # would take a free block
        assert kept[0].item() == 5.0
        bob.kill()
        with pytest.raises(fp.WorkerLostError):
            bob.run(abs, -1)
        assert kept[-1].item() == 9999.0
        block.__exit__(None, None, None)
    eventually(lambda: not bob.alive)


def test_case_42_what_a_dead_worker_lent_stays_until_it_is_let_go():
    """Case 36 shows that it stays; the leak check around this test, that it goes."""
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        with bob.send(torch.ones(10_000)).borrow() as lent:
            bob.kill()
            assert lent.sum().item() == 10_000.0
        del lent
        with pytest.raises(fp.WorkerLostError):
            bob.run(abs, -1)
    assert "memfd:fedproc-bob" not in Path("/proc/self/maps").read_text()


def arena_bytes(fd):
    """All bytes that an arena holds."""
    found, place, end = [], 0, os.fstat(fd).st_size
    while place < end:
        try:
            start = os.lseek(fd, place, os.SEEK_DATA)
        except OSError:
            break
        place = os.lseek(fd, start, os.SEEK_HOLE)
        found.append(os.pread(fd, place - start, start))
    return b"".join(found)


def fail_with(value):
    raise ValueError(f"the value is {value.tolist()[0]}")


def test_case_43_no_byte_of_a_private_object_leaves(capfd):
    secret = torch.full((9000,), 1234.5678)
    needle = secret.numpy().tobytes()[:64]
    with fp.Cluster(["alice", "bob"]) as cluster:
        alice, bob = cluster
        public = bob.send(torch.full((9000,), 77.25))
        public.wait()
        p = bob.send(secret, private=True)
        q = p * 2
        q.wait()
        told = []
        for way in (p.get, q.fetch, lambda: p.move(alice), lambda: bob.run(fail_with, p).get()):
            with pytest.raises((fp.NotPermittedError, fp.RemoteError)) as caught:
                way()
            told.append(str(caught.value))
        exported = [arena_bytes(fd) for fd in (bob.link.mapped.fd, cluster._supervisor.arena.fd)]
        assert torch.full((16,), 77.25).numpy().tobytes() in exported[0], "else it proves nothing"
        assert not any(needle in memory for memory in exported)
        assert not any("1234.5" in text or "2469.1" in text for text in told)
        told.append(repr((p, bob.objects)))
        assert "1234.5" not in told[-1]
    assert "1234.5" not in "".join(capfd.readouterr())


# ---------------------------------------------------------------- memory that is not there


TINY = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None) or libc.mount(
        b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=24m"):
    print("may not mount")
    sys.exit()
sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else os.environ["FEDPROC_TEST_PATH"])
{forbid}
import torch, fedproc as fp
with fp.Cluster(["alice", "bob"], preload={preload}) as cluster:
    alice, bob = cluster
    first = bob.send(torch.arange(1 << 20))          # 8 MiB
    held, refused = [], 0
    for n in range(10):
        try:
            p = bob.send(torch.full((1 << 20,), float(n)))   # 4 MiB each
            p.wait()
            held.append(p)
        except fp.ArenaFullError as error:
            refused += 1
            text = str(error)
    if refused:
        assert "has no room for 4.0 MiB" in text and "--shm-size" in text, text
        assert [p[0].item() for p in held] == [float(n) for n in range(len(held))]
        held.clear()
    assert first.sum().item() == (1 << 20) * ((1 << 20) - 1) // 2
    assert (alice.run(torch.ones, 2) + 1).get().tolist() == [2.0, 2.0]
    print("refused" if refused else "fits")
"""
FORBID = """
import os, errno
def memfd_create(name, flags=0):
    raise OSError(errno.ENOSYS, "Function not implemented")
os.memfd_create = memfd_create
"""


def test_case_40_a_tiny_dev_shm(tmp_path):
    """24 MiB of /dev/shm: nothing to a memfd; without one, an error in time, never SIGBUS."""
    (tmp_path / "fedproc_test_no_memfd.py").write_text(FORBID)
    codes = (
        TINY.format(forbid="", preload=()),
        TINY.format(forbid="import fedproc_test_no_memfd", preload=("fedproc_test_no_memfd",)),
    )
    with ThreadPoolExecutor() as both:
        ends = list(both.map(lambda code: python(code, FEDPROC_TEST_PATH=str(tmp_path)), codes))
    assert [(done.returncode, done.stderr) for done in ends] == [(0, ""), (0, "")]
    if ends[0].stdout == "may not mount\n":
        pytest.skip("only root may make a small /dev/shm of its own")
    assert [done.stdout for done in ends] == ["fits\n", "refused\n"]


def test_case_40_without_seals_arenas_work_on(monkeypatch):
    import fcntl

    monkeypatch.delattr(fcntl, "F_ADD_SEALS")
    with fp.Cluster(["bob"], transport="inline") as cluster:
        assert cluster["bob"].send(torch.ones(9000)).sum().item() == 9000.0


def pretend_a_group(folder, limit):
    """From now on this process sees a control group with a limit, in injected files."""
    from fedproc.memory import pages

    root = Path(folder)
    (root / "cgroup").write_text("0::/\n")
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text("0\n")
    (root / "memory.stat").write_text("inactive_file 0\n")
    rooms = pages._cgroup_rooms
    pages._cgroup_rooms = lambda most: rooms(most, root / "cgroup", root)


def test_case_40_the_limit_of_a_control_group(tmp_path):
    with fp.Cluster(["alice", "bob"]) as cluster:
        alice, bob = cluster
        kept = bob.send(torch.arange(1000.0))
        bob.run(pretend_a_group, str(tmp_path), 20 << 20).wait()
        with pytest.raises(fp.ArenaFullError, match=r"'bob' has no room for 32.0 MiB.*available"):
            bob.send(torch.zeros(8 << 20)).wait()
        assert kept[999].item() == 999.0
        assert alice.send(torch.zeros(8 << 20)).sum().item() == 0.0


def test_freed_memory_goes_back_to_the_system(transport, monkeypatch):
    """By itself, a few seconds after it was needed last: in the worker and in the parent."""
    from fedproc.remote import hub

    monkeypatch.setattr(hub, "UPKEEP_SECONDS", 0.1)
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
        bob.run(hurry).wait()
        bob.run(abs, -1).wait()

        def resident():
            fds = (bob.link.mapped.fd, cluster._supervisor.arena.fd)
            return [os.fstat(fd).st_blocks * 512 for fd in fds]

        p = bob.send(torch.ones(4 << 20))
        p.wait()
        assert resident()[0] >= 16 << 20
        kept = bob.send(torch.full((1 << 18,), 7.0))
        kept.wait()
        del p
        eventually(lambda: max(resident()) < 4 << 20)
        assert (kept.get() == 7.0).all()


def hurry():
    from fedproc.worker import upkeep

    upkeep.LOOK_SECONDS = 0.1
