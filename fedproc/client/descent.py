"""What local epochs follow from client to client: the gradients, and a new optimizer for each.

Runs in workers. Where model and loss are captured, the rule is one of fedproc's and the optimizer
one of torch's, nothing of a user's runs between two clients: then one optimizer, made new again,
serves all of them, and nobody draws random numbers but from torch's stream.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fedproc.client.gradients import Gradients
from fedproc.client.rules import RULES
from fedproc.client.seeding import preserved_streams
from fedproc.client.stepping import (
    all_are_observed,
    home_of,
    is_observed,
    plain_lr,
    step_of,
    steps_by_torch,
    zero_grad_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from fedproc.client.rules import LocalRule
    from fedproc.client.training import LocalTraining, OptimizerFactory


# inputs and targets of a batch, steps taken before -> the loss before this one
Step = Callable[[Tensor, Tensor, int], float]


class Descent:
    """Gradients and optimizers of one model.

    Attributes:
        gradients: Of the model's loss.
        is_closed: No code of users runs, in clients or between them; True only :meth:`within`.
    """

    def __init__(self, model: nn.Module, local: LocalTraining, rule: LocalRule | None) -> None:
        """Keeps what it is given; nothing is computed yet.

        Args:
            model: What is trained.
            local: The loss and the factory of optimizers.
            rule: What changes the gradients, or None.
        """
        self.gradients = Gradients(model, local.loss)
        self._clip_norm = local.clip_grad_norm
        self.is_closed = False
        self._is_ruled = rule is not None and type(rule) not in RULES
        # a rule of a user's may look at the optimizer when the steps are taken, or keep it
        self._optimizers = Optimizers(local.optimizer, keeps=not self._is_ruled)

    @contextmanager
    def within(self, device: torch.device) -> Iterator[None]:
        """Looks once for several clients whether code of users runs; preserves the streams."""
        closed = self._optimizers.are_torchs() and not self._is_ruled and self.gradients.begin()
        self.is_closed = closed
        try:
            with preserved_streams(device, torch_only=closed):
                yield
        finally:
            self.is_closed = False

    def begin(self, correct: Callable[[], None] | None = None) -> tuple[Optimizer, Step]:
        """Makes the optimizer of the next client, and what takes a step of it at a batch.

        Args:
            correct: Called after each backward pass; may change the gradients.
        """
        trained = [p for p in self.gradients.parameters if p.requires_grad]
        optimizer = self._optimizers.new(trained, are_torchs=self.is_closed)
        if not self.is_closed:  # the factory may have hooked into the model
            self.gradients.begin()
        step = self._ordinary(optimizer, trained, correct)
        if self.is_closed and correct is None and self._clip_norm is None:
            lr = plain_lr(optimizer)
            if lr is not None and len(trained) == len(self.gradients.parameters):
                return optimizer, self._plain(lr, step)
        return optimizer, step

    def _ordinary(
        self, optimizer: Optimizer, trained: list[nn.Parameter], correct: Callable[[], None] | None
    ) -> Step:
        step, zero_grad = step_of(optimizer), zero_grad_of(optimizer)

        def take(x: Tensor, y: Tensor, taken: int) -> float:
            zero_grad()
            loss = self.gradients(x, y, taken)
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, self._clip_norm)
            if correct is not None:
                correct()
            step()
            return loss

        return take

    def _plain(self, lr: float, ordinary: Step) -> Step:
        """Steps of SGD that nobody has a part in; setting ``grad`` costs small models a tenth."""

        def take(x: Tensor, y: Tensor, taken: int) -> float:
            loss = self.gradients.descend(x, y, taken, lr)
            return ordinary(x, y, taken) if loss is None else loss

        return take

    def end(self) -> None:
        """Lets go of what the optimizer of a client remembers."""
        self._optimizers.forget()


class Optimizers:
    """New optimizers; one of torch's is made once, and from then on it is made new again."""

    def __init__(self, factory: OptimizerFactory, *, keeps: bool = True) -> None:
        """Keeps the factory; ``keeps``: an optimizer may serve several clients."""
        self._factory = factory
        self._keeps = keeps
        self._kind = kind_of(factory)
        self._asked = _asked(factory)
        self._code = None if self._kind is None else _code(self._kind)
        self._kept: Optimizer | None = None
        self._facts: object = None

    def are_torchs(self) -> bool:
        """Whether making them and their steps run no code but torch's."""
        if self._kind is None or all_are_observed() or not steps_by_torch(self._kind):
            return False
        return self._code == _code(self._kind) and self._asked == _asked(self._factory)

    def new(self, parameters: Sequence[nn.Parameter], *, are_torchs: bool = False) -> Optimizer:
        """Returns an optimizer that has taken no step; it may be the last client's, emptied.

        ``are_torchs``: the answer of :meth:`are_torchs` is known to be True.
        """
        kept = self._kept
        if (
            kept is not None
            and (are_torchs or self.are_torchs())
            and self._is_as_made(kept, parameters)
        ):
            self.forget()
            return kept
        made = self._factory(list(parameters))
        # one that has a state from the start (Adagrad) cannot be made new by forgetting it
        if self._keeps and self.are_torchs() and not made.state and not is_observed(made):
            self._kept, self._facts = made, _facts(made)
        return made

    def _is_as_made(self, kept: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
        return _steps(kept, parameters) and _facts(kept) == self._facts

    def forget(self) -> None:
        """Drops what the last client's steps left in the optimizer, momentum for instance."""
        if self._kept is not None:
            self._kept.state.clear()


def kind_of(factory: object) -> type[Optimizer] | None:
    """Finds the class of torch that a factory is, perhaps with numbers as arguments."""
    kind: Any = factory
    if type(factory) is functools.partial:
        if factory.args or not all(map(_is_number, factory.keywords.values())):
            return None
        kind = factory.func
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        return None
    # what torch marks as deprecated is wrapped by one of the other two
    homes = ("torch.", "typing_extensions", "warnings")
    torchs = all(home_of(part).startswith(homes) for part in _code(kind).values())
    return kind if torchs and kind.__module__.startswith("torch.optim.") else None


def _code(kind: type[Optimizer]) -> dict[str, Any]:
    """Lists the functions of a class of torch but its step, and what local epochs call besides."""
    parts = {**vars(Optimizer), **vars(kind)}
    found = {name: part for name, part in parts.items() if type(part) is FunctionType}
    found.pop("step", None)  # torch wraps it when the first optimizer is made
    return {**found, "clip_grad_norm_": nn.utils.clip_grad_norm_}


def _asked(factory: object) -> object:
    """What a factory gives to the class, which somebody who shares the factory may change."""
    return dict(factory.keywords) if type(factory) is functools.partial else None


def _is_number(value: object) -> bool:
    return type(value) in (bool, int, float, type(None)) or (
        type(value) is tuple and all(map(_is_number, value))
    )


def _steps(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether an optimizer is of exactly these parameters."""
    groups = optimizer.param_groups
    members = groups[0]["params"] if len(groups) == 1 else ()
    return len(members) == len(parameters) and all(map(operator.is_, members, parameters))


def _facts(optimizer: Optimizer) -> object:
    """What decides the steps of an optimizer besides its state; equal as long as nobody meddles."""
    values = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return type(optimizer).step, len(vars(optimizer)), is_observed(optimizer), values
