"""torch.distributed.rpc: one other process, called as fedproc's worker is."""

import contextlib
import operator
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import rpc

from benchmarks.peers.peer import Measures, serve

HERE, THERE = "here", "there"


def join(rank: int, port: int) -> None:
    """Become one of the two."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}")
    name = (HERE, THERE)[rank]
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def ones() -> torch.Tensor:
    """Four floats."""
    return torch.ones(4)


def add(one: Any, other: Any) -> torch.Tensor:
    """Where both are: they are references to values of this process."""
    total: torch.Tensor = one.local_value() + other.local_value()
    return total


@contextlib.contextmanager
def measures() -> Iterator[Measures]:
    """Two processes joined by RPC over the loopback device."""
    port = free_port()
    other = subprocess.Popen([sys.executable, "-m", "benchmarks.peers.torch_rpc", str(port)])
    try:
        join(0, port)
        four = rpc.remote(THERE, ones)
        four.confirmed_by_owner()
    except BaseException:
        other.kill()  # it would wait for us for ever
        other.wait()
        raise

    def blocking(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            rpc.rpc_sync(THERE, operator.neg, args=(7,))
        return (time.perf_counter() - started) / calls

    def pipelined(calls: int) -> float:
        started = time.perf_counter()
        futures = [rpc.rpc_async(THERE, operator.neg, args=(n,)) for n in range(calls)]
        torch.futures.wait_all(futures)
        return (time.perf_counter() - started) / calls

    def adds(calls: int) -> float:
        started = time.perf_counter()
        y = four
        for _ in range(calls):
            y = rpc.remote(THERE, add, args=(y, four))
        y.to_here()
        return (time.perf_counter() - started) / calls

    try:
        yield {"blocking": blocking, "pipelined": pipelined, "adds": adds}
    finally:
        rpc.shutdown()
        other.wait()


if __name__ == "__main__":
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    if len(sys.argv) > 1:  # the other process
        join(1, int(sys.argv[1]))
        rpc.shutdown()
    else:
        serve("torch", measures)
