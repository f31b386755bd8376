"""Several threads on one cluster, and where pointers may die."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

EACH = 100


@pytest.fixture
def x():
    return torch.tensor([1.0, 2.0, 3.0])


def note(log, item):
    log.append(item)


def test_a_worker_executes_in_the_order_of_submission(alice, bob):
    logs = {worker: worker.send([]) for worker in (alice, bob)}
    submitted = {alice: [], bob: []}

    def submit(name):
        for n in range(EACH):
            for worker, log in logs.items():
                pointer = worker.run(note, log, (name, n))
                submitted[worker].append((pointer.id, (name, n)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(submit, "abcd"))
    for worker, log in logs.items():
        executed = log.get()
        # numbers are given under the lock that also orders the stream
        assert executed == [item for _, item in sorted(submitted[worker])]
        assert len(executed) == 4 * EACH
        for name in "abcd":
            assert [n for thread, n in executed if thread == name] == list(range(EACH))


def test_threads_that_wait_for_different_workers_do_not_wait_for_each_other(cluster):
    def work(worker):
        total = worker.send(torch.zeros(1))
        for n in range(EACH):
            total.add_(n)
            assert total.fetch().item() == sum(range(n + 1))
        return total.get().item()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, cluster)) == [sum(range(EACH))] * 3


def test_pointers_die_in_any_thread(bob, x):
    pointers = [bob.send(x) for _ in range(50)]

    def drop():
        while True:
            try:
                pointers.pop()
            except IndexError:
                return

    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    kept = [bob.send(x) for _ in range(50)]  # submitting takes their frees along
    for thread in threads:
        thread.join()
    assert sorted(bob.objects) == sorted(pointer.id for pointer in kept)


class Knot:
    """Refers to itself, so that only the garbage collector ends it."""

    def __init__(self, pointer):
        self.pointer, self.me = pointer, self


def test_pointers_die_in_cycles_while_commands_are_sent(bob, x):
    threshold = gc.get_threshold()
    gc.set_threshold(10)  # the collector runs in the middle of submitting, with its locks held
    try:
        for _ in range(200):
            Knot(bob.send(x))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert len(bob.objects) == 0


@pytest.mark.parametrize("threshold", [5, 7])
def test_pointers_die_in_cycles_while_frees_are_gathered(bob, x, threshold):
    def work():
        for _ in range(EACH):
            for _ in range(3):
                Knot(bob.send(x))
            bob.run(abs, -1)

    old = gc.get_threshold()
    gc.set_threshold(threshold)
    try:
        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(work) for _ in range(3)]:
                future.result()
    finally:
        gc.set_threshold(*old)
    gc.collect()
    assert len(bob.objects) == 0


def test_pointers_die_while_the_thread_holds_the_lock_of_the_outbox(bob, x):
    pointer = bob.send(x)
    with bob.link.outbox.lock:
        other = threading.Thread(target=lambda held: held.clear(), args=([pointer],))
        del pointer
        other.start()
        other.join(10)
        assert not other.is_alive(), "a finalizer waited for a lock"
        del other
    assert len(bob.objects) == 0


AT_EXIT = """
import sys, threading, torch, fedproc as fp
cluster = fp.Cluster(["bob"])
pointers = [cluster["bob"].send(torch.ones(3)) for _ in range(20)]
class Knot: pass
knot = Knot(); knot.me = knot; knot.pointers = pointers
sys.kept = pointers[0]          # dies with the modules, after the cluster
threading.current_thread().kept = pointers[1]
print("end")
"""


def test_pointers_die_silently_at_exit(tmp_path):
    script = tmp_path / "at_exit.py"
    script.write_text(AT_EXIT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cycle_collected_in_a_forked_child_frees_nothing(bob, x):
    knot = Knot(bob.send(x))
    knot.pointer.wait()
    with bob.link.outbox.lock:  # held for ever in the child
        pid = os.fork()
        if pid == 0:
            knot = None
            gc.collect()
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(bob.objects) == 1
    assert torch.equal(knot.pointer.get(), x)
