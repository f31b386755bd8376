"""Which worker trains which client, where each could train any. Runs in the parent."""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Loads that differ by less, as a part of the mean, are even: whoever is done first helps then.
_EVEN: Final = 1 / 16


def balanced(
    homes: Mapping[str, str], costs: Mapping[str, float], workers: Sequence[str], most: int
) -> dict[str, str]:
    """Spreads clients evenly over workers; few are trained away from where their rows lie.

    Args:
        homes: Client -> the worker that holds its rows, one of ``workers``.
        costs: Client -> how long it trains, in any unit, above 0.
        workers: Names of all that could train.
        most: How many may be used, at least 1: the first of them in every round, since who trained
            in the round before is quicker: code and model are in its caches.

    Returns:
        Client -> the worker that trains it, in the order of ``homes``.
    """
    loads = dict.fromkeys(workers[:most], 0.0)
    homeless = []
    for client, home in homes.items():
        if home in loads:
            loads[home] += costs[client]
        else:
            homeless.append(client)
    found = dict(homes)
    for client in sorted(homeless, key=costs.__getitem__, reverse=True):
        found[client] = least = min(loads, key=loads.__getitem__)
        loads[least] += costs[client]
    if not _are_even(loads):
        _even_out(found, costs, loads)
    return found


def _are_even(loads: Mapping[str, float]) -> bool:
    mean = sum(loads.values()) / len(loads)
    return max(loads.values()) - min(loads.values()) <= _EVEN * mean


def _even_out(found: dict[str, str], costs: Mapping[str, float], loads: dict[str, float]) -> None:
    """Moves clients from the worker with the most to do to the one with the least."""
    clients: dict[str, list[tuple[float, str]]] = {name: [] for name in loads}
    for client, name in found.items():
        clients[name].append((costs[client], client))
    for queue in clients.values():
        queue.sort()
    for _ in found:
        most, least = max(loads, key=loads.__getitem__), min(loads, key=loads.__getitem__)
        gap, queue = loads[most] - loads[least], clients[most]
        # the costliest that does not turn the two around; or one that at least narrows the gap
        place = max(0, bisect_right(queue, gap / 2, key=_cost) - 1)
        cost, client = queue[place]
        if cost >= gap:
            return
        del queue[place]
        insort(clients[least], (cost, client))
        loads[most] -= cost
        loads[least] += cost
        found[client] = least
        if _are_even(loads):
            return


def _cost(entry: tuple[float, str]) -> float:
    return entry[0]
