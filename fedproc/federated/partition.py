"""Splits of rows over clients: who holds which rows.

Runs in the parent. A partition is any callable ``(labels, clients, rng) -> list of index arrays``
that gives every row to exactly one client; the classes here are such callables. They know nothing
of workers, so a split is the same for any number of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedproc.ranges import require_at_least, require_positive, settle

Indices = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]
Partition = Callable[[Labels, int, np.random.Generator], Sequence[npt.ArrayLike]]

# Draws of a skewed split before rows are moved to clients that have too few.
_DRAWS: Final = 10


@dataclass(frozen=True, slots=True)
class IID:
    """Equal parts of a permutation: sizes differ by at most one."""

    def __call__(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Splits ``len(labels)`` rows."""
        _require_rows(len(labels), clients)
        return _sorted(np.array_split(rng.permutation(len(labels)), clients))


@dataclass(frozen=True, slots=True)
class Shards:
    """Rows sorted by label, cut into shards, ``per_client`` shards each (McMahan et al. 2017).

    Attributes:
        per_client: Shards of a client; small numbers mean few labels per client.
    """

    per_client: int = 2

    def __post_init__(self) -> None:
        """Checks the number of shards."""
        settle(self, require_at_least, "per_client", least=1)

    def __call__(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Splits the rows of ``labels`` of shape (rows,)."""
        labels = _flat_labels(labels)
        shards = clients * self.per_client
        if len(labels) < shards:
            raise ValueError(
                f"{clients} clients of {self.per_client} shards need {shards} rows, "
                f"there are {len(labels)}"
            )
        shuffled = rng.permutation(len(labels))
        by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
        pieces = np.array_split(by_label, shards)
        dealt = rng.permutation(shards).reshape(clients, self.per_client)
        return _sorted([np.concatenate([pieces[i] for i in hand]) for hand in dealt])


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Per label, shares over the clients are drawn from Dirichlet(alpha) (Hsu et al. 2019).

    Splits that leave a client below ``min_size`` are drawn again; after some draws, rows of the
    largest clients fill it up, so that small ``alpha`` and many clients work too.

    Attributes:
        alpha: Concentration: 0.1 gives most clients one or two labels, 100 is close to IID.
        min_size: Fewest rows of a client.
    """

    alpha: float
    min_size: int = 1

    def __post_init__(self) -> None:
        """Checks both values."""
        _require_skew(self)

    def __call__(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Splits the rows of ``labels`` of shape (rows,)."""
        labels = _flat_labels(labels)
        _require_rows(len(labels), clients, self.min_size)
        kinds = [np.flatnonzero(labels == label) for label in np.unique(labels)]

        def draw() -> list[Indices]:
            hands: list[list[Indices]] = [[] for _ in range(clients)]
            for rows in kinds:
                pieces = _cut(rng.permutation(rows), rng.dirichlet(np.full(clients, self.alpha)))
                for hand, piece in zip(hands, pieces, strict=True):
                    hand.append(piece)
            return [np.concatenate([_NOTHING, *hand]) for hand in hands]

        return _sorted(_draw_until(draw, self.min_size))


@dataclass(frozen=True, slots=True)
class Quantity:
    """Clients hold unlike numbers of alike rows: sizes are shares from Dirichlet(alpha).

    Attributes:
        alpha: Concentration: the smaller, the more unequal.
        min_size: Fewest rows of a client.
    """

    alpha: float
    min_size: int = 1

    def __post_init__(self) -> None:
        """Checks both values."""
        _require_skew(self)

    def __call__(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Splits ``len(labels)`` rows."""
        _require_rows(len(labels), clients, self.min_size)

        def draw() -> list[Indices]:
            shares = rng.dirichlet(np.full(clients, self.alpha))
            return _cut(rng.permutation(len(labels)), shares)

        return _sorted(_draw_until(draw, self.min_size))


@dataclass(frozen=True, slots=True, eq=False)
class ByKey:
    """One client per distinct key: a writer, a hospital, a device.

    Attributes:
        keys: One key per row, shape (rows,); numbers or strings.
    """

    keys: Any

    def names(self) -> list[str]:
        """Lists the clients: ``str(key)`` of the distinct keys in their order."""
        return [str(key) for key in self._distinct()[0]]

    def __call__(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:  # noqa: ARG002 - part of the signature
        """Splits ``len(labels)`` rows; nothing is drawn.

        Raises:
            ValueError: Not one key per row, or not as many clients as distinct keys.
        """
        distinct, positions = self._distinct()
        if len(positions) != len(labels):
            raise ValueError(f"there are {len(positions)} keys for {len(labels)} rows")
        if clients != len(distinct):
            raise ValueError(
                f"{len(distinct)} distinct keys make {len(distinct)} clients, not {clients}"
            )
        return [np.flatnonzero(positions == place) for place in range(len(distinct))]

    def _distinct(self) -> tuple[Labels, Indices]:
        keys = np.asarray(self.keys)
        if keys.ndim != 1:
            raise ValueError(f"keys must have the shape (rows,), got {keys.shape}")
        distinct, positions = np.unique(keys, return_inverse=True)
        if len({str(key) for key in distinct}) != len(distinct):
            raise ValueError(
                "two distinct keys have the same text, so two clients would share a name"
            )
        return distinct, positions


def split(
    partition: Partition | str, labels: Labels, clients: int, rng: np.random.Generator
) -> list[Indices]:
    """Runs a partition and checks that every row lands in exactly one client.

    Args:
        partition: ``"iid"`` or a callable.
        labels: Targets, shape (rows, ...).
        clients: Number of clients.
        rng: Source of every draw.

    Returns:
        One ascending index array per client.

    Raises:
        ValueError: The partition is unknown, or not exact.
    """
    if isinstance(partition, str):
        if partition != "iid":
            raise ValueError(
                f"unknown partition {partition!r}: 'iid', or an object of fedproc.partition"
            )
        partition = IID()
    if not callable(partition):
        raise ValueError(f"a partition is callable as (labels, clients, rng), got {partition!r}")
    parts = _sorted([_as_indices(part) for part in partition(labels, clients, rng)])
    if len(parts) != clients:
        raise ValueError(f"the partition made {len(parts)} parts for {clients} clients")
    everything = np.sort(np.concatenate([_NOTHING, *parts]))
    if not np.array_equal(everything, np.arange(len(labels))):
        raise ValueError(
            f"the partition does not give each of {len(labels)} rows to exactly one client"
        )
    return parts


_NOTHING: Final[Indices] = np.empty(0, dtype=np.int64)


def _as_indices(part: npt.ArrayLike) -> Indices:
    array = np.asarray(part)
    if array.size == 0:
        return _NOTHING
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"a part must be an array of row numbers, got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _sorted(parts: Sequence[Indices]) -> list[Indices]:
    """Rows keep their order inside a client."""
    return [np.sort(part) for part in parts]


def _flat_labels(labels: Labels) -> Labels:
    flat = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1:
        raise ValueError(
            f"a split by label needs one label per row, the targets have shape {labels.shape}"
        )
    return flat


def _require_rows(rows: int, clients: int, min_size: int = 1) -> None:
    if clients * min_size > rows:
        raise ValueError(
            f"{clients} clients of at least {min_size} row(s) need more than the {rows} rows there "
            "are: take fewer clients, or a partition that may leave some empty, such as "
            "Dirichlet(alpha, min_size=0)"
        )


def _require_skew(partition: Dirichlet | Quantity) -> None:
    settle(partition, require_positive, "alpha")
    settle(partition, require_at_least, "min_size", least=0)


def _cut(rows: Indices, shares: npt.NDArray[np.float64]) -> list[Indices]:
    """Cuts ``rows`` in proportion to ``shares``, which add up to 1."""
    borders = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    return np.split(rows, np.minimum(borders, len(rows)))


def _draw_until(draw: Callable[[], list[Indices]], min_size: int) -> list[Indices]:
    parts = draw()
    for _ in range(_DRAWS):
        if all(len(part) >= min_size for part in parts):
            return parts
        parts = draw()
    return _fill_up(parts, min_size)


def _fill_up(parts: list[Indices], min_size: int) -> list[Indices]:
    """Moves rows of the largest parts to those below ``min_size``; the rows are enough for all."""
    hands = [list(part) for part in parts]
    largest = [(-len(hand), place) for place, hand in enumerate(hands)]
    heapq.heapify(largest)
    for hand in hands:
        while len(hand) < min_size:
            size, place = heapq.heappop(largest)
            # a part that was filled up since has more than its entry says, and gives nothing
            if len(hands[place]) == -size:
                hand.append(hands[place].pop())
                heapq.heappush(largest, (size + 1, place))
    return [np.array(hand, dtype=np.int64) for hand in hands]
