"""A check that users run on their own set-up: does the number of workers change a result?

Runs in the parent; starts clusters of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from fedproc.cluster.cluster import Cluster
from fedproc.ranges import require_at_least

if TYPE_CHECKING:
    from torch import nn

    from fedproc.federated.aggregator import Aggregator

AggregatorFactory = Callable[[Cluster], "Aggregator"]


@dataclass(frozen=True, slots=True)
class Determinism:
    """The model that each cluster made; true if they are all the same bits.

    Attributes:
        digests: Number of workers -> SHA-256 of the model after the rounds.
    """

    digests: Mapping[int, str]

    def __bool__(self) -> bool:
        """Tells whether all models are equal."""
        return len(set(self.digests.values())) == 1


def verify_determinism(
    aggregator_factory: AggregatorFactory,
    workers: Sequence[int] = (1, 2, 4),
    *,
    rounds: int = 1,
    transport: str = "process",
) -> Determinism:
    """Plays the same rounds on clusters of several sizes and compares the models bit by bit.

    Args:
        aggregator_factory: Makes the data and the aggregator on the cluster it is given. It must
            seed what it draws itself, such as the first parameters of the model.
        workers: Sizes of the clusters.
        rounds: Rounds to play on each.
        transport: ``"process"`` or ``"inline"``.

    Returns:
        The digests, as an object that is true if they are equal.

    Raises:
        ValueError: No sizes, or a number below 1.
    """
    rounds = require_at_least("rounds", rounds, 1)
    if not workers:
        raise ValueError("workers must list at least one number of workers")
    digests = {}
    for count in workers:
        with Cluster(require_at_least("workers", count, 1), transport=transport) as cluster:
            aggregator = aggregator_factory(cluster)
            aggregator.run(rounds, progress=False)
            digests[count] = model_digest(aggregator.model)
    return Determinism(digests)


def model_digest(model: nn.Module) -> str:
    """Computes SHA-256 over names, shapes, dtypes and bytes of parameters and buffers."""
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
