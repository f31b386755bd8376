"""How many results a torch operation has, as far as that is known before it runs.

Runs in the parent, for every operation on a pointer: ``torch.sort(p)`` gives a named tuple of two
pointers at once, ``torch.split(p, 2)`` has to ask. Names are those of ``operations``, and ``args``
of a method begin with the tensor itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

Args = tuple[Any, ...]
KwArgs = Mapping[str, Any] | None
Result = type | int | None


def prefixed(prefix: str, words: str) -> frozenset[str]:
    """``prefix`` before each of the words."""
    return frozenset(prefix + word for word in words.split())


def is_pointer(value: object) -> bool:
    """Whether ``value`` is a pointer. Asks the class, so that nothing is fetched."""
    return getattr(type(value), "_fedproc_pointer", False) is True


def argument(args: Args, kwargs: KwArgs, place: int, key: str, default: object = None) -> Any:
    """An argument that may be given by place or by keyword."""
    if len(args) > place:
        return args[place]
    return kwargs.get(key, default) if kwargs else default


# ---------------------------------------------------------------- known in advance

_STRUCTURES = (
    "aminmax cummax cummin frexp geqrf histogram kthvalue mode qr slogdet sort svd topk "
    "triangular_solve"
)
_LINALG = (
    "cholesky_ex eig eigh inv_ex ldl_factor ldl_factor_ex lstsq lu lu_factor lu_factor_ex qr "
    "slogdet solve_ex svd"
)
_BY_DIM = ("max", "median", "min", "nanmedian")
_ATTENTION = "torch.nn.functional.multi_head_attention_forward"
# Name, place of return_indices among the arguments, dimensions.
_POOLS = (
    ("max_pool", 6, (1, 2, 3)),
    ("adaptive_max_pool", 2, (1, 2, 3)),
    ("fractional_max_pool", 4, (2, 3)),
)
_COUNTS = {
    2: """adaptive_max_pool1d batch_norm_gather_stats batch_norm_gather_stats_with_counts
        batch_norm_stats batch_norm_update_stats choose_qparams_optimized gru lobpcg lstm_cell
        max_pool1d_with_indices miopen_ctc_loss mkldnn_linear_backward_weights native_dropout
        quantized_lstm_cell rnn_relu rnn_tanh std_mean var_mean""",
    3: """lstm miopen_batch_norm native_batch_norm native_group_norm native_layer_norm pca_lowrank
        svd_lowrank""",
    4: "batch_norm_backward_reduce cudnn_batch_norm embedding_bag mkldnn_rnn_layer",
    5: "miopen_rnn",
}


def _class(name: str) -> type[Any]:
    found: type[Any] = getattr(torch.return_types, name)
    return found


_FIXED: dict[str, type | int] = {
    **{
        f"{owner}.{word}": _class(word)
        for word in _STRUCTURES.split()
        for owner in ("torch", "Tensor")
    },
    **{f"torch.linalg.{word}": _class(f"linalg_{word}") for word in _LINALG.split()},
    "torch.lu_unpack": torch.return_types.lu_unpack,
    **{f"torch.{word}": count for count, words in _COUNTS.items() for word in words.split()},
    **{f"torch.nn.functional.{pool}{n}d_with_indices": 2 for pool, _, dims in _POOLS for n in dims},
}

# With out= the classes are others, of the same fields.
_WITH_OUT: dict[Result, type] = {
    _class(name.removesuffix("_out")): _class(name)
    for name in torch.return_types.__all__
    if name.endswith("_out")
}


def result_type(name: str, args: Args, kwargs: KwArgs) -> Result:
    """How many results an operation has, where that is known in advance.

    Returns:
        The class of the named tuple (of ``torch.return_types``), or the length of a plain tuple,
        or None: it is one tensor, or ``unknown_count`` is true.
    """
    found: Result = _FIXED.get(name)
    if found is None:
        rule = _RULES.get(name)
        if rule is None:
            return None
        found = rule(args, kwargs)
    if kwargs and kwargs.get("out") is not None:
        return _WITH_OUT.get(found, found)
    return found


def _flag(args: Args, kwargs: KwArgs, place: int, key: str, default: bool = False) -> bool:
    """A switch such as ``return_indices``. A pointer is none, and its truth is not asked for."""
    value = argument(args, kwargs, place, key, default)
    return not is_pointer(value) and bool(value)


def _by_dim(structure: type[Any]) -> Callable[[Args, KwArgs], Result]:
    def rule(args: Args, kwargs: KwArgs) -> Result:
        # NumPy's word for dim is understood by torch, too.
        dim = argument(args, kwargs, 1, "dim") if not (kwargs and "axis" in kwargs) else 0
        return None if dim is None or is_pointer(dim) else structure

    return rule


def _one_more_for_each(at_least: int, *flags: tuple[int, str]) -> Callable[[Args, KwArgs], Result]:
    def rule(args: Args, kwargs: KwArgs) -> Result:
        count = at_least + sum(_flag(args, kwargs, place, key) for place, key in flags)
        return count if count > 1 else None

    return rule


def _factors(args: Args, kwargs: KwArgs) -> Result:
    return _class("_lu_with_info") if _flag(args, kwargs, 2, "get_infos") else 2


def _attention(args: Args, kwargs: KwArgs) -> Result:
    # Without weights the second result is None, so that not even the kind is sure.
    return 2 if _flag(args, kwargs, 15, "need_weights", default=True) else None


def _gradients(args: Args, kwargs: KwArgs) -> Result:
    filled = _flag(args, kwargs, 8, "materialize_grads")
    if _flag(args, kwargs, 6, "allow_unused") and not filled:
        return None  # gradients of unused inputs are None
    inputs = argument(args, kwargs, 1, "inputs")
    if isinstance(inputs, (list, tuple)):
        return len(inputs)
    return 1 if is_pointer(inputs) else None


_UNIQUE = _one_more_for_each(1, (2, "return_inverse"), (3, "return_counts"))
_UNIQUE_CONSECUTIVE = _one_more_for_each(1, (1, "return_inverse"), (2, "return_counts"))
_RULES: dict[str, Callable[[Args, KwArgs], Result]] = {
    **{
        f"{owner}.{word}": _by_dim(_class(word))
        for word in _BY_DIM
        for owner in ("torch", "Tensor")
    },
    **{
        f"torch.nn.functional.{pool}{n}d": _one_more_for_each(1, (place, "return_indices"))
        for pool, place, dims in _POOLS
        for n in dims
    },
    **{f"{owner}.unique": _UNIQUE for owner in ("torch", "Tensor")},
    **{f"{owner}.unique_consecutive": _UNIQUE_CONSECUTIVE for owner in ("torch", "Tensor")},
    "torch.lu": _factors,
    "Tensor.lu": _one_more_for_each(2, (2, "get_infos")),
    _ATTENTION: _attention,
    "torch.autograd.grad": _gradients,
}


# ---------------------------------------------------------------- known to the worker only

_SPLITS = (
    "chunk dsplit hsplit split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split "
    "unsafe_split_with_sizes vsplit"
)
_UNKNOWN = (
    prefixed("Tensor.", _SPLITS)
    | prefixed("torch.", _SPLITS)
    | prefixed("torch.", """
        broadcast_tensors fbgemm_linear_quantize_weight gradient histogramdd meshgrid split_copy
        split_with_sizes_copy unbind_copy unravel_index
    """)
    | {"torch._C._VariableFunctions.meshgrid"}
)  # fmt: skip


def unknown_count(name: str, args: Args, kwargs: KwArgs) -> bool:
    """Whether the result is a tuple or list of which only the worker can tell the length."""
    if name in _UNKNOWN:
        return True
    rule = _UNKNOWN_IF.get(name)
    return rule is not None and rule(args, kwargs)


def _given_many(args: Args, kwargs: KwArgs) -> bool:
    return len(args) > 1 or _given_list(args, kwargs)


def _given_list(args: Args, kwargs: KwArgs) -> bool:
    return isinstance(args[0] if args else (kwargs or {}).get("tensors"), (list, tuple))


def _only_a_condition(args: Args, kwargs: KwArgs) -> bool:
    return len(args) + len(kwargs or ()) == 1


def _as_tuple(args: Args, kwargs: KwArgs) -> bool:
    return _flag(args, kwargs, 1, "as_tuple")


_UNKNOWN_IF: dict[str, Callable[[Args, KwArgs], bool]] = {
    **{
        f"{owner}.atleast_{n}d": _given_many
        for n in (1, 2, 3)
        for owner in ("torch", "torch._C._VariableFunctions")
    },
    "torch.dequantize": _given_list,
    "torch.quantize_per_tensor": _given_list,
    "torch.nonzero": _as_tuple,
    "Tensor.nonzero": _as_tuple,
    "torch.where": _only_a_condition,
    "torch.autograd.grad": lambda args, kwargs: _gradients(args, kwargs) is None,
    _ATTENTION: lambda args, kwargs: _attention(args, kwargs) is None,
}


def always_one(name: str) -> bool:
    """Whether an operation gives one tensor whatever its arguments are."""
    return not any(name in table for table in (_FIXED, _RULES, _UNKNOWN, _UNKNOWN_IF))
