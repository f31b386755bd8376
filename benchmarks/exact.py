"""Is the model the same bits everywhere? Its SHA-256 for any number of workers and any resume.

Every run has shuffling, Dropout and BatchNorm on. What must not matter is varied: inline or
processes, how many of them, and after which round the run was saved, forgotten and loaded again,
on another number of workers than before.
"""

import functools
import hashlib
import tempfile
from pathlib import Path

import torch
from torch import nn

import fedproc as fp
from benchmarks.measure import Row, main, row, seconds_of

FEATURES, CLASSES = 32, 10
WORKERS = (1, 2, 3, 4, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(64, CLASSES),
    )


def parts(cluster: fp.Cluster, clients: int):
    """What every run starts from: the model, the data on ``cluster``, the local training."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40 * clients, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (len(x),), generator=generator)
    skewed = fp.partition.Dirichlet(alpha=0.5, min_size=4)
    data = fp.federate((x, y), cluster, clients=clients, partition=skewed)
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    # full batches: a BatchNorm cannot train on a last batch of one row
    return model(), data, fp.LocalTraining(nn.CrossEntropyLoss(), sgd, epochs=2, batch_size=None)


OPTIONS = {"clients_per_round": 0.5, "seed": 7, "strategy": fp.FedAdam()}


def digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of everything in the state dict."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def straight(workers: int, transport: str, clients: int, rounds: int) -> str:
    """The model of a run without a stop."""
    with fp.Cluster(workers, transport=transport) as cluster:
        aggregator = fp.Aggregator(*parts(cluster, clients), **OPTIONS)
        aggregator.run(rounds, progress=False)
    return digest(aggregator.model)


def resumed(after: int, clients: int, rounds: int) -> str:
    """The model of a run that stopped after a round and went on with one worker more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        with fp.Cluster(2) as cluster:
            aggregator = fp.Aggregator(*parts(cluster, clients), **OPTIONS)
            aggregator.run(after, progress=False)
            aggregator.save(path)
        with fp.Cluster(3) as cluster:
            aggregator = fp.Aggregator.load(path, *parts(cluster, clients), **OPTIONS)
            aggregator.run(rounds - after, progress=False)
    return digest(aggregator.model)


def benchmark(quick: bool) -> list[Row]:
    """Plays all runs and prints the SHA-256 of each; ends the program if they differ."""
    clients, rounds = (6, 2) if quick else (30, 8)
    runs = {"inline": functools.partial(straight, 2, "inline", clients, rounds)}
    for workers in WORKERS[:2] if quick else WORKERS:
        name = f"{workers} worker{'s' if workers > 1 else ''}"
        runs[name] = functools.partial(straight, workers, "process", clients, rounds)
    for after in range(1, rounds):
        runs[f"resumed after {after}"] = functools.partial(resumed, after, clients, rounds)
    print(f"{clients} clients, half of them in each of {rounds} rounds; SHA-256 of the model:\n")
    rows, digests = [], []
    for name, run in runs.items():
        rows.append(row(name, "s", [seconds_of(lambda run=run: digests.append(run()))]))
        print(f"{name:16s} {digests[-1]}", flush=True)
    distinct = len(set(digests))
    print()
    if distinct > 1:
        raise SystemExit(f"{len(runs)} runs made {distinct} different models; there must be one")
    return [*rows, row(f"different models among {len(runs)} runs", "models", [distinct])]


if __name__ == "__main__":
    main("exact", benchmark)
