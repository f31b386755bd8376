"""Moving 100 MB: from here to a worker, back, and from worker to worker, against torch's copies.

Everything is warm: each was done once before, and memory that was let go is used again. A copy to
new memory (`clone`) is dearer than one into memory in use (`copy_`): the kernel clears every page.
For milliseconds after a copy by several threads these keep a core busy: whoever borrows then shares
the other with the worker. So a borrow is also measured alone.
"""

import torch

import fedproc as fp
from benchmarks.measure import Row, main, paired, ratio, row, seconds_of

MILLISECONDS, MICROSECONDS = 1e3, 1e6
BORROWS = 20


def send(worker: fp.Worker, tensor: torch.Tensor) -> float:
    """Seconds until ``send`` returns; the worker takes it in before the next sample."""
    pointers: list[fp.TensorPointer] = []
    seconds = seconds_of(lambda: pointers.append(worker.send(tensor)))
    pointers[0].wait()
    return seconds


def borrow(pointer: fp.TensorPointer) -> float:
    """Seconds of a whole block that reads one number; one of many, as a loop would have it."""

    def look() -> None:
        for _ in range(BORROWS):
            with pointer.borrow() as tensor:
                tensor[-1].item()

    return seconds_of(look) / BORROWS


def move(pointer: fp.TensorPointer, cluster: fp.Cluster) -> float:
    """Seconds until the object is usable on the other worker."""
    here, there = cluster
    target = there if pointer.worker is here else here
    return seconds_of(lambda: pointer.move(target).wait())


def copy_by_one_thread(target: torch.Tensor, source: torch.Tensor) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = seconds_of(lambda: target.copy_(source))
    torch.set_num_threads(threads)
    return seconds


def benchmark(quick: bool) -> list[Row]:
    runs, numbers = (2, 25_000) if quick else (15, 25_000_000)
    source, target = torch.rand(numbers), torch.rand(numbers)
    with fp.Cluster(2) as cluster:
        worker, _ = cluster
        there, traveller = worker.send(source), worker.send(source)
        alone = paired(runs, borrow=lambda: borrow(there))["borrow"]
        taken = paired(
            runs,
            copy=lambda: seconds_of(lambda: target.copy_(source)),
            copy_1=lambda: copy_by_one_thread(target, source),
            clone=lambda: seconds_of(source.clone),
            send=lambda: send(worker, source),
            fetch=lambda: seconds_of(there.fetch),
            borrow=lambda: borrow(there),
            move=lambda: move(traveller, cluster),
        )
    million = source.nbytes / 1e6
    speeds = {name: [million / 1e3 / s for s in seconds] for name, seconds in taken.items()}
    threads = torch.get_num_threads()
    shown = {
        "copy": f"torch copy_, {threads} thread(s)",
        "copy_1": "torch copy_, 1 thread",
        "clone": "torch clone (new memory)",
        "send": "send until it returns",
        "fetch": "fetch",
        "move": "move until usable there",
    }
    rows = [row(f"{million:g} MB: {what}", "GB/s", speeds[name]) for name, what in shown.items()]
    return [
        *rows,
        row("borrow and give back, one after the other", "us", alone, scale=MICROSECONDS),
        row("  after copies by several threads", "us", taken["borrow"], scale=MICROSECONDS),
        *(ratio(f"{name} / copy_", speeds[name], speeds["copy"]) for name in ("send", "fetch")),
        ratio("move / copy_", speeds["move"], speeds["copy"]),
        ratio("move / copy_, 1 thread", speeds["move"], speeds["copy_1"]),
    ]


if __name__ == "__main__":
    main("tensors", benchmark)
