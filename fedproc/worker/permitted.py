"""Names that a worker may be told although they are not registered. Runs in the worker."""

import builtins
import functools
import operator
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions

from fedproc.worker import parts

OPERATORS = frozenset(
    """abs add and_ concat contains delitem eq floordiv ge getitem gt iadd iand ifloordiv ilshift
    imatmul imod imul index inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt
    matmul mod mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor""".split()
)
COMPUTING = frozenset(
    """abs all any bool bytes complex dict divmod enumerate float frozenset int len list max min
    pow range reversed round set slice sorted str sum tuple zip""".split()
)
"""Of ``builtins``: they compute, and reach neither files nor names nor attributes."""
FACTORIES = frozenset(
    """arange as_tensor bartlett_window blackman_window broadcast_shapes can_cast empty
    empty_strided eye full get_default_dtype get_num_threads hamming_window hann_window initial_seed
    is_grad_enabled kaiser_window linspace logspace manual_seed normal ones promote_types rand
    rand_like randint randint_like randn randn_like randperm range result_type scalar_tensor
    sparse_coo_tensor tensor tril_indices triu_indices vander zeros""".split()
)
_CALLBACKS_AND_STORAGE = frozenset(
    """__array__ __array_wrap__ __cuda_array_interface__ __deepcopy__ __dlpack__ __reduce__
    __reduce_ex__ __setstate__ __torch_dispatch__ __torch_function__ apply_ autocast data_ptr
    const_data_ptr map2_ map_ module_load register_hook register_post_accumulate_grad_hook
    share_memory_ storage untyped_storage _typed_storage __get_tracing_state""".split()
)
MODULE_METHODS = frozenset(
    """bfloat16 buffers children double eval float forward half load_state_dict modules
    named_buffers named_children named_modules named_parameters parameters requires_grad_
    state_dict to train type zero_grad""".split()
)
OPTIMIZER_METHODS = frozenset(
    "add_param_group get_last_lr load_state_dict state_dict step zero_grad".split()
)
DATA = {
    "builtins": frozenset("bytearray complex frozenset range set slice".split()),
    "collections": frozenset("Counter OrderedDict defaultdict deque".split()),
    "datetime": frozenset("date datetime time timedelta timezone".split()),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "functools": frozenset({"partial"}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy._core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy._core.numeric": frozenset({"_frombuffer"}),
    "numpy.core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy.core.numeric": frozenset({"_frombuffer"}),
    "torch": frozenset({"Size", "device"}),
    "torch.serialization": frozenset({"_get_layout"}),
}
"""What a message may call to make data: module -> names."""
TYPES = frozenset("bool bytes dict float int list str tuple object".split())
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, type(Ellipsis), type(NotImplemented))
OWN = {
    "fedproc.federated.summary": frozenset({"_Counter"}),
    "fedproc.federated.holding": frozenset({"born_rows"}),
    "fedproc.memory.tensors": frozenset({"SparseGrad", "TensorSpec"}),
}
_LOOKING = ("attribute", "call", "copy", "has_gradient", "kind_of", "method", "parameter_names",
            "set_attribute", "state_names", "truth")  # fmt: skip
LOOKING = {f"{parts.__name__}.{name}": getattr(parts, name) for name in _LOOKING}


@functools.cache
def torch_functions() -> frozenset[Any]:
    """Functions of torch, operator and builtins that a restricted worker runs."""
    found: set[Any] = set()
    for functions in get_overridable_functions().values():
        for function in functions:
            owner = getattr(getattr(function, "__self__", None), "__name__", "")
            names = {getattr(function, "__name__", ""), owner}
            if not names & _CALLBACKS_AND_STORAGE and not owner.startswith("_"):
                found.add(function)
    found |= {getattr(torch, name) for name in FACTORIES}
    found |= {getattr(operator, name) for name in OPERATORS}
    found |= {getattr(operator, f"__{name.strip('_')}__", operator.add) for name in OPERATORS}
    found |= {getattr(builtins, name) for name in COMPUTING}
    return frozenset(found | {torch.autograd.backward, torch.autograd.grad, nn.Parameter})
