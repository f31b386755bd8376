"""BlazeFL's threads: its ThreadPoolClientTrainer with two threads, and its own FedAvg packages.

It needs Python 3.12. As a good engineer would, a model is made once per thread and not once per
client; what BlazeFL does around a client and with its result is its own code. On a Python with a
global interpreter lock threads run at once only while torch computes.
"""

import queue
import threading
from typing import Any

from torch import Tensor, nn

from benchmarks.peers.part import PROCESSES
from benchmarks.workloads import Workload, flat

REQUIRES = ("blazefl", "tqdm")


class System:
    """Server and threads are in this process."""

    def __init__(self, workload: Workload) -> None:
        from blazefl.contrib.fedavg import FedAvgBaseServerHandler, FedAvgDownlinkPackage
        from blazefl.core import deserialize_model, serialize_model

        self._server, self._package = FedAvgBaseServerHandler, FedAvgDownlinkPackage
        self._load, self._flatten = deserialize_model, serialize_model
        self._workload = workload
        self._model = workload.model()
        self._played = 0
        self._trainer = threads(workload)

    def play(self, rounds: int) -> None:
        """The next rounds."""
        places = {client: place for place, client in enumerate(self._workload.shards)}
        for _ in range(rounds):
            self._played += 1
            self._trainer.number = self._played
            cohort = [places[client] for client in self._workload.cohort(self._played)]
            self._trainer.local_process(self._package(self._flatten(self._model)), cohort)
            packages = self._trainer.uplink_package()
            values = [package.model_parameters for package in packages]
            weights = [package.data_size for package in packages]
            self._load(self._model, self._server.aggregate(values, weights))

    def model(self) -> Tensor:
        """The parameters."""
        return flat(self._model)

    def close(self) -> None:
        """Nothing to end: a round's threads end with it."""


def threads(workload: Workload) -> Any:
    """A client trainer of BlazeFL; ``number`` is the round that it plays."""
    from blazefl.contrib.fedavg import FedAvgDownlinkPackage, FedAvgUplinkPackage
    from blazefl.core import ThreadPoolClientTrainer, deserialize_model, serialize_model

    clients = tuple(workload.shards)

    class Trainer(ThreadPoolClientTrainer[FedAvgUplinkPackage, FedAvgDownlinkPackage]):
        def __init__(self) -> None:
            self.num_parallels = PROCESSES
            self.device, self.device_count = "cpu", 0
            self.cache: list[FedAvgUplinkPackage] = []
            self.stop_event = threading.Event()
            self.number = 0
            self.models: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
            for _ in range(PROCESSES):
                self.models.put(workload.model())

        def worker(
            self,
            cid: int,
            device: str,  # noqa: ARG002 - as BlazeFL calls it
            payload: FedAvgDownlinkPackage,
            stop_event: threading.Event,  # noqa: ARG002
        ) -> FedAvgUplinkPackage:
            model = self.models.get()
            try:
                deserialize_model(model, payload.model_parameters)
                rows = workload.train(model, self.number, clients[cid])
                return FedAvgUplinkPackage(cid, serialize_model(model), rows)
            finally:
                self.models.put(model)

        def uplink_package(self) -> list[FedAvgUplinkPackage]:
            packages, self.cache = self.cache, []
            return packages

    return Trainer()
