"""Names of operations, plain answers, writes: each table is compared with the installed torch."""

import ast
import operator
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import overrides

from fedproc.remote import operations
from fedproc.remote.operations import (
    PLAIN_PROPERTIES,
    REFUSED,
    TENSOR_METHODS,
    TENSOR_PROPERTIES,
    answers_plainly,
    function_name,
    may_write,
)
from fedproc.wire.names import resolve

STUBS = Path(torch.__file__).parent / "_C"


class Pointer:
    """Keeps what torch hands over."""

    _fedproc_pointer = True
    received = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.received = (func, args, kwargs)
        return torch.zeros(1)


def handed_over(call, *args, **kwargs):
    """What ``__torch_function__`` receives when ``call`` is given pointers."""
    Pointer.received = None
    call(*args, **kwargs)
    return Pointer.received


p = Pointer()


# ---------------------------------------------------------------- names


def overridable():
    return {f for functions in overrides.get_overridable_functions().values() for f in functions}


def is_same(found, func):
    return found is func or (type(found) is type(func) and found == func)


def test_every_function_that_torch_hands_over_has_a_name_that_leads_back():
    functions = overridable() | set(overrides.get_testing_overrides())
    assert len(functions) > 1330
    lost = [f for f in functions if not is_same(resolve(function_name(f) or "len"), f)]
    assert lost == []


def test_different_functions_have_different_names():
    names = [function_name(f) for f in overridable()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("call", "args", "name"),
    [
        (torch.add, (p, p), "torch.add"),
        (torch.unique, (p,), "torch.unique"),
        (torch.norm, (p,), "torch.norm"),
        (torch.stack, ([p, p],), "torch.stack"),
        (torch.linalg.svd, (p,), "torch.linalg.svd"),
        (torch.fft.rfft, (p,), "torch.fft.rfft"),
        (torch.special.erf, (p,), "torch.special.erf"),
        (torch.sparse.sum, (p,), "torch._sparse_sum"),
        (torch.segment_reduce, (p, "max"), "torch.segment_reduce"),
        (torch.autograd.grad, (p, [p]), "torch.autograd.grad"),
        (torch.autograd.backward, (p,), "torch.autograd.backward"),
        (torch.nn.init.normal_, (p,), "torch.nn.init.normal_"),
        (F.relu, (p,), "torch.nn.functional.relu"),
        (F.linear, (p, p), "torch.nn.functional.linear"),
        (F.max_pool2d, (p, 2), "torch.nn.functional.max_pool2d"),
        (operator.add, (torch.ones(1), p), "Tensor.add"),
        (operator.getitem, (torch.ones(1), p), "Tensor.__getitem__"),
        # Given a list, the Python function shows the builtin below it.
        (torch.meshgrid, ([p, p],), "torch._C._VariableFunctions.meshgrid"),
        (torch.nn.utils.rnn.pad_sequence, ([p, p],), "torch._C._nn.pad_sequence"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.segment_reduce")
def test_functions_as_they_are_handed_over(call, args, name):
    func, _, _ = handed_over(call, *args)
    assert function_name(func) == name
    assert is_same(resolve(name), func)


def test_operators_methods_and_properties():
    assert function_name(operator.add) == "operator.add"
    assert function_name(operator.setitem) == "operator.setitem"
    assert function_name(torch.Tensor.add_) == "Tensor.add_"
    assert function_name(torch.Tensor.split) == "Tensor.split"
    assert function_name(torch.Tensor.shape.__get__) == "Tensor.shape.__get__"
    assert resolve("Tensor.shape.__get__")(torch.ones(2, 3)) == (2, 3)
    assert resolve("operator.add") is operator.add
    assert resolve("Tensor.add_") is torch.Tensor.add_


def test_functions_of_others_have_no_name():
    class Unhashable:
        __hash__ = None

        def __call__(self):
            pass

    for func in (len, lambda x: x, function_name, Unhashable()):
        assert function_name(func) is None
    assert all(func not in operations._known_names for func in (len, function_name))


@pytest.mark.parametrize("name", ["torch.ad", "Tensor.nope", "no_module.add", "", "torch.", "a..b"])
def test_names_of_nothing(name):
    with pytest.raises(AttributeError, match="no function is named"):
        resolve(name)


def test_names_of_what_is_not_a_function():
    with pytest.raises(TypeError, match=r"'torch.float32' is not a function but dtype"):
        resolve("torch.float32")


def test_resolving_imports_what_is_needed_and_nothing_before():
    code = (
        "import sys; from fedproc.wire.names import resolve; assert 'torch' not in sys.modules;"
        "assert resolve('xml.dom.minidom.parseString')('<a/>').firstChild.tagName == 'a'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# ---------------------------------------------------------------- tables against the stubs


def annotations(path, owner=None):
    """Result annotations of each function, ``:type`` of each attribute, from a stub file."""
    body = ast.parse((STUBS / path).read_text(encoding="utf-8")).body
    if owner:
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == owner).body
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.returns:
            found.setdefault(node.name, set()).add(ast.unparse(node.returns))
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = {":" + ast.unparse(node.annotation)}
    public = {n: r for n, r in found.items() if not n.startswith("_") or n.endswith("__")}
    return {n: r for n, r in public.items() if hasattr(torch.Tensor if owner else torch, n)}


METHODS = annotations("__init__.pyi", "TensorBase")
FUNCTIONS = annotations("_VariableFunctions.pyi")
NUMBERS = {"_bool", "_int", "_float", "_complex", "Number", "_int | SymInt", "list"}
PLAIN = NUMBERS | {"str", "Size", "_dtype", "_device", "_layout", "_qscheme", "tuple[_int, ...]"}


def test_plain_answers_are_those_of_the_stubs():
    derived = {f"Tensor.{name}" for name, results in METHODS.items() if results <= PLAIN}
    derived |= {f"torch.{name}" for name, results in FUNCTIONS.items() if results <= PLAIN}
    # Written in Python, without annotations, or not of torch at all.
    unannotated = {"Tensor.__len__", "Tensor.const_data_ptr", "Tensor.dim_order"}
    unannotated |= {"Tensor.is_shared", "torch.broadcast_shapes", "torch.get_device"}
    unannotated |= {f"operator.{name}" for name in ("contains", "index", "not_", "truth")}
    getters = {f"Tensor.{name}.__get__" for name in PLAIN_PROPERTIES}
    known = operations._PLAIN
    assert known == derived | unannotated | getters


def test_plain_answers_can_be_resolved():
    assert [name for name in operations._PLAIN if not callable(resolve(name))] == []


def test_type_is_plain_only_when_it_is_a_question():
    assert answers_plainly("Tensor.type", (p,), None)
    assert answers_plainly("Tensor.type", (p,), {"dtype": None})
    assert not answers_plainly("Tensor.type", (p, torch.float64), {})
    assert not answers_plainly("Tensor.type", (p,), {"dtype": torch.float64})


def test_operations_that_give_tensors_are_not_plain():
    for name in ("torch.add", "Tensor.eq", "operator.eq", "Tensor.sum", "Tensor.T.__get__"):
        assert not answers_plainly(name, (p, p), {})


# ---------------------------------------------------------------- attributes of tensors


def test_every_attribute_of_tensors_is_known():
    names = {n for n in dir(torch.Tensor) if not n.startswith("_")} - TENSOR_METHODS
    assert names == TENSOR_PROPERTIES | PLAIN_PROPERTIES | {"grad_fn"}
    assert not TENSOR_PROPERTIES & PLAIN_PROPERTIES


def test_attributes_have_the_values_that_the_tables_say():
    tensor = torch.ones(2, 2, dtype=torch.complex64)
    tensor.grad = torch.ones_like(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # volatile
        of = {n: getattr(tensor, n) for n in TENSOR_PROPERTIES | PLAIN_PROPERTIES}
    assert {n for n, value in of.items() if isinstance(value, torch.Tensor)} == TENSOR_PROPERTIES
    plain = (bool, int, str, torch.Size, torch.dtype, torch.device, torch.layout, type(None))
    assert {n for n, value in of.items() if isinstance(value, plain)} == PLAIN_PROPERTIES


def test_methods_are_callable_and_public():
    assert {"add", "add_", "backward", "max", "view_as"} <= TENSOR_METHODS
    assert not TENSOR_METHODS & (TENSOR_PROPERTIES | PLAIN_PROPERTIES)


def test_what_is_refused_exists_and_says_why():
    assert all(hasattr(torch.Tensor, name) for name in set(REFUSED) - {"__cuda_array_interface__"})
    assert all(": " in why for why in REFUSED.values())


# ---------------------------------------------------------------- what writes


@pytest.mark.parametrize(
    "name",
    ["Tensor.add_", "torch.relu_", "operator.iadd", "operator.setitem", "operator.delitem",
     "Tensor.__setitem__", "Tensor.__iadd__", "Tensor.backward", "torch.autograd.backward",
     "Tensor.set_", "Tensor.resize_", "Tensor.requires_grad_", "Tensor.retain_grad",
     "Tensor.grad.__set__", "Tensor.grad.__delete__", "torch.nn.init.normal_",
     "torch.nn.functional.batch_norm", "torch.nn.functional.instance_norm"],
)  # fmt: skip
def test_writers(name):
    assert may_write(name, None)
    assert callable(resolve(name))


@pytest.mark.parametrize(
    "name",
    ["torch.add", "operator.add", "operator.invert", "operator.index", "Tensor.__invert__",
     "Tensor.__getitem__", "Tensor.__len__", "Tensor.shape.__get__", "Tensor.clone",
     "torch.nn.functional.relu"],
)  # fmt: skip
def test_readers(name):
    assert not may_write(name, None)
    assert not may_write(name, {"inplace": False, "out": None, "max_norm": None})


def test_every_operator_that_assigns_writes():
    assigning = {n for n in dir(operator) if n.startswith("i") and hasattr(operator, f"__{n}__")}
    assigning -= {"index", "inv", "invert"}
    assert len(assigning) == 14
    assert [name for name in assigning if not may_write(f"operator.{name}", {})] == []


def test_arguments_that_make_a_writer():
    assert may_write("torch.add", {"out": p})
    assert may_write("torch.max", {"out": (p, p), "dim": 0})
    assert may_write("torch.nn.functional.relu", {"inplace": True})
    assert may_write("torch.nn.functional.embedding", {"max_norm": 1.0})


@pytest.mark.parametrize(
    "function", ["relu", "relu6", "hardsigmoid", "hardswish", "mish", "selu", "silu"]
)
def test_torch_hands_inplace_over_by_keyword(function):
    func, _, kwargs = handed_over(getattr(F, function), p, True)
    assert may_write(function_name(func), kwargs)
    func, _, kwargs = handed_over(getattr(F, function), p, False)
    assert not may_write(function_name(func), kwargs)


def test_what_the_schemas_of_torch_say_to_write_is_known():
    written = set()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        for argument in schema.arguments:
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if namespace == "aten" and changed and not argument.is_out:
                written.add(name)
    named = {f"torch.{n}" for n in written if hasattr(torch, n)}
    named |= {f"Tensor.{n}" for n in written if hasattr(torch.Tensor, n)}
    # Generators, and the list method of TorchScript.
    named -= {"torch.manual_seed", "torch.seed", "torch.sort", "Tensor.sort"}
    assert len(named) > 300
    assert sorted(name for name in named if not may_write(name, {})) == []
