"""item and friends, properties, setters, and what torch or NumPy would swallow."""

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.contract.things import outcome


def test_item_float_int_bool(bob):
    p = bob.send(torch.tensor([2.5]))
    assert p.item() == 2.5
    assert float(p) == 2.5
    assert int(p) == 2
    assert bool(p > 2) is True
    assert bool(p > 3) is False
    assert type(bob.send(torch.tensor(3)).item()) is int
    assert type(bob.send(torch.tensor(True)).item()) is bool
    assert len(bob.objects) == 1


def test_tolist_and_numpy(bob):
    p = bob.send(torch.tensor([[1, 2], [3, 4]], dtype=torch.int16))
    assert p.tolist() == [[1, 2], [3, 4]]
    array = p.numpy()
    assert type(array) is np.ndarray
    assert array.dtype == np.int16
    assert array.tolist() == [[1, 2], [3, 4]]
    assert len(bob.objects) == 1


def test_a_fetched_array_is_private(bob, x):
    p = bob.send(x)
    array = p.numpy()
    array += 5
    assert torch.equal(p.get(), x)


def test_truth_decides_a_branch(bob):
    p = bob.send(torch.tensor(-1.0))
    assert ("positive" if p > 0 else "negative") == "negative"


def test_item_of_many_is_the_remote_error(bob, x):
    p = bob.send(x)
    with pytest.raises(fp.RemoteError) as caught:
        p.item()
    assert isinstance(caught.value, RuntimeError)
    assert torch.equal(p.get(), x)


SWALLOWERS = {
    "torch.tensor": torch.tensor,
    "torch.as_tensor": torch.as_tensor,
    "np.asarray": np.asarray,
    "np.array": np.array,
    "array + p": lambda p: np.ones(3) + p,
    "p + array": lambda p: p + np.ones(3),
    "p * array": lambda p: p * np.ones(3),
    "array < p": lambda p: np.ones(3) < p,
}


def test_what_torch_and_numpy_would_swallow_is_refused(bob, x):
    p = bob.send(x)
    results = {
        name: outcome(lambda swallow=swallow: swallow(p)) for name, swallow in SWALLOWERS.items()
    }
    assert {name for name, r in results.items() if not isinstance(r, fp.PlacementError)} == set()
    assert torch.equal(p.get(), x)


def test_tensor_valued_properties_are_pointers(bob):
    p = bob.send(torch.arange(6.0).reshape(2, 3))
    assert p.T.shape == (3, 2)
    assert p.mT.shape == (3, 2)
    assert p.mT.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    c = bob.send(torch.tensor([1 + 2j]))
    assert (c.real.tolist(), c.imag.tolist()) == ([1.0], [2.0])
    w = bob.send(torch.ones(2, requires_grad=True))
    data = w.data
    assert isinstance(data, fp.TensorPointer)
    assert data.requires_grad is False
    data.sub_(1)
    assert w.tolist() == [0.0, 0.0]


def test_setting_requires_grad_acts_there(bob):
    p = bob.send(torch.ones(2))
    p.requires_grad = True
    assert p.requires_grad is True
    assert bob.run(lambda t: t.requires_grad, p).get() is True
    p.requires_grad = False
    assert p.requires_grad is False


def test_setting_data_acts_there(bob):
    p = bob.send(torch.ones(2, requires_grad=True))
    p.data = bob.send(torch.tensor([5.0, 6.0, 7.0]))
    assert p.tolist() == [5.0, 6.0, 7.0]
    assert p.requires_grad is True
    assert p.shape == (3,)


def test_code_there_cannot_resize_what_was_sent_and_is_told_the_way(bob, x):
    p = bob.send(x)
    with pytest.raises(RuntimeError, match=r"not resizable.* \(pointer\.copy\(\)\)"):
        bob.run(lambda t: t.resize_(100), p).get()
    assert p.tolist() == [1.0, 2.0, 3.0]
    assert bob.run(lambda t: len(t.resize_(100)), p.copy()).get() == 100
    assert p.resize_(100).shape == (100,)


def test_augmented_assignment_to_data_acts_there(bob):
    w = bob.send(torch.ones(2, requires_grad=True))
    w.data -= 0.5
    assert w.tolist() == [0.5, 0.5]


def test_setting_grad_acts_there(bob):
    p = bob.send(torch.ones(2, requires_grad=True))
    p.grad = bob.send(torch.tensor([1.0, 2.0]))
    assert p.grad.tolist() == [1.0, 2.0]
    p.grad = None
    assert p.grad is None
    assert bob.run(lambda t: t.grad is None, p).get() is True


def test_setting_anything_else_is_an_attribute_error(bob, x):
    p = bob.send(x)
    for name in ("shape", "dtype", "anything", "id", "worker", "T"):
        with pytest.raises(AttributeError):
            setattr(p, name, 1)
    assert torch.equal(p.get(), x)


def test_an_error_met_by_a_property_is_no_attribute_error(bob):
    bad = bob.run(lambda: (1).nothing)
    with pytest.raises(fp.RemoteError, match="nothing") as caught:
        bad.shape  # noqa: B018
    assert not isinstance(caught.value, AttributeError)
    with pytest.raises(fp.RemoteError, match="nothing") as caught:
        bad.get()
    assert isinstance(caught.value, AttributeError)
