"""Reading messages in a worker that runs registered functions only. Runs in the worker.

A pickle is a program: it may name any function, call it, and set attributes of whatever it holds.
Here it finds permitted names only, makes data and objects of permitted classes, and changes
nothing but what it has made itself: neither the worker's objects nor modules, classes and
functions. It is written in Python (``pickle._Unpickler``) because the one in C cannot be asked
about single steps; tensors do not pass through it.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from fedproc.wire import codec
from fedproc.worker.registered import Registered

_Base: Any = pickle._Unpickler
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_pre_hooks")))


class GuardedDecoder(_Base):  # type: ignore[misc]
    """Unpickles one value, or refuses to."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Base.dispatch)

    def __init__(
        self,
        stream: io.BytesIO,
        load_external: Callable[[int], Any],
        registered: Registered,
    ) -> None:
        """``load_external``: persistent id -> object."""
        super().__init__(stream)
        self._load_external = load_external
        self._registered = registered
        self._foreign: dict[int, Any] = {}  # id -> what this message has not made

    def persistent_load(self, pid: int) -> Any:
        """A tensor of the message, or an object of the worker."""
        return self._not_ours(self._load_external(pid))

    def find_class(self, module: str, name: str) -> Any:
        """What is permitted under this name.

        Raises:
            NotPermittedError: nothing.
        """
        if module == codec.__name__ and name == codec.load_code.__name__:
            return self._load_code
        return self._not_ours(self._registered.find(module, name))

    def _not_ours(self, value: Any) -> Any:
        self._foreign[id(value)] = value
        return value

    def _load_code(self, digest: bytes, name: str = "code that was shipped") -> Any:
        return self._not_ours(self._registered.code(digest, name))

    def _require_own(self, target: Any) -> None:
        if id(target) in self._foreign:
            raise self._registered.refused(f"a pickle that changes a {type(target).__name__}")

    # ---- the steps of a pickle that do something

    def load_reduce(self) -> None:
        """Call a function."""
        function = self.stack[-2]
        if function != self._load_code:
            self._registered.require_maker(function)
        _Base.load_reduce(self)

    def load_newobj(self) -> None:
        """Make an object."""
        self._registered.require_maker(self.stack[-2], new=True)
        _Base.load_newobj(self)

    def load_newobj_ex(self) -> None:
        """Make an object with keywords."""
        self._registered.require_maker(self.stack[-3], new=True)
        _Base.load_newobj_ex(self)

    def load_build(self) -> None:
        """Set the state of an object."""
        target = self.stack[-2]
        self._require_own(target)
        _Base.load_build(self)
        if isinstance(target, nn.Module) and any(vars(target).get(name) for name in _HOOKS):
            raise self._registered.refused("a module with hooks")

    def load_append(self) -> None:
        """Append one."""
        self._require_own(self.stack[-2])
        _Base.load_append(self)

    def load_setitem(self) -> None:
        """Set one item."""
        self._require_own(self.stack[-3])
        _Base.load_setitem(self)

    def load_appends(self) -> None:
        """Append several."""
        self._require_own(self.metastack[-1][-1])
        _Base.load_appends(self)

    def load_setitems(self) -> None:
        """Set several items."""
        self._require_own(self.metastack[-1][-1])
        _Base.load_setitems(self)

    def load_additems(self) -> None:
        """Add several to a set."""
        self._require_own(self.metastack[-1][-1])
        _Base.load_additems(self)

    def load_other(self) -> None:
        """Steps of old protocols that fedproc does not write."""
        raise self._registered.refused("a pickle of an old protocol")

    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            pickle.BUILD[0]: load_build,
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.ADDITEMS[0]: load_additems,
        }
    )
    for _code in (pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = load_other
    del _code
