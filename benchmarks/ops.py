"""What a command costs: called and waited for, pipelined, and as a chain of tensor operations.

The yardstick for a call that is waited for is a bare duplex pipe of multiprocessing with an echo
process at the other end, measured in the same run: pickle, write, wake up, read, and back.
"""

import contextlib
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch

import fedproc as fp
from benchmarks.measure import ROOT, Row, main, paired, plain_python, ratio, row, seconds_of
from benchmarks.peers.peer import Peer, peers

MICROSECONDS = 1e6
REQUEST = ("operator.neg", (7,), {})


@contextlib.contextmanager
def bare_pipe() -> Iterator[Connection]:
    """A duplex pipe to a process that echoes."""
    here, there = multiprocessing.Pipe(duplex=True)
    command = [sys.executable, "-m", "benchmarks.echo", str(there.fileno())]
    with subprocess.Popen(command, pass_fds=[there.fileno()], cwd=ROOT):
        there.close()
        with here:
            yield here


def per_call(calls: int, action) -> float:
    """Seconds of one of ``calls`` calls."""

    def repeat() -> None:
        for _ in range(calls):
            action()

    return seconds_of(repeat) / calls


def pipe_round_trip(connection: Connection) -> None:
    connection.send(REQUEST)
    connection.recv()


def pipelined(cluster: fp.Cluster, worker, calls: int) -> float:
    """Seconds of one of ``calls`` calls, submitted without waiting and then waited for together."""

    def submit_and_wait() -> None:
        pointers.extend(worker.run(abs, -number) for number in range(calls))
        cluster.wait()

    pointers: list = []
    return seconds_of(submit_and_wait) / calls


def pipelined_home(worker, calls: int) -> float:
    """The same, and every result brought here."""
    return (
        seconds_of(lambda: fp.gather([worker.run(abs, -number) for number in range(calls)])) / calls
    )


def chained_adds(x, count: int) -> float:
    """Seconds of one of ``count`` additions, each of which needs the one before."""

    def chain() -> None:
        y = x
        for _ in range(count):
            y = y + x
        y[0].item()  # waits for all of them, here as there

    return seconds_of(chain) / count


def benchmark(quick: bool) -> list[Row]:
    runs, calls, many = (2, 20, 50) if quick else (15, 500, 2000)
    four = torch.ones(4)
    with bare_pipe() as pipe, fp.Cluster(1, threads=1) as cluster:
        (worker,) = cluster
        one, remote_four = worker.send(torch.tensor(1.0)), worker.send(four)
        blocking = paired(
            runs,
            pipe=lambda: per_call(calls, lambda: pipe_round_trip(pipe)),
            item=lambda: per_call(calls, one.item),
            run_get=lambda: per_call(calls, lambda: worker.run(abs, -7).get()),
        )
        flowing = paired(
            runs,
            python=plain_python,
            done=lambda: pipelined(cluster, worker, many),
            home=lambda: pipelined_home(worker, many),
            adds=lambda: chained_adds(remote_four, many),
            local_adds=lambda: chained_adds(four, many),
        )
    return [
        row("bare pipe, round trip", "us", blocking["pipe"], scale=MICROSECONDS),
        row("pointer.item()", "us", blocking["item"], scale=MICROSECONDS),
        ratio("  against the bare pipe", blocking["item"], blocking["pipe"]),
        row("worker.run(abs, -7).get()", "us", blocking["run_get"], scale=MICROSECONDS),
        ratio("  against the bare pipe", blocking["run_get"], blocking["pipe"]),
        row("plain Python between the next four", "us", flowing["python"], scale=MICROSECONDS),
        row("  when it was quickest", "us", [min(flowing["python"])], scale=MICROSECONDS),
        row(f"{many:,} calls pipelined, each", "us", flowing["done"], scale=MICROSECONDS),
        row("  with their results brought home", "us", flowing["home"], scale=MICROSECONDS),
        row(f"{many:,} chained adds of 4 floats, each", "us", flowing["adds"], scale=MICROSECONDS),
        row("  the same in this process", "us", flowing["local_adds"], scale=MICROSECONDS),
        *against_peers(runs, calls, many),
    ]


def against_peers(runs: int, calls: int, many: int) -> list[Row]:
    """The same three, of every peer that runs here; a ratio says how many times ours that is."""
    rows: list[Row] = []
    with peers("ray_actors", "torch_rpc") as present:
        for peer in present:
            rows += against(peer, runs, calls, many)
    return rows


def against(peer: Peer, runs: int, calls: int, many: int) -> list[Row]:
    with fp.Cluster(1, threads=1) as cluster:
        (worker,) = cluster
        four = worker.send(torch.ones(4))

        def ours(measure: Callable[[], float]) -> Callable[[], float]:
            def measured() -> float:
                with peer.paused():
                    return measure()

            return measured

        taken = paired(
            runs,
            blocking=lambda: peer.ask("blocking", calls=calls),
            our_blocking=ours(lambda: per_call(calls, lambda: worker.run(abs, -7).get())),
            pipelined=lambda: peer.ask("pipelined", calls=many),
            our_pipelined=ours(lambda: pipelined(cluster, worker, many)),
            adds=lambda: peer.ask("adds", calls=many),
            our_adds=ours(lambda: chained_adds(four, many)),
        )
    rows: list[Row] = []
    for what, name in (
        ("blocking", "one call and its result"),
        ("pipelined", "call, pipelined"),
        ("adds", "chained add"),
    ):
        rows.append(row(f"{peer.name}: {name}", "us", taken[what], scale=MICROSECONDS))
        rows.append(ratio("  against ours", taken[what], taken[f"our_{what}"]))
    return rows


if __name__ == "__main__":
    main("ops", benchmark)
