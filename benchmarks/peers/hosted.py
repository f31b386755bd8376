"""A system of ``benchmarks.rounds`` in a process of its own.

Ray actors and Flower cannot share one, for each wants the Ray of its process to itself.

python -m benchmarks.peers.hosted PACKAGE NAME
"""

import contextlib
import importlib
import pickle
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.peer import Measures, Peer, serve
from benchmarks.workloads import Workload


class MissingPeerError(Exception):
    """It cannot play here; the message says why."""


class Hosted:
    """This side. It has the methods of the system there."""

    def __init__(self, workload: Workload, *, name: str, package: str) -> None:
        """Start it.

        Raises:
            MissingPeerError: it is not installed or does not start.
        """
        self._peer = Peer("hosted", package, name)
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "workload"
        file.write_bytes(pickle.dumps(workload))
        try:
            if self._peer.missing is not None:
                raise MissingPeerError(self._peer.missing)
            self._peer.ask("start", file=str(file))
        except (MissingPeerError, RuntimeError) as error:
            self.close()
            raise MissingPeerError(f"{name}: {error}") from error

    def play(self, rounds: int) -> None:
        """The next rounds."""
        self._peer.ask("play", rounds=rounds)

    def model(self) -> Tensor:
        """The parameters."""
        file = Path(self._folder.name) / "model"
        self._peer.ask("save", file=str(file))
        found: Tensor = torch.load(file)
        return found

    def close(self) -> None:
        """End it."""
        self._peer.close()
        self._folder.cleanup()


def measures(name: str) -> contextlib.AbstractContextManager[Measures]:
    """What the system of this name is asked for."""
    module = importlib.import_module(f"benchmarks.peers.rounds_{name}")

    @contextlib.contextmanager
    def served() -> Iterator[Measures]:
        systems: list[Any] = []

        def start(file: str) -> None:
            torch.set_num_threads(1)
            systems.append(module.System(pickle.loads(Path(file).read_bytes())))

        def play(rounds: int) -> None:
            systems[0].play(rounds)

        def save(file: str) -> None:
            torch.save(systems[0].model(), file)

        try:
            yield {"start": start, "play": play, "save": save}
        finally:
            for system in systems:
                system.close()

    return served()


if __name__ == "__main__":
    serve(sys.argv[1], lambda: measures(sys.argv[2]))
