"""The weighted mean of models where they are, against the speed at which their memory is read.

The models live in one worker. The yardstick is a sum over the same tensors with all threads: it
reads each byte once and writes nothing, so no mean can be faster.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

import fedproc as fp
from benchmarks.measure import Row, main, paired, ratio, row, seconds_of
from fedproc.client.compiled import COMPILED


class Flat(nn.Module):
    """One vector of parameters."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(numel))


def read(models: Sequence[Flat]) -> float:
    """Reads every parameter once."""
    with torch.no_grad():
        return sum(float(model.weight.sum()) for model in models)


def benchmark(quick: bool) -> list[Row]:
    runs, count, numel = (2, 3, 100_000) if quick else (9, 16, 25_000_000)
    rows = [float(100 + 7 * place) for place in range(count)]  # of the clients: the usual weights
    shares = [number / sum(rows) for number in rows]  # no product with one of them is exact
    with fp.Cluster(1) as cluster:
        (worker,) = cluster
        models = [worker.run(Flat, numel) for _ in range(count)]
        taken = paired(
            runs,
            read=lambda: seconds_of(lambda: worker.run(read, models).get()),
            whole=lambda: seconds_of(partial(fp.weighted_average, models, rows)),
            share=lambda: seconds_of(partial(fp.weighted_average, models, shares)),
        )
    gigabytes = 4 * count * numel / 1e9
    speeds = {name: [gigabytes / s for s in seconds] for name, seconds in taken.items()}
    title = f"{count} models of {numel / 1e6:g} M"
    return [
        row(f"{title}: read by a sum", "GB/s", speeds["read"]),
        row("  the sums are compiled (0: torch forms them)", "x", [float(COMPILED)]),
        row("  weighted mean, weights are numbers of rows", "GB/s", speeds["whole"]),
        ratio("    / read by a sum", speeds["whole"], speeds["read"]),
        row("  weighted mean, weights are fractions", "GB/s", speeds["share"]),
        ratio("    / read by a sum", speeds["share"], speeds["read"]),
    ]


if __name__ == "__main__":
    main("average", benchmark)
