"""Ray: an actor with one CPU, called as fedproc's worker is."""

import contextlib
import time
from collections.abc import Iterator

import torch

from benchmarks.peers.peer import Measures, serve

STORE_BYTES = 1 << 30


@contextlib.contextmanager
def measures() -> Iterator[Measures]:
    """A local cluster of two CPUs and one actor."""
    import ray

    @ray.remote
    class Actor:
        def negative(self, number: int) -> int:
            return -number

        def add(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return one + other

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=STORE_BYTES
    )
    actor = Actor.remote()
    four = ray.put(torch.ones(4))
    ray.get(actor.add.remote(four, four))

    def blocking(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            ray.get(actor.negative.remote(7))
        return (time.perf_counter() - started) / calls

    def pipelined(calls: int) -> float:
        started = time.perf_counter()
        ray.get([actor.negative.remote(number) for number in range(calls)])
        return (time.perf_counter() - started) / calls

    def adds(calls: int) -> float:
        started = time.perf_counter()
        y = four
        for _ in range(calls):
            y = actor.add.remote(y, four)
        ray.get(y)
        return (time.perf_counter() - started) / calls

    try:
        yield {"blocking": blocking, "pipelined": pipelined, "adds": adds}
    finally:
        ray.shutdown()


if __name__ == "__main__":
    serve("ray", measures)
