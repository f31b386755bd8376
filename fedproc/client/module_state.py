"""What modules keep besides their values: put back before every client.

Runs in workers. A module of a user's may count its calls, assign a new tensor to a buffer, or keep
a list. A client must not find what another has left there: the result would depend on who trained
where. Modules of torch, and users' whose code cannot do such things, need none of this.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from fedproc.client.pure import ImpureError, reads_of_module

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_MEMBERS: Final = ("_parameters", "_buffers", "_modules")
# what torch keeps in every module, hooks for instance; all but the members stays as it is
_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


class ModuleState:
    """The attributes of modules as they were when this was made."""

    def __init__(self, modules: Iterable[nn.Module], *, changing: bool) -> None:
        """Looks at modules.

        Args:
            modules: All that belong together.
            changing: Code that is not theirs may change them, too.
        """
        self._parts = list(modules)
        if not changing and all(map(_stays_as_it_is, self._parts)):
            self._parts = []
        # they stay the same objects, also where an attribute names them
        stay: list[Any] = [*self._parts]
        for part in self._parts:
            stay += [each for name in _MEMBERS for each in vars(part)[name].values()]
        self._stay = {id(each): each for each in stay if each is not None}
        self._members = [
            [(name, dict(vars(part)[name])) for name in _MEMBERS] for part in self._parts
        ]
        self._kept = [copy.deepcopy(_attributes(part), dict(self._stay)) for part in self._parts]

    def restore(self) -> None:
        """Makes all attributes what they were; values of tensors stay."""
        for part, members, kept in zip(self._parts, self._members, self._kept, strict=True):
            own = vars(part)
            for name, before in members:
                if not _are_same(own[name], before):
                    own[name].clear()
                    own[name].update(before)
            if kept or len(own) > len(_EVERY_MODULE):
                for name in _attributes(part).keys() - kept.keys():
                    del own[name]
                own.update(copy.deepcopy(kept, dict(self._stay)))

    @property
    def is_watching(self) -> bool:
        """Whether somebody may put other tensors into the modules."""
        return bool(self._parts)


def _stays_as_it_is(part: nn.Module) -> bool:
    if type(part).__module__.startswith("torch.nn.modules."):
        return True
    try:
        reads_of_module(part)
    except ImpureError:
        return False
    return True


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if name not in _EVERY_MODULE}


def _are_same(now: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> bool:
    pairs = zip(now.items(), before.items(), strict=False)
    return len(now) == len(before) and all(a == b and x is y for (a, x), (b, y) in pairs)
