"""The user's optimizer on the parameters of a whole stack.

Runs in workers. Optimizers of torch that treat every element by itself do to the rows of a matrix
what they do to one client; so the class that the user chose takes the steps, with its own code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fedproc.client.descent import kind_of
from fedproc.client.repeatable import is_watched, patches_of
from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.stepping import step_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedproc.client.training import LocalTraining, OptimizerFactory

_ELEMENTWISE: Final = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


class StackedOptimizer:
    """Steps of all clients that still train: the first rows of the stack."""

    def __init__(
        self, chosen: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], values: Tensor
    ) -> None:
        """Makes an optimizer like ``chosen`` over the columns of ``values``.

        Args:
            chosen: What the user's factory made of ``parameters``; it takes no step.
            parameters: The trained parameters of one model, in the order of the columns.
            values: (clients, parameters); changed in place by the steps.

        Raises:
            NotVectorizableError: The optimizer looks at more than one element at a time, is none
                of torch, or does something besides its steps.
        """
        _require_elementwise(chosen)
        ends, end = {}, 0
        for parameter in parameters:
            ends[id(parameter)] = (end, end + parameter.numel())
            end += parameter.numel()
        self._values = values
        self._clients = len(values)
        self._members: list[tuple[nn.Parameter, slice]] = []
        groups = [self._group(group, ends) for group in chosen.param_groups]
        self._optimizer = _made_like(chosen, groups)
        self._step = step_of(self._optimizer)

    def _group(self, group: dict[str, Any], ends: dict[int, tuple[int, int]]) -> dict[str, Any]:
        """Maps a group to columns; those side by side become one parameter."""
        found = [ends.get(id(parameter)) for parameter in group["params"]]
        places = sorted(place for place in found if place is not None)
        if len(places) < len(found):
            raise NotVectorizableError(
                "the optimizer steps tensors that are no parameters of the model: they cannot be "
                "stacked; use vectorize=False"
            )
        runs: list[list[int]] = []
        for start, stop in places:
            if runs and runs[-1][1] == start:
                runs[-1][1] = stop
            else:
                runs.append([start, stop])
        columns = [slice(start, stop) for start, stop in runs]
        members = [(nn.Parameter(self._values[:, part]), part) for part in columns]
        self._members.extend(members)
        stacked = {**group, "params": [parameter for parameter, _ in members]}
        if group.get("fused") and not all(parameter.is_contiguous() for parameter, _ in members):
            stacked["fused"] = None  # its kernels take columns for rows
        return stacked

    def step(self, gradients: Tensor) -> None:
        """Takes one step of the first ``len(gradients)`` clients; the others stay as they are."""
        if len(gradients) < self._clients:
            self._narrow(len(gradients))
        for parameter, part in self._members:
            parameter.grad = gradients[:, part]
        self._step()

    def _narrow(self, clients: int) -> None:
        """Lets go of clients that are done: their values and momenta are not looked at again."""
        for parameter, part in self._members:
            parameter.grad = None
            parameter.data = self._values[:clients, part]
            state = self._optimizer.state[parameter]
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim == 2:
                    state[name] = value[:clients]
        self._clients = clients


def chosen_by(
    factory: OptimizerFactory, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Asks a user's factory for the optimizer of one client.

    Raises:
        NotVectorizableError: It does something besides.
    """
    if kind_of(factory) is not None:  # torch's own code does nothing else
        return factory(list(parameters))
    before = _bits(parameters)
    chosen = factory(list(parameters))
    if any(map(is_watched, parameters)) or not torch.equal(_bits(parameters), before):
        raise NotVectorizableError(
            "the factory of optimizers changes the parameters or hooks into them, which stacked "
            "clients do not share; use vectorize=False"
        )
    return chosen


def require_clippable(
    local: LocalTraining, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> None:
    """Raises NotVectorizableError if a norm to clip has gradients that nobody sets to zero."""
    if local.clip_grad_norm is None:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not all(id(parameter) in stepped for parameter in parameters):
        raise NotVectorizableError(
            "clip_grad_norm measures all gradients, and those of parameters that the optimizer "
            "does not step add up from step to step: freeze these parameters, or use "
            "vectorize=False"
        )


def _bits(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters]).view(torch.uint8)


def _made_like(
    chosen: torch.optim.Optimizer, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    make: Any = type(chosen)
    # the only number of all that groups do not tell the constructor
    names = ("initial_accumulator_value",) if isinstance(chosen, torch.optim.Adagrad) else ()
    made: torch.optim.Optimizer = make(groups, **{name: chosen.defaults[name] for name in names})
    return made


def _require_elementwise(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in _ELEMENTWISE:
        names = ", ".join(sorted(kind.__name__ for kind in _ELEMENTWISE))
        raise NotVectorizableError(
            f"{type(optimizer).__name__} cannot step stacked clients; these of torch.optim can: "
            f"{names}; or use vectorize=False"
        )
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any(hooks):
        raise NotVectorizableError(
            "the optimizer has hooks, which would see all clients at once; use vectorize=False"
        )
    if optimizer.defaults.get("differentiable"):
        raise NotVectorizableError(
            "with differentiable=True torch refuses to step parameters, also those of a client "
            "alone: leave it out"
        )
    replaced = patches_of(optimizer)
    if replaced:
        raise NotVectorizableError(
            f"{replaced[0]} of the optimizer was replaced, by a scheduler or the factory: steps of "
            "stacked clients are torch's own; use vectorize=False"
        )
    if optimizer.state and any(optimizer.state.values()) and _stepped(optimizer):
        raise NotVectorizableError(
            "the optimizer comes with a state from elsewhere; use vectorize=False"
        )


def _stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether it has taken steps; Adagrad has a state before its first."""
    return any(float(state.get("step", 1)) for state in optimizer.state.values())
