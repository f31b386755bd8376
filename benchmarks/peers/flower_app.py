"""What Flower runs: the app of its clients, and a FedAvg that trains the cohorts of a workload.

The message to a client names the round and the client, because their seed is made of both. A
process of Flower's keeps the rows and one model for all clients that it trains.
"""

import pickle
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from torch import nn

from benchmarks.workloads import Workload


@cache
def kept(file: str) -> tuple[Workload, nn.Module]:
    """The workload and a model, read once in each process."""
    torch.set_num_threads(1)
    workload: Workload = pickle.loads(Path(file).read_bytes())
    return workload, workload.model()


def train(message: Message, _context: Context) -> Message:
    """One client in one round."""
    config = message.content["config"]
    workload, model = kept(config["workload"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = workload.train(model, config["round"], config["client"])
    metrics = MetricRecord({"num-examples": rows})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


def client_app() -> ClientApp:
    """Trains."""
    app = ClientApp()
    app.train()(train)
    return app


class Cohorts(FedAvg):
    """FedAvg whose cohorts are those of a workload; a client is the node of the same place."""

    def __init__(self, workload: Workload, file: str) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.played = 0
        self._workload = workload
        self._file = file
        self._nodes: dict[str, int] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message to each client of the cohort."""
        if not self._nodes:
            clients = list(self._workload.shards)
            _, found = sample_nodes(grid, len(clients), len(clients))  # waits for all
            self._nodes = dict(zip(clients, found, strict=True))
        number = self.played + server_round
        for client in self._workload.cohort(number):
            told = {**config, "workload": self._file, "round": number, "client": client}
            content = RecordDict({"arrays": arrays, "config": ConfigRecord(told)})
            yield Message(content, dst_node_id=self._nodes[client], message_type="train")


def server_app(
    workload: Workload,
    file: str,
    orders: Callable[[], int | None],
    done: Callable[[dict[str, Any]], None],
) -> ServerApp:
    """Plays as many rounds as it is told to, until it is told None; keeps the simulation alive.

    Args:
        workload: what is trained.
        file: where its clients read it.
        orders: waits for a number of rounds.
        done: gets the parameters at the start and after each order.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _context: Context) -> None:
        strategy = Cohorts(workload, file)
        arrays = ArrayRecord(workload.model().state_dict())
        done(arrays.to_torch_state_dict())  # it is ready
        for rounds in iter(orders, None):
            found = strategy.start(grid, arrays, num_rounds=rounds).arrays
            if found is None:
                raise RuntimeError("all clients of a round failed")
            arrays = found
            strategy.played += rounds
            done(arrays.to_torch_state_dict())

    return app
