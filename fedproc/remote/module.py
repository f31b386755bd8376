"""ModulePointer: a module that lives in a worker. Runs in the parent."""

from collections.abc import Iterator
from typing import Any

from fedproc.remote.calls import compute, order, part
from fedproc.remote.object import call, items, kind_of_items, set_own
from fedproc.remote.pointer import Pointer
from fedproc.remote.tensor import TensorPointer
from fedproc.wire.commands import DETACHED

METHOD = "fedproc.worker.parts.method"


class ModulePointer(Pointer, kind="module"):
    """A pointer to an ``nn.Module``: call it on pointers of the same worker."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; a pointer to what it returns, at once."""
        return call(self, args, kwargs)

    def __len__(self) -> int:
        """How many parts an ``nn.Sequential`` or ``nn.ModuleList`` has."""
        return int(compute("builtins.len", (self,), what="len"))

    def __bool__(self) -> bool:
        """True: there is a module, whether it has a length or not."""
        return True

    def __getitem__(self, place: int) -> Any:
        """A part of an ``nn.Sequential`` or ``nn.ModuleList``; it follows when the whole moves."""
        if not isinstance(place, int):
            raise TypeError(
                f"a part of {self!r} is taken by its number, not by {place!r}; by its name it is "
                "an attribute: getattr(pointer, name)"
            )
        kind, count = kind_of_items(self), len(self)
        if not -count <= place < count:
            raise IndexError(f"{self!r} has {count} parts, and no part {place}")
        return part(kind, self, (place % count,))

    def __iter__(self) -> Iterator[Any]:
        """Pointers to the parts of an ``nn.Sequential`` or ``nn.ModuleList``."""
        return items(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Own slots only: nothing is set in the module behind the user's back."""
        set_own(self, name, value)

    def parameters(self, recurse: bool = True) -> list[TensorPointer]:
        """Pointers to the parameters, tied ones once; they follow when the module moves."""
        return [pointer for _, pointer in self.named_parameters(recurse)]

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, TensorPointer]]:
        """Names and pointers of the parameters."""
        asked = ("fedproc.worker.parts.parameter_names", (self, recurse))
        names = compute(*asked, what="parameters")
        return [(name, self._tensor(name)) for name in names]

    def state_dict(self) -> dict[str, TensorPointer]:
        """Pointers to the values of parameters and persistent buffers, by name.

        As in torch they share the module's memory and have no gradient: what is written to them in
        place is in the module.
        """
        names = compute("fedproc.worker.parts.state_names", (self,), what="state_dict")
        return {name: part(TensorPointer, self, (*name.split("."), DETACHED)) for name in names}

    def _tensor(self, name: str) -> TensorPointer:
        return part(TensorPointer, self, tuple(name.split(".")))

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> "ModulePointer":
        """Load local tensors, or pointers on the same worker."""
        from fedproc.remote.worker import put

        holder = put(self._data().link, dict(state), what="load_state_dict")
        order(METHOD, (self, "load_state_dict", holder, strict), {}, what="load_state_dict")
        return self

    def train(self, mode: bool = True) -> "ModulePointer":
        """Training mode."""
        return self._order("train", mode)

    def eval(self) -> "ModulePointer":
        """Evaluation mode."""
        return self._order("eval")

    def zero_grad(self, set_to_none: bool = True) -> "ModulePointer":
        """Forget the gradients."""
        return self._order("zero_grad", set_to_none)

    def requires_grad_(self, requires_grad: bool = True) -> "ModulePointer":
        """Train the parameters, or freeze them."""
        return self._order("requires_grad_", requires_grad)

    def _order(self, name: str, *args: Any) -> "ModulePointer":
        order(METHOD, (self, name, *args), {}, what=name)
        return self

    def __getattr__(self, name: str) -> Any:
        """A parameter, buffer, submodule or method. Asks the worker."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        kind = compute("fedproc.worker.parts.kind_of", (self, name), what=name)
        if kind == "missing":
            raise AttributeError(f"the module of {self!r} has no attribute {name!r}")
        if kind == "none":
            return None
        if kind == "tensor":
            return part(TensorPointer, self, (name,))
        if kind == "module":
            return part(ModulePointer, self, (name,))
        from fedproc.remote.object import Attribute

        return Attribute(self, name)
