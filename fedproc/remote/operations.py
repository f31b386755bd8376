"""What is known of a torch operation before it runs: its name, what it gives back, what it writes.

Runs in the parent, for every operation on a pointer. An operation is named by a dotted string:
``"operator.add"``, ``"Tensor.add_"``, ``"torch.linalg.svd"``; ``function_name`` gives the name of
a callable and ``fedproc.wire.names.resolve`` finds it again in the worker. ``args`` of a method
begin with the tensor itself. The tables come from the type stubs of torch; a test derives them
again from the installed ones, so that a new torch shows what is missing here.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import resolve_name

from fedproc.remote.operation_results import (
    Args,
    KwArgs,
    always_one,
    argument,
    is_pointer,
    prefixed,
    result_type,
    unknown_count,
)
from fedproc.wire.names import resolve

__all__ = [
    "PLAIN_PROPERTIES",
    "REFUSED",
    "TENSOR_METHODS",
    "TENSOR_PROPERTIES",
    "answers_plainly",
    "function_name",
    "gives_one_tensor",
    "is_pointer",
    "may_write",
    "result_type",
    "unknown_count",
]


# ---------------------------------------------------------------- names

# Filled as functions are met, and holding only functions of torch and operator, which live as
# long as the process. Two threads may find the same name twice: they write the same entry.
_KNOWN_MODULES = frozenset({"torch", "operator", "_operator"})
_known_names: dict[Callable[..., Any], str] = {}


def function_name(func: Callable[..., Any]) -> str | None:
    """The dotted name of what ``__torch_function__`` receives, or of an operator.

    Args:
        func: A function of torch or of ``operator``, a method or property getter of Tensor.

    Returns:
        A name for which ``resolve`` gives this very function, here and in a worker, or None.
    """
    try:
        name = _known_names.get(func)
    except TypeError:  # unhashable: made by a user, so it has no name
        return None
    if name is None:
        name = _find_name(func)
        if name is not None:
            _known_names[func] = name
    return name


def _find_name(func: Callable[..., Any]) -> str | None:
    """The first candidate that leads back to ``func``."""
    module = getattr(func, "__module__", None)
    if isinstance(module, str) and module.partition(".")[0] not in _KNOWN_MODULES:
        return None  # a user's: torch's own search is slow, and changes the warning filters
    own = getattr(func, "__name__", None)
    candidates = [resolve_name(func)]
    if module in {"_operator", "operator"}:
        candidates = [f"operator.{own}"]
    elif isinstance(module, str) and module.partition(".")[0] == "torch":
        qualified = f"{module}.{getattr(func, '__qualname__', own)}"
        # torch.overrides leaves some out; given a list, meshgrid shows the builtin below it
        candidates += [f"torch.{own}", f"torch._C._VariableFunctions.{own}", qualified]
    for candidate in candidates:
        name = _shortest(candidate) if candidate else None
        if name and _leads_to(name, func):
            return name
    return None


def _shortest(name: str) -> str:
    """``torch.Tensor.add`` is written ``Tensor.add``, ``torch.functional.norm`` ``torch.norm``."""
    if name.startswith("torch.functional."):
        return "torch." + name.removeprefix("torch.functional.")
    return name.removeprefix("torch.") if name.startswith("torch.Tensor.") else name


def _leads_to(name: str, func: Callable[..., Any]) -> bool:
    try:
        found = resolve(name)
    except (AttributeError, TypeError):
        return False
    # Getters and builtins are made anew by each access: equal, but not the same object.
    return found is func or (type(found) is type(func) and found == func)


# ---------------------------------------------------------------- attributes of tensors

TENSOR_PROPERTIES = frozenset({"H", "T", "data", "grad", "imag", "mH", "mT", "real"})
"""Attributes of a tensor whose value is a tensor (``grad``: or None)."""

PLAIN_PROPERTIES = prefixed("", """
    device dtype grad_dtype is_cpu is_cuda is_ipu is_leaf is_maia is_meta is_mkldnn is_mps is_mtia
    is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize layout name
    nbytes ndim output_nr requires_grad retains_grad shape volatile
""")  # fmt: skip
"""Attributes of a tensor whose value is a number, string, shape, dtype, device or the like."""

TENSOR_METHODS = frozenset(
    name
    for name in dir(torch.Tensor)
    if not name.startswith("_") and callable(getattr(torch.Tensor, name))
)
"""Public methods of ``torch.Tensor``, those in ``REFUSED`` included."""

_HOOKS = "the hook would run in the worker: run a function there that registers it (worker.run)"
_STORAGE = "a storage belongs to one process: use borrow() for its memory, fetch() for a copy"
_CAPSULE = "a capsule points into one process: use borrow() or fetch() and export that"
REFUSED = {
    "__cuda_array_interface__": _CAPSULE,
    "__dlpack__": _CAPSULE,
    "__dlpack_device__": _CAPSULE,
    "grad_fn": "a node of the autograd graph belongs to one process: ask is_leaf or requires_grad",
    "register_hook": _HOOKS,
    "register_post_accumulate_grad_hook": _HOOKS,
    "share_memory_": "workers keep their tensors in shared memory already: use borrow()",
    "storage": _STORAGE,
    "untyped_storage": _STORAGE,
}
"""Names of Tensor that cannot work across processes, each with what to say about it."""


# ---------------------------------------------------------------- plain answers

_PLAIN = (
    prefixed("Tensor.", """
        __bool__ __complex__ __contains__ __float__ __index__ __int__ __len__ __long__ __nonzero__
        allclose const_data_ptr data_ptr dense_dim dim dim_order element_size equal get_device
        is_coalesced is_complex is_conj is_contiguous is_distributed is_floating_point
        is_inference is_neg is_nonzero is_pinned is_same_size is_set_to is_shared is_signed item
        ndimension nelement numel q_per_channel_axis q_scale q_zero_point qscheme size sparse_dim
        storage_offset stride tolist
    """)
    | prefixed("torch.", """
        allclose broadcast_shapes can_cast cudnn_is_acceptable equal get_default_dtype get_device
        get_num_interop_threads get_num_threads is_complex is_conj is_distributed
        is_floating_point is_grad_enabled is_inference is_inference_mode_enabled is_neg is_nonzero
        is_same_size is_signed is_vulkan_available numel promote_types q_per_channel_axis q_scale
        q_zero_point result_type set_flush_denormal
    """)
    | prefixed("operator.", "contains index not_ truth")
    | {f"Tensor.{name}.__get__" for name in PLAIN_PROPERTIES}
)  # fmt: skip


def answers_plainly(name: str, args: Args, kwargs: KwArgs) -> bool:
    """Whether the result is a bool, number, string, shape, dtype ... that is fetched at once."""
    return name in _PLAIN or (name == "Tensor.type" and argument(args, kwargs, 1, "dtype") is None)


# ---------------------------------------------------------------- what writes

_WRITERS = (
    prefixed("operator.", """
        delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub
        itruediv ixor setitem
    """)
    | prefixed("Tensor.", """
        __delitem__ __iadd__ __iand__ __idiv__ __ifloordiv__ __ilshift__ __imod__ __imul__ __ior__
        __ipow__ __irshift__ __isub__ __itruediv__ __ixor__ __setitem__ __setstate__ backward
        record_stream retain_grad
    """)
    | prefixed("torch.", """
        _cummax_helper _cummin_helper _flash_attention_forward_no_dropout_inplace
        _fused_moving_avg_obs_fq_helper _native_batch_norm_legit autograd.backward batch_norm
        batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_update_stats
        cudnn_batch_norm fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation
        fused_moving_avg_obs_fake_quant instance_norm miopen_batch_norm native_batch_norm
        nn.functional.batch_norm nn.functional.instance_norm
    """)
)  # fmt: skip


def may_write(name: str, kwargs: KwArgs) -> bool:
    """Whether an operation can change a tensor that exists already.

    Args:
        name: The operation.
        kwargs: As ``__torch_function__`` receives them: torch passes ``inplace`` and ``max_norm``
            on by keyword, also where the user gave them by place.

    Returns:
        True also in doubt: batch normalisation writes its statistics only in training.
    """
    if _writes_always(name):
        return True
    if not kwargs:
        return False
    inplace = kwargs.get("inplace")
    return (
        (inplace is not None and inplace is not False)  # by identity: it might be a pointer
        or kwargs.get("out") is not None
        or kwargs.get("max_norm") is not None  # embeddings are renormalised in place
    )


@cache
def gives_one_tensor(name: str) -> bool:
    """Whether an operation without keywords writes nothing and gives one tensor, always."""
    return not (name in _PLAIN or name == "Tensor.type" or _writes_always(name)) and (
        always_one(name)
    )


@cache
def _writes_always(name: str) -> bool:
    last = name.rpartition(".")[2]
    in_place = last.endswith("_") and not last.endswith("__")
    return in_place or name in _WRITERS or last in {"__set__", "__delete__"}
