"""How many results an operation has: every entry of the tables is held against the real thing."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from fedproc.remote import operation_results
from fedproc.remote.operation_results import prefixed, result_type, unknown_count
from fedproc.wire.names import resolve
from tests.remote.test_operations import FUNCTIONS, METHODS, handed_over
from tests.remote.test_operations import Pointer as TorchPointer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(deprecated|non-writable|overwritten):UserWarning", "ignore::FutureWarning"
)

x = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, 0.25], [0.5, 0.25, 2.0]])
v = torch.tensor([3.0, 1.0, 2.0])
image, volume = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 6, 6, 6)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch is about to drop quantized tensors
    q8 = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
lu, pivots = torch.linalg.lu_factor(x)
zeros, whole = torch.zeros(3), torch.arange(3)
rnn = [torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1)]
gru = [torch.ones(3, 1), torch.ones(3, 1), torch.ones(3), torch.ones(3)]
lstm = [torch.ones(4, 1), torch.ones(4, 1), torch.ones(4), torch.ones(4)]
row, start = torch.ones(2, 1, 1), torch.ones(1, 1, 1)
options = (True, 1, 0.0, False, False, False)  # biases, layers, dropout, train, two ways, batch 1st


class Pointer:
    _fedproc_pointer = True

    def __bool__(self):
        raise AssertionError("asking for the truth of a pointer fetches it")


p = Pointer()


def both(word, *args, **kwargs):
    return [(f"torch.{word}", args, kwargs), (f"Tensor.{word}", args, kwargs)]


def function(word, *args, **kwargs):
    return [(f"torch.{word}", args, kwargs)]


STRUCTURES = [
    *both("aminmax", x), *both("cummax", x, 0), *both("cummin", x, dim=0), *both("frexp", x),
    *both("geqrf", x), *both("histogram", x, 4), *both("kthvalue", x, 1), *both("mode", x),
    *both("qr", x), *both("slogdet", x), *both("sort", x), *both("svd", x), *both("topk", x, 1),
    *both("triangular_solve", x, x), *both("svd", x, compute_uv=False),
    *both("sort", x, dim=0, stable=True), *function("lu_unpack", lu, pivots),
    *function("linalg.cholesky_ex", x), *function("linalg.eig", x), *function("linalg.eigh", x),
    *function("linalg.inv_ex", x), *function("linalg.ldl_factor", x),
    *function("linalg.ldl_factor_ex", x), *function("linalg.lstsq", x, x),
    *function("linalg.lu", x), *function("linalg.lu_factor", x),
    *function("linalg.lu_factor_ex", x), *function("linalg.qr", x, mode="r"),
    *function("linalg.slogdet", x), *function("linalg.solve_ex", x, v),
    *function("linalg.svd", x, full_matrices=False),
    *function("lu", x, get_infos=True), *function("lu", x, True, True),
    *[case for word in ("max", "median", "min", "nanmedian") for case in (
        *both(word, x, 0), *both(word, x, dim=1), *both(word, x, 0, True), *both(word, x, axis=0),
    )],
]  # fmt: skip

COUNTED = [
    *both("unique", v, return_inverse=True), *both("unique", v, True, True, True),
    *both("unique", v, return_counts=True), *both("unique", x, True, True, False, 0),
    *both("unique_consecutive", v, True), *both("unique_consecutive", v, True, True),
    *both("lu", x), ("Tensor.lu", (x,), {"get_infos": True}), ("Tensor.lu", (x, True, True), {}),
    *function("std_mean", x), *function("var_mean", x, dim=0), *function("lobpcg", x, 1),
    *function("pca_lowrank", x, 2), *function("svd_lowrank", x, 2),
    *function("adaptive_max_pool1d", x, 2), *function("max_pool1d_with_indices", x, 2),
    *function("native_dropout", x, 0.5, True),
    *function("batch_norm_update_stats", x, None, None, 0.1),
    *function("choose_qparams_optimized", x, 9, 10, 0.1, 8),
    *function("native_batch_norm", x, None, None, None, None, True, 0.1, 1e-5),
    *function("native_layer_norm", x, [3], None, None, 1e-5),
    *function("native_group_norm", image, None, None, 1, 1, 36, 1, 1e-5),
    *function("embedding_bag", x, whole, whole),
    *function("rnn_relu", row, start, rnn, *options),
    *function("rnn_tanh", row, start, rnn, *options), *function("gru", row, start, gru, *options),
    *function("lstm", row, (start, start), lstm, *options),
    *function("lstm_cell", row[0], (row[0], row[0]), *lstm),
    *function("autograd.grad", (xg := x.clone().requires_grad_()).sum(), xg),
    *function("autograd.grad", xg.sum(), [xg]),
    *function("autograd.grad", (xg * xg).sum(), inputs=(xg, xg)),
    *function("autograd.grad", xg.sum(), (xg, v.clone().requires_grad_()),
              allow_unused=True, materialize_grads=True),
    *function("nn.functional.multi_head_attention_forward", row, row, row, 1, 1, torch.ones(3, 1),
              zeros, None, None, False, 0.0, torch.ones(1, 1), torch.zeros(1)),
    *[case for n, data in ((1, x), (2, image), (3, volume)) for case in (
        *function(f"nn.functional.max_pool{n}d_with_indices", data, 2),
        *function(f"nn.functional.max_pool{n}d", data, 2, return_indices=True),
        *function(f"nn.functional.max_pool{n}d", data, 2, None, 0, 1, False, True),
        *function(f"nn.functional.adaptive_max_pool{n}d_with_indices", data, 2),
        *function(f"nn.functional.adaptive_max_pool{n}d", data, 2, return_indices=True),
        *function(f"nn.functional.adaptive_max_pool{n}d", data, 2, True),
    )],
    *[case for n, data in ((2, image), (3, volume)) for case in (
        *function(f"nn.functional.fractional_max_pool{n}d_with_indices", data, 2, 2),
        *function(f"nn.functional.fractional_max_pool{n}d", data, 2, 2, return_indices=True),
        *function(f"nn.functional.fractional_max_pool{n}d", data, 2, 2, None, True),
    )],
]  # fmt: skip

SINGLE = [
    *[case for word in ("max", "median", "min", "nanmedian") for case in both(word, x)],
    *both("max", x, x), *both("min", x, other=x), *both("unique", v), *both("nonzero", x),
    *both("unique", v, True, False, False), *both("unique_consecutive", v), *both("add", x, x),
    *function("where", x > 1, x, x), *function("where", x > 1, x, 0.0),
    *function("nn.functional.max_pool2d", image, 2),
    *function("nn.functional.max_pool2d", image, 2, return_indices=False),
    *function("atleast_1d", x), *function("atleast_2d", x), *function("atleast_3d", x),
    *function("quantize_per_tensor", x, 0.1, 0, torch.qint8),
    *function("dequantize", q8),
]  # fmt: skip

UNKNOWN = [
    *both("chunk", x, 2), *both("tensor_split", x, 2), *both("hsplit", x, 3), *both("vsplit", x, 3),
    *both("dsplit", volume[0, 0], 2), *both("split", x, 2), *both("split_with_sizes", x, [1, 2]),
    *both("unbind", x), *both("unsafe_chunk", x, 2), *both("unsafe_split", x, 2),
    *both("unsafe_split_with_sizes", x, [1, 2]), *both("nonzero", x, as_tuple=True),
    *function("where", x > 1), *function("where", condition=x > 1), *function("gradient", x),
    *function("meshgrid", v, v, indexing="ij"), *function("broadcast_tensors", x, v),
    *function("_C._VariableFunctions.meshgrid", [v, v], indexing="ij"),
    *function("split_copy", x, 2), *function("split_with_sizes_copy", x, [1, 2]),
    *function("unbind_copy", x), *function("unravel_index", whole, (2, 2)),
    *function("histogramdd", x, [2, 2, 2]),
    *function("quantize_per_tensor", [x], v[:1], whole[:1], torch.qint8),
    *function("dequantize", [q8]), *function("dequantize", tensors=[q8]),
    *[case for n in (1, 2, 3) for case in (
        *function(f"atleast_{n}d", v, v), *function(f"atleast_{n}d", [v, v]),
        *function(f"_C._VariableFunctions.atleast_{n}d", [v, v]),
    )],
    *function("autograd.grad", xg.sum(), (xg, v.clone().requires_grad_()), allow_unused=True),
    *function("autograd.grad", xg.sum(), iter([xg])),
    *function("nn.functional.multi_head_attention_forward", row, row, row, 1, 1, torch.ones(3, 1),
              zeros, None, None, False, 0.0, torch.ones(1, 1), torch.zeros(1), need_weights=False),
]  # fmt: skip

# They need a GPU, or weights that were packed by another function.
NOT_RUN = prefixed("torch.", """
    batch_norm_backward_reduce batch_norm_gather_stats batch_norm_gather_stats_with_counts
    batch_norm_stats cudnn_batch_norm fbgemm_linear_quantize_weight miopen_batch_norm
    miopen_ctc_loss miopen_rnn mkldnn_linear_backward_weights mkldnn_rnn_layer quantized_lstm_cell
""")  # fmt: skip


def remote(case):
    """The case as the parent sees it: with pointers in place of tensors."""
    name, args, kwargs = case
    return name, replaced(args), {key: replaced(value) for key, value in kwargs.items()}


def replaced(value):
    if isinstance(value, torch.Tensor):
        return p
    return type(value)(map(replaced, value)) if type(value) in {list, tuple} else value


def takes_out(case):
    return not case[0].startswith("Tensor.") and case[0] not in {"torch.lu_unpack", "torch.lu"}


def title(case):
    name, args, kwargs = case
    return f"{name}-{len(args)}-{'-'.join(kwargs)}"


@pytest.mark.parametrize("case", STRUCTURES, ids=title)
def test_the_class_of_named_tuples_is_known(case):
    name, args, kwargs = case
    known = result_type(*remote(case))
    assert known is type(resolve(name)(*args, **kwargs))
    assert known((p,) * len(known.__match_args__))[0] is p
    assert not unknown_count(*remote(case))


@pytest.mark.parametrize("case", [*filter(takes_out, STRUCTURES)], ids=title)
def test_the_class_with_out_is_known(case):
    name, args, kwargs = case
    func = resolve(name)
    out = tuple(torch.empty_like(part) for part in func(*args, **kwargs))
    kwargs = {**kwargs, "out": out}
    assert result_type(*remote((name, args, kwargs))) is type(func(*args, **kwargs))


@pytest.mark.parametrize("case", COUNTED, ids=title)
def test_the_length_of_plain_tuples_is_known(case):
    name, args, kwargs = case
    result = resolve(name)(*args, **kwargs)
    assert type(result) is tuple
    assert result_type(*remote(case)) == len(result)
    assert all(isinstance(part, torch.Tensor) for part in result)
    assert not unknown_count(*remote(case))


@pytest.mark.parametrize("case", SINGLE, ids=title)
def test_one_tensor(case):
    name, args, kwargs = case
    assert isinstance(resolve(name)(*args, **kwargs), torch.Tensor)
    assert result_type(*remote(case)) is None
    assert not unknown_count(*remote(case))


@pytest.mark.parametrize("case", UNKNOWN, ids=title)
def test_lengths_that_only_the_worker_knows(case):
    name, args, kwargs = case
    assert unknown_count(*remote(case))
    assert result_type(*remote(case)) is None
    assert isinstance(resolve(name)(*args, **kwargs), (tuple, list))


def test_every_entry_of_the_tables_was_tried():
    tables = ("_FIXED", "_RULES", "_UNKNOWN", "_UNKNOWN_IF")
    entries = {name for table in tables for name in getattr(operation_results, table)}
    tried = {name for name, _, _ in STRUCTURES + COUNTED + SINGLE + UNKNOWN}
    assert entries - tried == NOT_RUN
    assert [name for name in entries if not callable(resolve(name))] == []


@pytest.mark.parametrize(("prefix", "stubs"), [("torch.", FUNCTIONS), ("Tensor.", METHODS)])
def test_every_function_of_the_stubs_with_several_results_is_known(prefix, stubs):
    wrong = []
    for word, results in stubs.items():
        structures = [re.fullmatch(r"torch\.return_types\.(\w+)", text) for text in results]
        lengths = {text.count("Tensor") for text in results if re.match(r"tuple\[Tensor, T", text)}
        many = results & {"tuple[Tensor, ...]", "Sequence[Tensor]", "list[Tensor]"}
        name, arguments = prefix + word, ((p,), {})
        fixed = operation_results._FIXED.get(name)
        if len(results) > 1 and (any(structures) or many):
            known = name in {**operation_results._RULES, **operation_results._UNKNOWN_IF}
        elif structures[0]:
            same = fixed is getattr(torch.return_types, structures[0][1])
            known = same or unknown_count(name, *arguments)
        elif lengths and "_int" not in next(iter(results)):
            known = {fixed} == lengths
        else:
            known = not many or unknown_count(name, *arguments)
        wrong += [] if known else [name]
    assert wrong == []


def test_every_named_tuple_of_torch_is_known():
    known = {*operation_results._FIXED.values(), *operation_results._WITH_OUT.values()}
    known |= {result_type(f"torch.{word}", (p, 0), None) for word in ("max", "median", "min")}
    known |= {result_type("torch.nanmedian", (p, 0), None), torch.return_types.histogramdd}
    assert known >= set(torch.return_types.all_return_types)


def test_a_pointer_is_never_a_dimension_or_a_switch():
    for word in ("torch.max", "Tensor.max"):
        assert result_type(word, (p, p), None) is None
        assert result_type(word, (p,), {"other": p}) is None
        assert result_type(word, (p, p), {"out": p}) is None
    assert result_type("torch.unique", (p, p, p, p), None) is None
    assert not unknown_count("torch.nonzero", (p,), {"as_tuple": p})


def test_arguments_as_torch_hands_them_over():
    _, args, kwargs = handed_over(torch.unique, TorchPointer(), True, True)
    assert result_type("torch.unique", args, kwargs) == 2
    _, args, kwargs = handed_over(torch.norm, TorchPointer())
    assert kwargs["out"] is None
    assert result_type("torch.norm", args, kwargs) is None
    _, args, kwargs = handed_over(F.max_pool2d, TorchPointer(), 2)
    assert result_type("torch.nn.functional.max_pool2d", args, kwargs) is None
