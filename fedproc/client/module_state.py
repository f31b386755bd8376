"""What modules and losses keep besides what is loaded: put back before every client.

Runs in workers. Code of a user's may count its calls, assign a new tensor to a buffer, keep a list,
or write to a frozen parameter; so may a hook. A client must not find what another has left there:
the result would depend on who trained where. Modules of torch, and users' whose code cannot do such
things, need none of this.
"""

from __future__ import annotations

import copy
import functools
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from fedproc.client.kept_tensor import KeptTensor
from fedproc.client.pure import EVERY_MODULE, ImpureError, is_constant, reads_of_module
from fedproc.client.repeatable import hooks_of, patches_of
from fedproc.client.stepping import home_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# parameters, buffers, parts, and hooks of all kinds
_MEMBERS: Final = tuple(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict)
)
_FUNCTIONS: Final = (FunctionType, BuiltinFunctionType, type)
# The mode of parts is set before every client, but not that of losses and of modules in lists.
_SAME: Final = EVERY_MODULE - {"training"}


class ModuleState:
    """The attributes of modules, or of other objects, as they were when this was made.

    Containers and plain objects are copied, once here and once for each client. Modules and tensors
    stay the same objects: of the tensors the values are put back where somebody wrote to them in
    place. So does what cannot be copied, such as a lock.
    """

    def __init__(
        self, parts: Iterable[object], *, loaded: Iterable[Tensor] = (), changing: bool = False
    ) -> None:
        """Looks at what modules and objects are made of.

        Args:
            parts: All that belong together.
            loaded: Tensors whose values are somebody else's matter.
            changing: Code that is not theirs may change them, too.
        """
        given = list(parts)
        watched = changing or not all(map(_stays_as_it_is, given))
        self._parts = _with_hidden(given) if watched else []
        attributes = [_attributes(part) for part in self._parts]
        self._members = [
            [(name, dict(vars(part)[name])) for name in _members(part)] for part in self._parts
        ]
        objects = [*self._parts, *_objects_in([attributes, self._members])]
        self._stay = {id(each): each for each in objects}
        # code of a user's that only computes may do so in place
        holders = objects if watched else [] if all(map(_is_torchs, given)) else given
        own = {id(tensor) for tensor in loaded}
        self._tensors = [
            KeptTensor(tensor, loaded=id(tensor) in own, unseen=watched)
            for tensor in {id(t): t for each in holders for t in _tensors_of(each)}.values()
            if id(tensor) not in own or not tensor.requires_grad
        ]
        # one copy of all: what two modules share stays shared
        moving = [_moving(part, self._stay) for part in attributes]
        self._fixed = [
            {name: value for name, value in part.items() if name not in copied}
            for part, copied in zip(attributes, moving, strict=True)
        ]
        self._moving = copy.deepcopy(moving, dict(self._stay))

    def restore(self) -> None:
        """Makes all attributes and tensors what they were; values that are loaded stay."""
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
        for tensor in self._tensors:
            tensor.restore()

    @property
    def remembers(self) -> bool:
        """Whether there is anything that may have to be put back."""
        return bool(self._parts or self._tensors)

    @property
    def is_watching(self) -> bool:
        """Whether somebody may put other tensors into the modules."""
        return bool(self._parts)


def keepers_of(loss: object) -> list[object]:
    """Lists what of a loss keeps something: modules, objects that are called, tensors.

    Not functions: what those keep lies outside, where others may find it.
    """
    if isinstance(loss, nn.Module):
        return list(loss.modules())
    if isinstance(loss, MethodType):
        return keepers_of(loss.__self__)
    if isinstance(loss, functools.partial):
        by_torch = home_of(loss.func).startswith("torch.")  # it reads what it is given
        given = () if by_torch else (loss.func, *loss.args, *loss.keywords.values())
        return [each for part in given for each in keepers_of(part)]
    return [loss] if hasattr(loss, "__dict__") and not isinstance(loss, _FUNCTIONS) else []


def _stays_as_it_is(part: object) -> bool:
    """Whether its code cannot change what it keeps, but for values of tensors."""
    if not isinstance(part, nn.Module) or any(hooks_of(part)) or patches_of(part):
        return False
    if type(part).__module__.startswith("torch.nn.modules."):
        return True
    try:
        reads_of_module(part)
    except ImpureError:
        return False
    return True


def _is_torchs(part: object) -> bool:
    """Whether it is torch's, and writes to no tensors but buffers of its own in the forward pass.

    For those that stay as they are. Embeddings with ``max_norm`` scale the rows they look up.
    """
    home = type(part).__module__
    return home.startswith("torch.nn.modules.") and getattr(part, "max_norm", None) is None


def _with_hidden(parts: Iterable[object]) -> list[object]:
    """Adds the modules that some keep in lists and other attributes, which torch does not know."""
    found = {id(part): part for part in parts}
    left = list(found.values())
    while left:
        for each in _objects_in(_attributes(left.pop())):
            for module in each.modules() if isinstance(each, nn.Module) else ():
                if id(module) not in found:
                    found[id(module)] = module
                    left.append(module)
    return list(found.values())


def _members(part: object) -> tuple[str, ...]:
    return _MEMBERS if isinstance(part, nn.Module) else ()


def _attributes(part: object) -> dict[str, Any]:
    known = _SAME if isinstance(part, nn.Module) else ()
    return {name: value for name, value in vars(part).items() if name not in known}


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


def _tensors_of(each: object) -> list[Tensor]:
    if isinstance(each, Tensor):
        return [each]
    return [*each.parameters(), *each.buffers()] if isinstance(each, nn.Module) else []


def _are_same(now: dict[Any, object], before: dict[Any, object]) -> bool:
    pairs = zip(now.items(), before.items(), strict=False)
    return len(now) == len(before) and all(a == b and x is y for (a, x), (b, y) in pairs)
