"""The float32 master of half-precision parameters. Runs in the parent.

A server step may be smaller than half a unit in the last place of a bfloat16 or float16 parameter:
rounded away round after round, it never adds up. So a strategy that takes steps has its place in
float32 between rounds; the model and the clients get it cast to their dtype. The master moves by
what the strategy adds to the model that was sent: what the cast takes off is nobody's update.

It is kept and saved with the strategy's state, under a name of its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fedproc.client.layout import Layout
    from fedproc.federated.fold import Received
    from fedproc.federated.round import Start
    from fedproc.federated.strategies.contract import State, Strategy

_NAME: Final = "fp32 master"
_HALF: Final = (torch.float16, torch.bfloat16)


def without_master(state: State) -> State:
    """Returns the part of a state that is the strategy's own."""
    return {name: tensor for name, tensor in state.items() if name != _NAME}


def advance(layout: Layout, x: Tensor, new: Tensor, before: State) -> tuple[Tensor, State]:
    """Applies the step from ``x`` to ``new`` to the master.

    Args:
        layout: Says which parameters are of half precision.
        x: The trained parameters that were sent: float64, shape (parameters,).
        new: What the strategy made of them, in the same form; it stays as it is.
        before: The state that the round started from.

    Returns:
        ``new`` with the master (exact in float64) in place of half-precision parameters, and what
        to add to the state: float32, shape (half-precision parameters,); nothing without such.
    """
    sections = layout.of_kind("trained")
    sizes = [section.numel for section in sections]
    known, moved, result = before.get(_NAME), [], new.clone()
    pieces = zip(sections, x.split_with_sizes(sizes), result.split_with_sizes(sizes), strict=True)
    for section, sent, piece in pieces:
        if section.dtype not in _HALF:
            continue
        start = sent
        if known is not None:
            master, known = known.split_with_sizes([section.numel, len(known) - section.numel])
            # what somebody wrote to the model since then is where this round started
            start = torch.where(master.to(section.dtype) == sent, master.double(), sent)
        moved.append((start + (piece - sent)).float())
        piece.copy_(moved[-1])
    return (result, {_NAME: torch.cat(moved)}) if moved else (new, {})


def next_parameters(
    layout: Layout,
    strategy: Strategy,
    start: Start,
    received: Received,
    kept: Mapping[str, dict[str, Any]],
    population: int,
) -> tuple[Tensor, State]:
    """Lets the strategy take its step; in the float32 master, if it keeps one.

    Returns:
        The new trained parameters (float64, shape (parameters,)) and the new state.
    """
    moves = strategy.keeps_master() or start.ledger is not None  # a private mean is a step too
    x = (
        layout.flat_trained(start.block)
        if moves or strategy.looks_at_x()
        else torch.tensor(math.nan, dtype=torch.float64, device="cpu").expand(layout.trained_numel)
    )
    new, state = strategy.step(x, received, without_master(start.state))
    state = strategy.after(state, start.kept, kept, population)
    if moves:
        new, master = advance(layout, x, new, start.state)
        state = {**state, **master}
    return new, state
