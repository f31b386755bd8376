"""Python's operators for pointers. Runs in the parent."""

from collections.abc import Callable
from typing import Any, TypeVar

Operate = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
Class = TypeVar("Class", bound=type)

BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
UNARY = ("neg", "pos", "abs", "invert")


SYMBOLS = {
    f"operator.__{name}__": symbol
    for name, symbol in zip(BINARY, "+ - * / // % ** @ & | ^ << >>".split(), strict=True)
}
"""How a user writes an operation."""


def with_operators(
    operate: Operate, *, comparisons: bool = True, in_place: bool = True
) -> Callable[[Class], Class]:
    """A class decorator that adds the operators.

    Args:
        operate: runs ``operator.<name>`` on arguments.
        comparisons: ``==``, ``<`` ... too.
        in_place: ``+=`` ... as operations of their own; else Python makes them from ``+``.
    """

    def decorate(cls: Class) -> Class:
        for name in BINARY:
            operation = f"operator.__{name}__"
            setattr(cls, f"__{name}__", _binary(operate, operation))
            setattr(cls, f"__r{name}__", _reflected(operate, operation))
            if in_place:
                setattr(cls, f"__i{name}__", _binary(operate, f"operator.i{name}"))
        for name in COMPARISONS if comparisons else []:
            setattr(cls, f"__{name}__", _binary(operate, f"operator.{name}"))
        for name in UNARY:
            setattr(cls, f"__{name}__", _unary(operate, f"operator.{name}"))
        for name in ("getitem", "delitem"):
            setattr(cls, f"__{name}__", _binary(operate, f"operator.{name}"))
        setattr(cls, "__setitem__", _set_item(operate))  # noqa: B010 - mypy: Class is any class
        return cls

    return decorate


def _binary(operate: Operate, name: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return operate(name, (self, other), {})

    return method


def _reflected(operate: Operate, name: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return operate(name, (other, self), {})

    return method


def _unary(operate: Operate, name: str) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        return operate(name, (self,), {})

    return method


def _set_item(operate: Operate) -> Callable[[Any, Any, Any], None]:
    def method(self: Any, key: Any, value: Any) -> None:
        operate("operator.setitem", (self, key, value), {})

    return method
