"""Flower's simulation: its FedAvg, and its Ray backend with two processes of one CPU each.

``run_simulation`` starts everything anew each time. Here one run lasts, and its ServerApp plays
rounds when it is told to: a round costs what it costs inside a long run, without any start.
"""

import os
import pickle
import queue
import tempfile
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.workloads import Workload, flat

REQUIRES = ("flwr", "ray")
BACKEND = {
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False},
}


class System:
    """The simulation runs in a thread of its own."""

    def __init__(self, workload: Workload) -> None:
        os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
        self._workload = workload
        self._model = workload.model()
        self._orders: queue.Queue[int | None] = queue.Queue()
        self._done: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "workload"
        file.write_bytes(pickle.dumps(workload))
        self._thread = threading.Thread(target=self._simulate, args=(str(file),))
        self._thread.start()
        self._await()

    def _simulate(self, file: str) -> None:
        try:
            from flwr.simulation import run_simulation

            from benchmarks.peers.flower_app import client_app, server_app

            server = server_app(self._workload, file, self._orders.get, self._done.put)
            clients = len(self._workload.shards)
            run_simulation(server, client_app(), clients, backend_config=BACKEND)
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for a round
            self._done.put(error)

    def play(self, rounds: int) -> None:
        """The next rounds."""
        self._orders.put(rounds)
        self._await()

    def _await(self) -> None:
        found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        self._model.load_state_dict(found)

    def model(self) -> Tensor:
        """The parameters."""
        return flat(self._model)

    def close(self) -> None:
        """Ends the simulation."""
        self._orders.put(None)
        self._thread.join()
        self._folder.cleanup()
