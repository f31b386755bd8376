"""Odd tensors make the round trip exactly, or are refused with a reason."""

import warnings

import pytest
import torch

import fedproc as fp
from tests.contract.things import each, outcome

# torch warns that CSR is beta and quantised tensors are deprecated: not our subject.
pytestmark = pytest.mark.filterwarnings("ignore")


def _quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.tensor([0.5, 1.0, -0.25]), 0.25, 3, torch.quint8)


def _csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse_csr()


CHANNELS_LAST = torch.channels_last

ORDINARY = {
    "0-dim": lambda: torch.tensor(3.25),
    "0-dim int": lambda: torch.tensor(-7),
    "0-dim bool": lambda: torch.tensor(True),
    "empty": lambda: torch.empty(0),
    "empty matrix": lambda: torch.empty(3, 0, 2),
    "one": lambda: torch.tensor([1.0]),
    "non-contiguous": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "strided": lambda: torch.arange(20)[::3],
    "offset": lambda: torch.arange(20)[5:9],
    "expanded": lambda: torch.tensor([[1.0], [2.0]]).expand(2, 5),
    "expanded 0-dim": lambda: torch.tensor(4).expand(3),
    "channels_last": lambda: (
        torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    ),
    "overlapping": lambda: torch.arange(5.0).as_strided((3, 3), (1, 1)),
    "float64": lambda: torch.tensor([1e-300, 1.0]),
    "float16": lambda: torch.tensor([1.5, 65504.0], dtype=torch.float16),
    "bfloat16": lambda: torch.tensor([1.5, 3e38], dtype=torch.bfloat16),
    "float8": lambda: torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    "bool": lambda: torch.tensor([True, False, True]),
    "uint8": lambda: torch.tensor([0, 255], dtype=torch.uint8),
    "int8": lambda: torch.tensor([-128, 127], dtype=torch.int8),
    "int16": lambda: torch.tensor([-32768], dtype=torch.int16),
    "int32": lambda: torch.tensor([2**31 - 1], dtype=torch.int32),
    "int64": lambda: torch.tensor([2**63 - 1, -(2**63)]),
    "uint16": lambda: torch.tensor([65535], dtype=torch.uint16),
    "complex64": lambda: torch.tensor([1 + 2j, -3j]),
    "complex128": lambda: torch.tensor([1e-300 + 2j], dtype=torch.complex128),
    "conj view": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "neg view": lambda: torch.tensor([1 + 2j]).conj().imag,
    "nan and inf": lambda: torch.tensor([float("nan"), float("inf"), -0.0]),
    "many dimensions": lambda: torch.arange(64.0).reshape([2] * 6),
    "parameter": lambda: torch.nn.Parameter(torch.tensor([1.0])),
}


def _bits(t):
    t = (
        t.detach()
        .resolve_conj()
        .resolve_neg()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
    )
    return t.view(torch.uint8).tolist() if t.numel() else []


def test_the_round_trip_is_exact(bob, alice):
    assert each(ORDINARY, lambda make: _check_round_trip(bob, alice, make)) == {}


def _check_round_trip(bob, alice, make):
    local = make()
    p = bob.send(local)
    for home in (p.fetch(), p.move(alice).fetch(), p.get()):
        assert home.dtype is local.dtype
        assert home.shape == local.shape
        assert home.requires_grad is local.requires_grad
        assert home.layout is local.layout
        assert _bits(home) == _bits(local)


def test_results_are_exact_too(bob):
    assert each(ORDINARY, lambda make: _check_result(bob, make)) == {}


def _check_result(bob, make):
    local = make()
    p = bob.run(lambda: make())
    home = p.fetch()
    assert (home.dtype, home.shape) == (local.dtype, local.shape)
    assert _bits(home) == _bits(local)
    assert p.shape == local.shape


def test_odd_tensors_can_be_borrowed(bob):
    for name in ("0-dim", "empty", "non-contiguous", "expanded", "bfloat16", "bool", "conj view"):
        local = ORDINARY[name]()
        p = bob.send(local)
        with p.borrow() as t:
            assert (t.dtype, t.shape) == (local.dtype, local.shape), name
            assert _bits(t) == _bits(local), name


def test_a_small_slice_of_a_large_tensor_is_small(bob):
    p = bob.send(torch.zeros(1_000_000)[:3])
    assert bob.objects[p.id].nbytes == 12
    assert p.get().untyped_storage().nbytes() <= 4096


SPECIAL = {
    "sparse COO": lambda: torch.tensor([[0.0, 1.5], [2.0, 0.0]]).to_sparse(),
    "uncoalesced COO": lambda: torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,)),
    "sparse CSR": _csr,
    "quantised": _quantised,
    "meta": lambda: torch.empty(2, 3, device="meta"),
}


def _described(t):
    facts = {"dtype": t.dtype, "shape": t.shape, "layout": t.layout, "device": t.device}
    if t.is_quantized:
        return facts | {"ints": t.int_repr().tolist(), "q": (t.q_scale(), t.q_zero_point())}
    if t.layout is torch.sparse_coo:
        parts = t._indices().tolist(), t._values().tolist(), t.is_coalesced()
        return facts | {"parts": parts}
    if t.device.type == "meta":
        return facts
    return facts | {"values": t.to_dense().tolist()}


def test_special_tensors_work_exactly_or_say_why_not(bob):
    assert each(SPECIAL, lambda make: _check_special(bob, make)) == {}


def _check_special(bob, make):
    local, other = make(), bob.send(torch.ones(1))
    p = outcome(lambda: bob.send(local))
    if isinstance(p, Exception):
        assert type(p) is fp.NotShippableError
        assert len(str(p)) > 20
    else:
        assert (p.shape, p.dtype) == (local.shape, local.dtype)
        assert _described(p.fetch()) == _described(local)
        assert _described(p.get()) == _described(local)
    assert other.item() == 1.0
    assert len(bob.objects) == 1


def test_special_results_come_home_or_stay(bob):
    assert each(SPECIAL, lambda make: _check_special_result(bob, make)) == {}


def _check_special_result(bob, make):
    p = bob.run(lambda: make())
    home = outcome(p.get)
    if isinstance(home, Exception):
        assert type(home) is fp.NotShippableError
        assert len(str(home)) > 20
        assert len(bob.objects) == 1
    else:
        assert _described(home) == _described(make())
        assert len(bob.objects) == 0


def _parts(nested):
    return [part.tolist() for part in nested.unbind()]


def _nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.arange(3.0)], layout=torch.strided)


def test_nested_tensors_have_no_shape_and_go_where_others_go(bob, alice):
    p = bob.send(_nested())
    assert _parts(p.fetch()) == [[1.0, 1.0], [0.0, 1.0, 2.0]]
    assert repr(p) == f"<TensorPointer {p.id} on bob>"
    for pointer in (p, bob.run(_nested), bob.run(_nested).move(alice)):
        assert _parts((pointer * 2).fetch()) == [[2.0, 2.0], [0.0, 2.0, 4.0]]
        assert pointer.to_padded_tensor(7.0).tolist() == [[1.0, 1.0, 7.0], [0.0, 1.0, 2.0]]
        assert pointer.worker.objects[pointer.id].shape is None
        assert pointer.worker.objects[pointer.id].nbytes == 20
        with pytest.raises(fp.RemoteError):  # as of torch, where such a tensor has none
            pointer.shape  # noqa: B018
