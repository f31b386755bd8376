"""A trainer that lets nothing out but masked vectors and sealed shares.

Runs in worker processes. It plays the clients of its worker one after the other, each with keys of
its own; the keys end with the worker.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

import fedproc
from fedproc.client.secure import PublicKeys, Released, SecureClient, Setup
from fedproc.client.summed import SummedVector
from fedproc.client.trail import IDLE
from fedproc.client.trainer import Trainer
from fedproc.errors import NotPermittedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fedproc.client.fixed_point import FixedPoint
    from fedproc.client.update import Task, Update

_OWN = str(Path(fedproc.__file__).parent)
_TOLD = (FloatingPointError, OverflowError, NotPermittedError)


@dataclass(frozen=True, slots=True)
class MaskedUpdate:
    """All that a client sends of its training.

    Attributes:
        words: The masked vector: int64, shape (SummedVector.numel,).
        began, ended: When it trained, see :class:`fedproc.client.update.Update`.
    """

    words: Tensor
    began: float
    ended: float


class SecureTrainer(Trainer):
    """Trains clients for secure sums, and for nothing else."""

    _clients: dict[str, SecureClient]

    def advertise_keys(self, setup: Setup, clients: Sequence[str]) -> dict[str, PublicKeys]:
        """Step 0 for clients of this worker; what an older sum left is forgotten."""
        self._clients = {client: SecureClient(client, setup) for client in clients}
        return {client: one.advertise_keys() for client, one in self._clients.items()}

    def share_keys(self, keys: Mapping[str, PublicKeys]) -> dict[str, dict[str, bytes]]:
        """Step 1: client -> other client -> sealed shares."""
        return {client: one.share_keys(keys) for client, one in self._clients.items()}

    def train_masked(
        self,
        block: Tensor,
        task: Task,
        shared: Mapping[str, Tensor] | None,
        sealed: Mapping[str, bytes],
        form: tuple[FixedPoint, bool],
    ) -> MaskedUpdate:
        """Step 2: trains one client and masks what it would have returned.

        Args:
            block: The global model: uint8, shape (nbytes,), read only.
            task: Which client, which round.
            shared: What the strategy sent to all clients of the round.
            sealed: What the other clients sealed for this one.
            form: The fixed point, and whether all clients weigh alike.

        Raises:
            FloatingPointError: The loss or the update is not finite.
            OverflowError: The update leaves the range of the fixed point.
            NotPermittedError: It kept something, or the protocol was not followed.
            RuntimeError: Anything else: class and place, and no message that could hold a value.
        """
        try:
            self._footprint.step(task.place)
            layout = self._resident.layout
            pieces, space = layout.pieces(block), layout.new_block()
            with self._training():
                update = self._train(pieces, task, ({}, shared or {}), layout.slot(space))
            update.block = space
            # what was clipped is a change already
            origin = block if task.clip_norm is None else layout.new_block()
            words = SummedVector(layout, *form).write(origin, update)
            self._clients[task.client].mask(words.numpy().view(np.uint64), sealed)
        except BaseException as error:  # noqa: BLE001 - whatever it is, only its kind is told
            self._clients.pop(task.client, None)
            raise _withheld(error, task) from None
        finally:
            self._footprint.step(IDLE)
        return MaskedUpdate(words, update.began, update.ended)

    def unmask(self, survivors: Sequence[str]) -> dict[str, Released]:
        """Step 3 for the survivors of this worker; their keys end here."""
        clients, self._clients = self._clients, {}
        return {c: one.unmask(survivors) for c, one in clients.items() if c in survivors}

    def train(self, *_args: Any, **_options: Any) -> NoReturn:
        """Refuses: an update in the clear does not leave.

        Raises:
            NotPermittedError: Always.
        """
        raise NotPermittedError("this trainer belongs to a secure sum: it returns masked updates")

    train_some = train

    def _train(self, *args: Any) -> Update:
        update = super()._train(*args)
        if update.state:
            raise NotPermittedError(
                "ctx.state would leave its worker, which secure aggregation forbids; keep nothing"
            )
        return update


def _withheld(error: BaseException, task: Task) -> Exception:
    """Returns an error that can leave: fedproc's own text, else class and place."""
    frames = traceback.extract_tb(error.__traceback__)
    who = f"round {task.round}: client {task.client!r}"
    for kind in _TOLD:
        if isinstance(error, kind) and frames[-1].filename.startswith(_OWN):
            text = str(error)
            return kind(text if repr(task.client) in text else f"{who}: {text}")
    where = next((f for f in reversed(frames) if not f.filename.startswith(_OWN)), frames[-1])
    return RuntimeError(
        f"{who} failed with {type(error).__qualname__} at {where.filename}:{where.lineno}; under "
        "secure aggregation its message stays in the worker, because it may quote values"
    )
