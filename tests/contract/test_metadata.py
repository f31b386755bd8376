"""What a pointer says about its tensor is the truth."""

import pytest
import torch

import fedproc as fp
from tests.contract.things import each

TENSORS = {
    "int64 matrix": torch.arange(6).reshape(2, 3),
    "bool": torch.tensor([True, False]),
    "float64": torch.zeros(2, 1, 3, dtype=torch.float64),
    "bfloat16": torch.zeros(4, dtype=torch.bfloat16),
    "empty": torch.empty(0, 5),
    "0-dim": torch.tensor(3.0),
    "leaf": torch.ones(2, requires_grad=True),
    "complex": torch.zeros(2, dtype=torch.complex64),
}


def _truth(t):
    return {
        "shape": t.shape,
        "size": t.size(),
        "dim": t.dim(),
        "ndim": t.ndim,
        "numel": t.numel(),
        "dtype": t.dtype,
        "device": t.device,
        "requires_grad": t.requires_grad,
        "is_leaf": t.is_leaf,
        "len": len(t) if t.dim() else None,
    }


def test_metadata_of_a_sent_tensor(bob):
    def check(local):
        assert _truth(bob.send(local)) == _truth(local)

    assert each(TENSORS, check) == {}


def test_metadata_of_a_result(bob):
    def check(local):
        remote = bob.send(local)
        assert _truth(remote + remote) == _truth(local + local)
        assert _truth(bob.run(torch.Tensor.detach, remote)) == _truth(local.detach())

    assert each(TENSORS, check) == {}


def test_types_of_metadata(bob):
    p = bob.send(torch.zeros(2, 3))
    assert type(p.shape) is torch.Size
    assert p.size(0) == 2
    assert p.size(-1) == 3
    assert p.shape[1] == 3
    assert type(p.numel()) is int


def test_metadata_follows_in_place_changes(bob):
    p = bob.send(torch.zeros(2, 3))
    p.unsqueeze_(0)
    assert p.shape == (1, 2, 3)
    p.requires_grad_()
    assert p.requires_grad is True


def test_metadata_follows_what_a_function_did(bob):
    p = bob.send(torch.zeros(2, 3))
    bob.run(torch.Tensor.t_, p).wait()
    assert p.shape == (3, 2)


def test_len_of_a_number_is_a_type_error(bob):
    with pytest.raises(TypeError):
        len(bob.send(torch.tensor(1.0)))


def test_a_pointer_is_no_tensor(bob, x):
    assert not isinstance(bob.send(x), torch.Tensor)
    assert not isinstance(bob.run(torch.ones, 1), torch.Tensor)


def test_a_misspelt_method_is_an_attribute_error_at_once(bob, x, gate):
    held = bob.run(gate.hold)
    p = bob.send(x)
    q = p + 1
    for handle in (p, q):
        with pytest.raises(AttributeError, match="frobnicate"):
            handle.frobnicate()
        assert not hasattr(handle, "frobnicate")
    assert not held.done()
    gate.open()
    assert torch.equal(p.get(), x)
    held.wait()


def test_metadata_of_a_failed_result_is_its_error(bob, x):
    bad = bob.send(x).view(7)
    with pytest.raises(fp.RemoteError, match="shape"):
        bad.shape  # noqa: B018
