"""Do two workers really work at once? Two heavy chains, on two workers against both on one.

Each worker has one torch thread. The least possible is what one chain alone takes; where two
cores share caches and memory, two of them at once take longer than that.
"""

import torch

import fedproc as fp
from benchmarks.measure import Row, main, paired, ratio, row, seconds_of


def chain(x, links: int):
    """``links`` matrix products, each of which needs the one before: submitted, not waited for."""
    y = x
    for _ in range(links):
        y = torch.tanh(y @ x)
    return y


def benchmark(quick: bool) -> list[Row]:
    runs, size, links = (2, 32, 4) if quick else (9, 768, 30)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5

    def of(*operands) -> float:
        """Seconds until the chains of all operands are done."""
        return seconds_of(lambda: [end.wait() for end in [chain(x, links) for x in operands]])

    with fp.Cluster(2, threads=1) as cluster:
        first, second = (worker.send(matrix) for worker in cluster)
        taken = paired(
            runs,
            one=lambda: of(first, first),
            two=lambda: of(first, second),
            alone=lambda: of(first),
        )
    return [
        row("both chains on one worker", "s", taken["one"]),
        row("one chain on each of two workers", "s", taken["two"]),
        row("one chain alone", "s", taken["alone"]),
        ratio("two workers / one worker", taken["two"], taken["one"]),
        ratio("  the least possible", taken["alone"], taken["one"]),
    ]


if __name__ == "__main__":
    main("overlap", benchmark)
