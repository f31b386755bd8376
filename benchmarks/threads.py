"""Twice as many workers as cores: what a round loses by it.

Every worker gets its share of the cores as threads of torch, at least one, so more workers than
cores only take turns. The waiting ones sleep.
"""

from contextlib import ExitStack
from functools import partial

from benchmarks.measure import Row, main, paired, ratio, row, seconds_of
from benchmarks.workloads import Fedproc, Workload, workloads
from fedproc.memory.pages import usable_cores

MILLISECONDS = 1e3


def compared(workload: Workload, runs: int) -> list[Row]:
    cores = usable_cores()
    with ExitStack() as stack:
        turns = {}
        for count in (cores, 2 * cores):
            system = Fedproc(workload, workers=count, vectorize=False)
            stack.callback(system.close)
            turns[str(count)] = partial(seconds_of, partial(system.play, workload.rounds))
        taken = paired(runs, **turns)
    fewer, more = taken[str(cores)], taken[str(2 * cores)]
    scale = MILLISECONDS / workload.rounds
    return [
        row(f"{workload.name}: a round, {cores} workers", "ms", fewer, scale=scale),
        row(f"  {2 * cores} workers", "ms", more, scale=scale),
        ratio(f"    / {cores} workers", more, fewer),
    ]


def benchmark(quick: bool) -> list[Row]:
    runs = 1 if quick else 9
    return [line for workload in workloads(quick=quick) for line in compared(workload, runs)]


if __name__ == "__main__":
    main("threads", benchmark)
