"""Which of a user's functions depend on nothing but their arguments. Runs in workers.

Told from the code, not from trying: a function that counts its calls, draws lots in Python or looks
at a file does as it always did until it does something else. What is let through cannot reach
anything that changes: it reads constants, attributes that are constants, and torch's functions of
tensors, and it stores nothing but its own variables. In doubt the answer is no.
"""

from __future__ import annotations

import builtins
import dis
import math
import sys
from itertools import pairwise
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fedproc.errors import with_article

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from types import CodeType

_MODULES: Final = (torch, nn, F, math)
_BUILTINS: Final = frozenset(
    "abs bool dict enumerate float int len list max min range reversed sorted str sum tuple zip "
    "ValueError TypeError AssertionError RuntimeError".split()
)
# By name, whoever has them: functions and methods of tensors that dispatch all they do and look at
# values in kernels only. Not those that make an argument of a value, as ctc_loss does of lengths,
# nor those that go another way while operations are written down, as attention does.
_FUNCTIONS: Final = frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear "
    "binary_cross_entropy binary_cross_entropy_with_logits celu conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity cross_entropy dropout "
    "dropout1d dropout2d dropout3d elu embedding fold gelu glu group_norm hardsigmoid hardswish "
    "hardtanh huber_loss interpolate kl_div l1_loss layer_norm leaky_relu linear log_softmax "
    "logsigmoid max_pool1d max_pool2d max_pool3d mish mse_loss nll_loss normalize pad "
    "pixel_shuffle prelu relu relu6 selu sigmoid silu smooth_l1_loss "
    "softmax softmin softplus softsign tanh threshold unfold "
    "abs add addmm amax amin arange baddbmm bernoulli bmm broadcast_to cat chunk clamp clip cos "
    "cumsum diff div einsum exp expm1 eye flatten flip full_like log log1p logsumexp matmul max "
    "maximum mean min minimum mm movedim mul neg ones ones_like outer permute pow rand "
    "rand_like randn randn_like reshape roll rsqrt sign sin split sqrt square squeeze stack std "
    "sub sum swapaxes transpose tril triu unbind unsqueeze var where zeros zeros_like".split()
)
_METHODS: Final = frozenset(
    "T H mT mH device dim dtype ndim ndimension nelement numel shape size stride bfloat16 "
    "contiguous double expand expand_as float half int items keys long repeat reshape_as to "
    "type_as values view view_as weight bias add_ clamp_ div_ masked_fill masked_fill_ mul_ relu_ "
    "sub_ t functional nn".split()
)
# Of a tensor they make another one, but a module they change.
_CONVERT: Final = frozenset("bfloat16 double float half to type".split())
_READ_VALUES: Final = frozenset(("tolist", "numpy", "data", "data_ptr", "grad", "storage"))
_ATTRIBUTES: Final = _METHODS | _FUNCTIONS | frozenset(dir(math))
_CONSTANTS: Final = (
    bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device,
)  # fmt: skip
_LOADS_ATTRIBUTE: Final = ("LOAD_ATTR", "LOAD_METHOD")
_LOADS_NAME: Final = ("LOAD_GLOBAL", "LOAD_NAME")
_REFUSED: Final = (
    "STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "STORE_SLICE", "DELETE_ATTR",
    "DELETE_GLOBAL", "DELETE_NAME", "DELETE_SUBSCR", "IMPORT_", "LOAD_BUILD_CLASS", "LOAD_SUPER",
    "YIELD", "SEND", "GET_AWAITABLE", "GET_AITER", "LOAD_FROM_DICT", "LOAD_LOCALS", "LOAD_CLASS",
)  # fmt: skip
# what every class has, and what no longer matters once there is an object of it
_ORDINARY: Final = frozenset(
    "__module__ __qualname__ __doc__ __dict__ __weakref__ __annotations__ __static_attributes__ "
    "__firstlineno__ __slotnames__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__init__".split()
)
EVERY_MODULE: Final = frozenset(vars(nn.Module()))


class Read(NamedTuple):
    """What was read of something that could be changed later: ``home[name]`` was ``value``."""

    home: Mapping[str, Any]
    name: str
    value: object


class ImpureError(Exception):
    """A function may depend on more than its arguments."""


def reads_of_function(function: object) -> list[Read]:
    """Lists what a function reads besides its arguments.

    Raises:
        ImpureError: It may do more than compute.
    """
    return list(_reads(function, ()))


def reads_of_module(module: nn.Module) -> list[Read]:
    """Lists what the ``forward`` of a user's module reads besides its arguments and parts.

    Raises:
        ImpureError: It may do more than compute.
    """
    kind = type(module)
    if kind.__mro__ != (kind, nn.Module, object):
        raise ImpureError(f"{kind.__name__} inherits from more than nn.Module")
    own = {**module._parameters, **module._buffers, **module._modules, "training": True}
    for name, value in vars(module).items():
        if name not in EVERY_MODULE:
            _require_constant(name, value)
            own[name] = None
    functions = _functions(kind)
    known = {*own, *functions, *(name for name, v in vars(kind).items() if is_constant(v))}
    if known & _READ_VALUES:
        raise ImpureError("something of it has the name of what reads values")
    reads = [Read(vars(kind), name, function) for name, function in functions.items()]
    for function in functions.values():  # all: another part may have one of the same name called
        reads += _reads(function, known)
    if any(_is_conversion(step) for code in functions.values() for step in _steps(code.__code__)):
        for function in functions.values():
            _require_tensors(function, module._modules)
    return reads


def _functions(kind: type) -> dict[str, FunctionType]:
    """Finds the methods of a class that has nothing else but constants."""
    functions = {}
    for name, value in vars(kind).items():
        if name in _ORDINARY:
            continue
        if hasattr(nn.Module, name) and name != "forward":
            raise ImpureError(f"{kind.__name__}.{name} is another one than nn.Module's")
        if type(value) is FunctionType:
            functions[name] = value
        else:
            _require_constant(name, value)
    if "forward" not in functions:
        raise ImpureError(f"{kind.__name__} has no forward of its own")
    return functions


def _reads(function: object, own: Collection[str]) -> Iterator[Read]:
    """Yields the globals that a function reads; ``own``: attributes it may ask for besides."""
    if type(function) is not FunctionType or function.__closure__:
        raise ImpureError("it is no plain function")
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        _require_constant("a default", value)
    for step in _steps(function.__code__):
        if step.opname.startswith(_REFUSED):
            raise ImpureError(step.opname)
        if step.opname in _LOADS_ATTRIBUTE and step.argval not in own:
            if step.argval not in _ATTRIBUTES:
                raise ImpureError(f"it uses .{step.argval}")
        elif step.opname in _LOADS_NAME:
            yield _read(function, step.argval)


def _is_conversion(step: dis.Instruction) -> bool:
    return step.opname in _LOADS_ATTRIBUTE and step.argval in _CONVERT


def _require_tensors(method: FunctionType, parts: Collection[str]) -> None:
    """Refuses ``self.double()`` and ``self.part.double()``, also by another name: ``m = self``.

    So the module may only be asked for attributes, and a part of it be called or asked.
    """
    itself = "".join(method.__code__.co_varnames[:1])
    for step, following in pairwise(_steps(method.__code__)):
        is_asked = following.opname in _LOADS_ATTRIBUTE
        loaded = step.argval if type(step.argval) is tuple else (step.argval,)
        if step.opname in _LOADS_ATTRIBUTE:
            is_module = step.argval in parts
            is_used = is_asked or _is_called(step)
        else:  # of two names that are loaded at once, what follows asks the second
            is_module = step.opname.startswith("LOAD_") and itself in loaded
            is_used = is_asked and itself not in loaded[:-1]
        if is_module and (_is_conversion(following) or not is_used):
            raise ImpureError("it may use .double() or the like of a module")


def _is_called(step: dis.Instruction) -> bool:
    """Whether what an attribute gives is called at once."""
    return step.opname == "LOAD_METHOD" or (
        sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)
    )


def _read(function: FunctionType, name: str) -> Read:
    if name in function.__globals__:
        value = function.__globals__[name]
        known = any(value is module for module in _MODULES) or _is_function_of_torch(value)
        if not known:
            _require_constant(name, value)
        return Read(function.__globals__, name, value)
    if name not in _BUILTINS:
        raise ImpureError(f"it uses {name}")
    return Read(vars(builtins), name, getattr(builtins, name))


def _is_function_of_torch(value: object) -> bool:
    name = getattr(value, "__name__", "")
    return name in _FUNCTIONS and any(
        getattr(home, name, None) == value for home in (F, torch, torch.functional)
    )


def _require_constant(name: str, value: object) -> None:
    if not is_constant(value):
        raise ImpureError(f"{name} is {with_article(type(value).__name__)}")


def is_constant(value: object) -> bool:
    """Whether a value cannot change."""
    if type(value) in (tuple, torch.Size):
        return all(map(is_constant, value))  # type: ignore[call-overload]
    return type(value) in _CONSTANTS


def _steps(code: CodeType) -> Iterator[dis.Instruction]:
    """Yields the instructions of a function, and of comprehensions and the like in it."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if type(constant) is type(code):
            yield from _steps(constant)
