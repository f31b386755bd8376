"""Descent in both ways, replayed and by ``backward``, for tests of what is replayed."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedproc.client.gradients import Gradients
from fedproc.client.program import Program


def both_ways(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: list[tuple[Tensor, Tensor]],
) -> Gradients:
    """Descends twice from the same model and streams, and compares all bits after every step."""
    other = copy.deepcopy(model)
    found = Gradients(model, loss)
    for step, (x, y) in enumerate(batches):
        stream = torch.get_rng_state()
        model.zero_grad()
        found.begin()
        value = found(x.clone(), y.clone(), step)
        after = torch.get_rng_state()
        torch.set_rng_state(stream)
        other.zero_grad()
        expected = loss(other(x.clone()), y.clone())
        expected.backward()
        assert value == expected.item()
        assert torch.equal(after, torch.get_rng_state())
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                assert torch.equal(ours.grad, theirs.grad)
                assert ours.grad.stride() == theirs.grad.stride()
                assert not ours.grad.requires_grad
                with torch.no_grad():
                    ours.sub_(ours.grad, alpha=0.05)
                    theirs.sub_(theirs.grad, alpha=0.05)
        for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    return found


def programs(gradients: Gradients) -> int:
    return sum(isinstance(program, Program) for program in gradients._programs._found.values())
