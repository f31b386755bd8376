"""The trainers of an aggregator: one object in each worker, made when first needed.

Runs in the parent. Knows which worker trains which client and makes trainers again when a worker
was lost or holds other rows than before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedproc.client.trail import IDLE, Trail
from fedproc.client.trainer import Trainer
from fedproc.client.training import LocalTraining
from fedproc.client.work import Work
from fedproc.cluster.placing import none_left
from fedproc.errors import NotShippableError, WorkerLostError
from fedproc.federated.balancing import balanced
from fedproc.federated.fingerprint import fingerprint
from fedproc.federated.global_model import GlobalModel
from fedproc.federated.lane import Pace
from fedproc.federated.passing import make_there
from fedproc.federated.sharing import Sharing
from fedproc.federated.stacking import Stacking
from fedproc.memory.pages import usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from fedproc.client.rules import LocalRule
    from fedproc.client.training import TrainFunction
    from fedproc.cluster.cluster import Cluster
    from fedproc.federated.data import FederatedDataset
    from fedproc.federated.holding import Holding
    from fedproc.federated.stacking import Vectorize
    from fedproc.remote.worker import Worker


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    """A trainer, and what it was made from."""

    trainer: Any
    worker: Worker
    holdings: tuple[Holding, ...]
    trail: Trail

    def has(self, holdings: Sequence[Holding]) -> bool:
        """Whether it has these rows, and perhaps others."""
        return all(held in self.holdings for held in holdings)


class Crew:
    """Trainers by worker name.

    Attributes:
        data: The clients and where they are.
        local: What a client does.
        pace: How long clients train.
        shares: Whether any worker may train any client of this round.
        stacking: Whether they train at once.
    """

    def __init__(
        self,
        data: FederatedDataset,
        model: GlobalModel,
        local: LocalTraining | TrainFunction,
        rule: LocalRule | None,
        trainer: type[Trainer] = Trainer,
        vectorize: Vectorize = False,
    ) -> None:
        """Keeps what trainers are made from; starts nothing.

        Args:
            data: The clients and where they are.
            model: Its module has architecture and frozen values.
            local: What a client does.
            rule: The gradient correction of the strategy, or None.
            trainer: What is made in each worker.
            vectorize: Whether clients train at once.

        Raises:
            ValueError: They cannot.
        """
        self.data = data
        self._model = model
        self.local = local
        self._rule = rule
        self._trainer = trainer
        self._members: dict[str, _Member] = {}
        self._origin: tuple[nn.Module, bytes | None] | None = None
        allowed = trainer is Trainer and data.is_readable
        self._sharing = Sharing(data.cluster, allowed=allowed)
        self.shares = False
        # more workers than cores only take turns; asking the system takes 0.1 ms
        self._at_once = max(1, usable_cores() // (training_threads(data.cluster) or 1))
        self.pace = Pace()
        self.stacking = Stacking.of(vectorize, model.module, local, rule)

    def homes(self, clients: Sequence[str]) -> dict[str, str]:
        """Maps clients to the names of the workers that hold their rows.

        Raises:
            WorkerLostError: No worker is left.
        """
        while True:
            try:
                return self.data.homes(clients)
            except WorkerLostError:  # one was lost while it was given the rows of another
                if not self.restored():
                    raise

    def assigned(self, clients: Sequence[str]) -> dict[str, str]:
        """Maps clients to the names of the workers that shall train them in a round.

        Local epochs copy each batch; a train function is given the rows, which it may write to.
        How stacks of clients are made up decides bits, so it must not depend on who is quick.

        Raises:
            WorkerLostError: No worker is left.
        """
        homes, local = self.homes(clients), self.local
        self.shares = False
        if not isinstance(local, LocalTraining) or self.stacking.on is not False:
            return homes
        self.shares = self._sharing.open(tuple(self.data.holdings().values()))
        if not self.shares:
            return homes
        sizes = self.data.sizes
        costs = {client: 1.0 + local.steps(sizes[client]) for client in clients}
        return balanced(homes, costs, self.alive(), self._at_once)

    def last_step(self, name: str) -> int:
        """Returns the place in the cohort of who trains on a worker, also after its end."""
        member = self._members.get(name)
        return IDLE if member is None else member.trail.read()

    def replace(self, name: str) -> None:
        """Ends a worker that is busy and starts an empty one in its place."""
        self._members.pop(name, None)
        worker = self.data.cluster[name]
        if worker.alive:
            self.data.cluster.replace(worker)

    def restored(self) -> bool:
        """Restores the data of lost workers; False if no worker is left."""
        while True:
            try:
                self.data.restore()
            except WorkerLostError:  # another one was lost meanwhile, or there is none
                if not any(worker.alive for worker in self.data.cluster.workers):
                    return False
            else:
                return True

    def alive(self) -> list[str]:
        """Lists the workers that can work.

        Raises:
            WorkerLostError: There is none.
            ClosedError: The cluster is closed.
        """
        names = [worker.name for worker in self.data.cluster.workers if worker.alive]
        if not names:
            raise none_left(self.data.cluster)
        return names

    def worker(self, name: str) -> Worker:
        """Returns the worker of that name, as the cluster has it now."""
        return self.data.cluster[name]

    def trainer(self, name: str) -> Any:
        """Returns the pointer to the trainer of a worker."""
        worker = self.data.cluster[name]
        holdings = self._holdings_of(name)
        member = self._members.get(name)
        if member is None or member.worker is not worker or not member.has(holdings):
            trail = Trail()
            member = _Member(self._make(worker, holdings, trail), worker, holdings, trail)
            self._members[name] = member
        return member.trainer

    def dismiss(self) -> None:
        """Forgets all trainers, so that the next ones are made from the model as it is then."""
        self._members.clear()
        self._origin = None

    def is_outdated(self) -> bool:
        """Tells whether local training was changed since trainers were made from it."""
        return self._origin is not None and self._origin[1] != self._fingerprint()

    def _fingerprint(self) -> bytes | None:
        return fingerprint(self.local, self._registered)

    def _registered(self) -> Mapping[Any, bytes] | None:
        return self.data.cluster.workers[0].link.registered

    def _model_of_all(self) -> nn.Module:
        """Returns the model that every trainer is made from, early or late, until the next ones."""
        if self._origin is None:
            self._origin = self._model.as_it_is(), self._fingerprint()
        return self._origin[0]

    def _holdings_of(self, name: str) -> tuple[Holding, ...]:
        """Lists whose rows a trainer has: those of its worker, or of all."""
        own, opened = self.data.holdings().get(name), self._sharing.opened
        if self.shares and own in opened:
            return opened
        return () if own is None else (own,)

    def _make(self, worker: Worker, holdings: tuple[Holding, ...], trail: Trail) -> Any:
        threads = training_threads(self.data.cluster)
        least = self.data.cluster.min_rows if self.data.private else None
        work = Work(self.local, self._rule, threads, str(worker.device), least)
        blocks, spans = self._sharing.rows_for(worker, holdings)
        # sent one by one: a call does not mix tensors from here with pointers
        try:
            model = worker.send(self._model_of_all())
        except NotShippableError as error:
            raise _unshippable(self._model.module, error) from error
        plan = worker.send(work)
        # whoever has it made, an evaluation in inference mode for instance, others train with it
        with torch.inference_mode(mode=False), torch.enable_grad():
            return make_there(worker, self._trainer, model, plan, blocks, spans, trail.path)


def copied(model: nn.Module) -> GlobalModel:
    """Copies the model that is given to an aggregator.

    Raises:
        NotShippableError: It holds what cannot be copied.
        ValueError: It has nothing to train, or tensors without a defined mean.
    """
    try:
        return GlobalModel(model)
    except (ValueError, MemoryError):
        raise
    except Exception as error:
        raise _unshippable(model, error) from error


def _unshippable(model: nn.Module, error: Exception) -> NotShippableError:
    cause = error.__cause__ or error  # what was met, not what was being done
    return NotShippableError(
        f"the model, a {type(model).__qualname__}, cannot be copied for the workers: "
        f"{type(cause).__name__}: {cause}. Keep locks, open files, connections and the like out of "
        "it, or leave them out of what its __getstate__ returns."
    )


def training_threads(cluster: Cluster) -> int | None:
    """Returns how many torch threads train a client: one unless the cluster was told a number.

    The number of threads decides the bits of a sum, so it must not depend on how many workers
    share the cores.
    """
    return 1 if cluster.threads is None else cluster.threads
