"""Rounds that every system plays: the same model, rows, seeds, cohorts and order of rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import fedproc as fp
from fedproc.client.seeding import generator_for
from fedproc.federated.sampling import draw_cohort

SEED = 0


@dataclass(frozen=True)
class Workload:
    """What is trained. ``each_round``: clients of a round; ``rounds``: of one sample."""

    name: str
    make: Callable[[], nn.Module]
    rows: Callable[[], tuple[Tensor, Tensor]]
    clients: int
    each_round: int
    batch_size: int
    epochs: int = 1
    rounds: int = 1
    lr: float = 0.1

    def model(self) -> nn.Module:
        """The model that everybody starts from."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return self.make()

    @cached_property
    def shards(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Client -> its rows: equal parts, as far as the number of rows allows."""
        x, y = self.rows()
        pieces = zip(x.tensor_split(self.clients), y.tensor_split(self.clients), strict=True)
        return {f"client-{place:04d}": pair for place, pair in enumerate(pieces)}

    def __reduce__(self) -> tuple[Any, ...]:
        """Without shards: each is a view, and would be pickled with the rows of all clients."""
        return Workload, tuple(getattr(self, field.name) for field in fields(self))

    def loss(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    def optimizer(self) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return partial(torch.optim.SGD, lr=self.lr)

    def cohort(self, number: int) -> tuple[str, ...]:
        """The clients of round ``number``, from 1, in the order in which they are folded."""
        return draw_cohort(tuple(self.shards), self.each_round, SEED, number)

    def order(self, number: int, client: str) -> Iterator[Tensor]:
        """The rows of each batch of a client in a round."""
        generator = generator_for(SEED, number, client, "shuffle")
        size = len(self.shards[client][0])
        for _ in range(self.epochs):
            yield from torch.randperm(size, generator=generator).split(self.batch_size)

    def train(self, model: nn.Module, number: int, client: str) -> int:
        """Trains the model as a client does in round ``number``; tells its rows."""
        x, y = self.shards[client]
        loss, optimizer = self.loss(), self.optimizer()(list(model.parameters()))
        for batch in self.order(number, client):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
        return len(x)


class Sequential:
    """The plain loop: one model, one client after the other, the mean in float64."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._global = workload.model()
        self._local = workload.model()
        self._played = 0

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            self._played += 1
            self._round(self._played)

    def _round(self, number: int) -> None:
        start, local = list(self._global.parameters()), list(self._local.parameters())
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in start]
        weights = 0
        for client in self.workload.cohort(number):
            with torch.no_grad():
                for parameter, value in zip(local, start, strict=True):
                    parameter.copy_(value)
            rows = self.workload.train(self._local, number, client)
            weights += rows
            for total, parameter in zip(sums, local, strict=True):
                total.add_(parameter.detach().double() * rows)
        with torch.no_grad():
            for parameter, total in zip(start, sums, strict=True):
                parameter.copy_(total / weights)

    def model(self) -> Tensor:
        return flat(self._global)

    def close(self) -> None:
        pass


class Fedproc:
    """The same with an aggregator."""

    def __init__(self, workload: Workload, workers: int, *, vectorize: bool) -> None:
        self._cluster = fp.Cluster(workers)
        data = fp.FederatedDataset(workload.shards, self._cluster)
        local = fp.LocalTraining(
            workload.loss(),
            workload.optimizer(),
            epochs=workload.epochs,
            batch_size=workload.batch_size,
        )
        self._aggregator = fp.Aggregator(
            workload.model(),
            data,
            local,
            clients_per_round=workload.each_round,
            seed=SEED,
            vectorize=vectorize,
        )

    def play(self, rounds: int) -> None:
        self._aggregator.run(rounds, progress=False)

    def model(self) -> Tensor:
        return flat(self._aggregator.model)

    def close(self) -> None:
        self._cluster.close()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def digits() -> tuple[Tensor, Tensor]:
    # here, because the processes of a peer import this module and get the rows from elsewhere
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def images() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x.reshape(-1, 1, 8, 8), y


def drawn(rows: int) -> tuple[Tensor, Tensor]:
    """Noise: of the size of grey values, so that training does not blow rounding up."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(rows, 784, generator=generator) / 4, torch.randint(
        10, (rows,), generator=generator
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    """No MaxPool2d: in blank corners its largest value is a tie, which rounding decides."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def big() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 2800), nn.ReLU(), nn.Linear(2800, 2800), nn.ReLU(), nn.Linear(2800, 10)
    )


def workloads(*, quick: bool) -> list[Workload]:
    few = 16 if quick else 1  # a part of the clients shows that it runs
    return [
        Workload("tiny", mlp, digits, 200 // few, 200 // few, batch_size=8),
        Workload("cnn", cnn, images, 50, max(3, 50 // few), batch_size=16, epochs=2),
        Workload("big", big, partial(drawn, 16 * 32), 16, 16 // few, batch_size=32, lr=0.01),
        Workload(
            "logreg",
            partial(nn.Linear, 784, 10),
            partial(drawn, 10_000),
            1_000,
            10,
            batch_size=10,
            rounds=1 if quick else 20,
        ),
    ]
