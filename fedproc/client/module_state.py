"""What modules keep besides their values: put back before every client.

Runs in workers. A module of a user's may count its calls, assign a new tensor to a buffer, or keep
a list; so may a hook. A client must not find what another has left there: the result would depend
on who trained where. Modules of torch, and users' whose code cannot do such things, need none of
this.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from fedproc.client.pure import EVERY_MODULE, ImpureError, is_constant, reads_of_module
from fedproc.client.repeatable import hooks_of, patches_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# parameters, buffers, parts, and hooks of all kinds
_MEMBERS: Final = tuple(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict)
)


class ModuleState:
    """The attributes of modules as they were when this was made.

    Containers and plain objects are copied, once here and once for each client. Modules and tensors
    stay the same objects: of the tensors the values are put back where somebody wrote to them in
    place. So does what cannot be copied, such as a lock.
    """

    def __init__(self, modules: Iterable[nn.Module], *, changing: bool) -> None:
        """Looks at modules.

        Args:
            modules: All that belong together.
            changing: Code that is not theirs may change them, too.
        """
        self._parts = list(modules)
        if not changing and all(map(_stays_as_it_is, self._parts)):
            self._parts = []
        attributes = [_attributes(part) for part in self._parts]
        self._members = [
            [(name, dict(vars(part)[name])) for name in _MEMBERS] for part in self._parts
        ]
        objects = [*self._parts, *_objects_in([attributes, self._members])]
        self._stay = {id(each): each for each in objects}
        own = {id(t) for part in self._parts for t in (*part.parameters(), *part.buffers())}
        tensors = {id(t): t for each in objects for t in _tensors_of(each) if id(t) not in own}
        self._tensors = [(t, t._version, t.detach().clone()) for t in tensors.values()]
        # one copy of all: what two modules share stays shared
        moving = [_moving(part, self._stay) for part in attributes]
        self._fixed = [
            {name: value for name, value in part.items() if name not in copied}
            for part, copied in zip(attributes, moving, strict=True)
        ]
        self._moving = copy.deepcopy(moving, dict(self._stay))

    def restore(self) -> None:
        """Makes all attributes what they were; values of parameters and buffers stay."""
        moving = (
            copy.deepcopy(self._moving, dict(self._stay)) if any(self._moving) else self._moving
        )
        every = zip(self._parts, self._members, self._fixed, moving, strict=True)
        for part, members, fixed, copied in every:
            own = vars(part)
            for name, before in members:
                if not _are_same(own[name], before):
                    own[name].clear()
                    own[name].update(before)
            for name in _attributes(part).keys() - fixed.keys() - copied.keys():
                del own[name]
            own.update(fixed)
            own.update(copied)
        for place, (tensor, version, values) in enumerate(self._tensors):
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(values)
                self._tensors[place] = tensor, tensor._version, values

    @property
    def is_watching(self) -> bool:
        """Whether somebody may put other tensors into the modules."""
        return bool(self._parts)


def _stays_as_it_is(part: nn.Module) -> bool:
    if any(hooks_of(part)) or patches_of(part):
        return False
    if type(part).__module__.startswith("torch.nn.modules."):
        return True
    try:
        reads_of_module(part)
    except ImpureError:
        return False
    return True


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in EVERY_MODULE}


def _moving(attributes: Mapping[str, Any], stay: Mapping[int, object]) -> dict[str, Any]:
    """Picks what somebody could change without putting another object in its place."""
    return {
        name: value
        for name, value in attributes.items()
        if not is_constant(value) and id(value) not in stay and _can_be_copied(value, stay)
    }


def _can_be_copied(value: object, stay: Mapping[int, object]) -> bool:
    try:
        copy.deepcopy(value, dict(stay))
    except Exception:  # noqa: BLE001 - a lock, an open file: whatever it raises
        return False
    return True


def _objects_in(value: object) -> Iterator[nn.Module | Tensor]:
    """Yields modules and tensors in lists, tuples, sets and dicts."""
    if isinstance(value, nn.Module | Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _objects_in([*value.values()])
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _objects_in(each)


def _tensors_of(each: nn.Module | Tensor) -> list[Tensor]:
    return [each] if isinstance(each, Tensor) else [*each.parameters(), *each.buffers()]


def _are_same(now: dict[Any, object], before: dict[Any, object]) -> bool:
    pairs = zip(now.items(), before.items(), strict=False)
    return len(now) == len(before) and all(a == b and x is y for (a, x), (b, y) in pairs)
