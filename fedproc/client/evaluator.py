"""The evaluator: one resident model and the rows of a worker's clients, and what that model does.

Runs in worker processes. May assume one command at a time.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from fedproc.client.denominators import labelled_rows
from fedproc.client.devices import placed_loss
from fedproc.client.elsewhere import here
from fedproc.client.evaluation import ChunkSums, evaluate_chunks, merged
from fedproc.client.resident import Resident
from fedproc.client.seeding import derive_seed, preserved_streams, seed_streams, torch_threads
from fedproc.client.switches import Switches
from fedproc.client.training import LocalTraining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from fedproc.client.elsewhere import Rows
    from fedproc.client.gradients import Loss
    from fedproc.client.work import Span, Work

_Part = TypeVar("_Part")
_Found = TypeVar("_Found")


class Evaluator:
    """Evaluates the global model in one worker."""

    def __init__(
        self,
        model: nn.Module,
        work: Work,
        blocks: Sequence[tuple[Rows, Rows]],
        spans: Mapping[str, Span] | None,
    ) -> None:
        """Keeps the model and the data, on the device of the work.

        Args:
            model: Architecture and frozen values; the rest is loaded whenever it is used.
            work: What to do with each client.
            blocks: Pairs of inputs (rows, ...) and targets (rows, ...), here or in other workers.
            spans: Client name -> its rows in ``blocks``.
        """
        self._work = work
        self._device = torch.device(work.device)
        self._blocks = [(here(x).to(self._device), here(y).to(self._device)) for x, y in blocks]
        self._spans = dict(spans or {})
        placed_loss(self._loss(), self._device)
        custom = not isinstance(work.local, LocalTraining)
        self._resident = Resident(model.to(self._device), custom=custom, loss=self._loss())

    @property
    def least_rows(self) -> int | None:
        """Rows that numbers about private data must cover to leave; None: nothing is private."""
        return self._work.private_rows

    def evaluate(
        self,
        block: Tensor,
        rows: tuple[Tensor, Tensor],
        loss: Loss | None,
        chunks: tuple[int, bool],
    ) -> list[ChunkSums]:
        """Evaluates the global model on rows sent for it, see :func:`evaluate_chunks`.

        ``loss``: None takes LocalTraining's; ``chunks``: rows of one, and whether to keep outputs.
        """
        x, y = (part.to(self._device) for part in rows)
        size, outputs = chunks
        loss = placed_loss(loss, self._device) or self._loss()

        def use(model: nn.Module, rows: tuple[Tensor, Tensor]) -> list[ChunkSums]:
            return evaluate_chunks(model, rows, loss, size, outputs=outputs)

        found = self._each(
            block, list(zip(torch.split(x, size), torch.split(y, size), strict=True)), use
        )
        return [sums for part in found for sums in part]

    def evaluate_clients(
        self, block: Tensor, clients: Sequence[str], chunk_rows: int
    ) -> dict[str, ChunkSums]:
        """Evaluates the global model on the rows of clients of this worker."""
        least = self._work.private_rows or 0

        def use(model: nn.Module, client: str) -> ChunkSums:
            rows, loss = self._rows(client), self._loss()
            labelled = labelled_rows(loss, rows[1]) if least else None
            return merged(evaluate_chunks(model, rows, loss, chunk_rows), least, labelled)

        return dict(zip(clients, self._each(block, clients, use), strict=True))

    def _each(
        self, block: Tensor, parts: Sequence[_Part], use: Callable[[nn.Module, _Part], _Found]
    ) -> list[_Found]:
        """Calls ``use`` with the global model and each part.

        What one leaves must not reach the next, which may be evaluated elsewhere.
        """
        pieces, seed = self._resident.layout.pieces(block), derive_seed("evaluation")
        found = []
        groups = [[each] for each in parts] if self._resident.remembers else [parts]
        with preserved_streams(self._device):
            for group in groups:
                with self._loaded(pieces, seed) as model:
                    loaded = self._resident.versions()
                    for place, part in enumerate(group):
                        if place:  # code that only computes may draw, and write in place
                            if self._resident.versions() != loaded:
                                self._resident.load(pieces)
                                loaded = self._resident.versions()
                            seed_streams(seed, self._device)
                        found.append(use(model, part))
        return found

    def _loss(self) -> Loss | None:
        return self._work.local.loss if isinstance(self._work.local, LocalTraining) else None

    def _rows(self, client: str) -> tuple[Tensor, Tensor]:
        span = self._spans[client]
        x, y = self._blocks[span.block]
        return x[span.start : span.stop], y[span.start : span.stop]

    @contextmanager
    def _loaded(
        self, pieces: Sequence[Tensor], seed: int, *, closed: bool = False
    ) -> Iterator[nn.Module]:
        """Loads the global model into the resident one and seeds the streams it may draw from.

        Leaves no gradients behind, and switches of torch as they were. The caller preserves the
        streams: seeding is cheap, that is not. ``closed``: no code of users runs but such that
        computes; it draws from torch's stream only, and has no hand in switches.
        """
        self._resident.load(pieces, closed=closed)
        seed_streams(seed, self._device, torch_only=closed)
        switches = None if closed else Switches(self._device)
        try:
            with (
                torch_threads(self._work.threads),
                torch.enable_grad(),
            ):  # whatever the parent's mode is
                yield self._resident.model
        finally:
            self._resident.forget_gradients()
            if switches is not None:
                switches.put_back()
