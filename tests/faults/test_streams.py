"""What can happen to the stream between parent and worker: cases 26 to 33."""

import random
import resource
import threading

import pytest
import torch

import fedproc as fp
from fedproc.transport import faults
from fedproc.transport.channel import Channel
from fedproc.wire.frames import HEADER, VERSION
from tests.faults.things import eventually, touch
from tests.federated.worlds import linear

pytestmark = pytest.mark.faults


def same(value):
    return value


def complain(n):
    raise ValueError("x" * 5000 + f" number {n}")


def test_case_26_both_sides_full(transport):
    """Fetches of 64 KiB, asked for and answered faster than either side reads."""
    sizes = 2000 if transport == "process" else 300
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
        body = random.Random(26).randbytes(64 << 10)
        echoed = [bob.run(same, body + n.to_bytes(4, "big")) for n in range(sizes)]
        for n, answer in enumerate(fp.gather(echoed)):
            assert answer[-4:] == n.to_bytes(4, "big")
            assert len(answer) == len(body) + 4
        del echoed
        assert len(bob.objects) == 0


def test_case_27_a_parent_that_does_not_read(tmp_path):
    """The worker computes on and keeps what it cannot write; afterwards nothing is lost."""
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        failing = [bob.run(complain, n) for n in range(2000)]  # 10 MB of answers
        bob.run(touch, str(tmp_path / "done"))
        bob.link.flush()
        eventually((tmp_path / "done").exists)  # nothing was read by anybody meanwhile
        for n in (0, 999, 1999):
            with pytest.raises(ValueError, match=f"number {n}\n"):
                failing[n].get()
        for pointer in failing:
            with pytest.raises((ValueError, fp.FedprocError), match=r"number|failed long ago"):
                pointer.wait()
        assert bob.run(abs, -1).get() == 1


SHORT = [
    "in=worker on=read do=short",
    "in=worker on=write do=short",
    "in=parent on=read do=short; in=parent on=write do=short",
]


@pytest.mark.parametrize("rules", SHORT)
def test_case_28_one_byte_at_a_time(transport, fault, rules):
    fault(rules)
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        alice, bob = cluster
        p = bob.send(torch.arange(5000.0))
        assert (p + 1).move(alice).sum().item() == 5000 * 5001 / 2
        model = bob.send(linear(3, 2))
        assert model(bob.run(torch.ones, 1, 3)).shape == (1, 2)
        with pytest.raises(ZeroDivisionError):
            bob.run(lambda: 1 / 0).get()
        with p.borrow() as t:
            assert t[4999].item() == 4999.0


@pytest.mark.parametrize("side", ["parent", "worker"])
@pytest.mark.parametrize("on", ["read", "write"])
def test_case_29_garbage_closes_the_link(transport, fault, capfd, side, on):
    frame = "Call" if (side, on) in {("parent", "write"), ("worker", "read")} else "Value"
    fault(f"in={side} worker=bob on={on} frame={frame} do=garbage")
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:
        with pytest.raises(fp.WorkerLostError, match="bob") as caught:
            cluster["bob"].run(same, 1).get()
        told = f"{caught.value}{capfd.readouterr().err}"
        assert "no frame at byte" in told or "garbage, as FEDPROC_FAULT asks for" in told
        assert cluster["alice"].run(same, 2).get() == 2


@pytest.mark.parametrize(
    ("header", "noticed"),
    [
        ((VERSION + 1, 0, 0, 5, 1, 5 ^ 0xFFFFFFFF), True),  # another version
        ((VERSION, 0, 0, 5, 1, 5), True),  # a wrong check word
        ((VERSION, 0, 0, 1 << 31, 1, (1 << 31) ^ 0xFFFFFFFF), True),  # a huge length
        ((VERSION, 0, 0, 1 << 30, 1, (1 << 30) ^ 0xFFFFFFFF), False),  # cut: it never comes
    ],
)
def test_case_29_headers_that_lie_cost_no_memory(header, noticed):
    import socket

    here, there = socket.socketpair()
    channel = Channel(here)
    there.sendall(HEADER.pack(*header) + b"body")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if noticed:
        with pytest.raises(Exception, match="no frame at byte 0"):
            channel.receive(print)
    else:
        channel.receive(print)
        there.close()
        channel.receive(print)
        assert channel.ended
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16, "KiB"
    channel.close()
    there.close()


@pytest.mark.parametrize("rules", ["in=worker on=write do=dup", "in=parent on=write n=5 do=dup"])
def test_a_frame_that_comes_twice_counts_once(transport, fault, rules):
    fault(rules)
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
        count = bob.send(torch.zeros(1))
        for _ in range(10):
            count.add_(1)
        assert count.fetch().item() == 10.0
        assert len(bob.objects) == 1


@pytest.mark.parametrize("side", ["parent", "worker"])
def test_a_delay_changes_nothing(transport, fault, side):
    fault(f"in={side} on=read do=delay seconds=0.05; in={side} on=write n=2 do=delay seconds=0.05")
    with fp.Cluster(["bob"], transport=transport) as cluster:
        assert (cluster["bob"].send(torch.ones(2)) + 1).get().tolist() == [2.0, 2.0]


def test_without_faults_the_channel_is_the_plain_one(cluster, fault):
    assert {type(worker.link.channel) for worker in cluster} == {Channel}
    fault("in=worker worker=nobody on=read do=eof")
    with fp.Cluster(1, transport="inline") as other:
        assert type(other.workers[0].link.channel) is Channel


@pytest.mark.parametrize(
    "rule",
    [
        "do=kill",
        "in=zygote on=read do=kill",
        "in=worker on=read do=cut",
        "in=worker on=write do=delay",
        "in=worker on=write do=eof colour=red",
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule):
    with pytest.raises(ValueError, match="is no rule"):
        faults.parse(rule)


def note(log, who):
    log.append(who)


def test_case_30_eight_threads_and_the_order_of_each(cluster, bob, alice):
    """The log that a worker keeps has every thread's commands in the order of submission."""
    logs = [worker.send([]) for worker in (alice, bob)]
    failures = []

    def work(who):
        choice = random.Random(who)
        try:
            for n in range(40):
                log = logs[choice.randrange(2)]
                log.worker.run(note, log, (who, n))
                dropped = log.worker.run(same, n)
                if choice.random() < 0.2:
                    assert dropped.get() == n
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    written = [log.get() for log in logs]
    assert sorted([*written[0], *written[1]]) == [(who, n) for who in range(8) for n in range(40)]
    for entries in written:
        for who in range(8):
            mine = [n for thread, n in entries if thread == who]
            assert mine == sorted(mine)


def limit_descriptors(most):
    old, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return old


@pytest.mark.parametrize("most", [3, 11])
def test_case_31_the_limit_of_open_files(most):
    """The kernel drops the descriptor (3), or the copy of it cannot be made (11)."""
    with fp.Cluster(["alice", "bob"]) as cluster:
        alice, bob = cluster
        p = alice.send(torch.arange(20_000.0))
        bob.send(torch.ones(1)).wait()
        old = bob.run(limit_descriptors, most).get()
        with pytest.raises(OSError, match="Too many open files"):
            p.move(bob)
        assert p.worker is alice
        assert p[7].item() == 7.0
        bob.run(limit_descriptors, old).wait()
        assert p.move(bob).sum().item() == 19_999 * 10_000
        assert p.worker is bob


def recurse():
    return recurse()


class Nested:
    """Pickling it never ends."""

    def __reduce__(self):
        return Nested, (Nested(),)


def fail_at_length():
    raise ValueError("long " * 4_000_000)


def test_case_32_odd_failures_come_home_and_the_worker_lives(bob):
    with pytest.raises(RecursionError):
        bob.run(recurse).get()
    with pytest.raises(fp.NotShippableError):
        bob.send(Nested())
    with pytest.raises(fp.NotShippableError):
        bob.run(Nested).get()
    with pytest.raises(ValueError, match="long long") as caught:
        bob.run(fail_at_length).get()
    assert len(str(caught.value)) < 1 << 18, "20 MB of text would be of no use to anybody"
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit, BaseException):
        with pytest.raises(fp.RemoteError, match=kind.__name__):
            bob.run(throw, kind).get()
    assert bob.run(abs, -1).get() == 1


def throw(kind):
    raise kind("odd")
