"""Messages about misplaced operands name worker, pointer and the operation as a user writes it."""

import operator

import numpy as np
import pytest
import torch
from torch.nn import functional

import fedproc as fp

MIXES = {
    "array right": lambda p, array: p + array,
    "array left": lambda p, array: array + p,
    "in place": lambda p, array: p.__iadd__(array),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_numpy_array_beside_a_pointer(cluster, bob, x, name):
    p = bob.send(x)
    before = cluster.messages
    with pytest.raises(fp.PlacementError) as caught:
        MIXES[name](p, np.ones((2, 3), dtype=np.float32))
    shown = "operator.iadd" if name == "in place" else "+"
    assert str(caught.value) == (
        f"{shown}: {p!r} is on worker 'bob', but a local NumPy array of shape (2, 3) is in this "
        "process. Nothing was moved. Send it first: "
        "cluster['bob'].send(torch.from_numpy(array)); or bring the other home: pointer.get()."
    )
    assert cluster.messages == before
    assert p.get().tolist() == [1.0, 2.0, 3.0]


def test_an_array_in_a_list_beside_pointers_of_two_workers(bob, alice, x):
    p, q = bob.send(x), alice.send(x)
    with pytest.raises(fp.PlacementError, match=r"'bob', but a local NumPy array of shape \(1,\)"):
        p.index_put([np.zeros(1)], p)
    with pytest.raises(fp.PlacementError, match=r"'alice'.*'bob'"):
        p.index_put([np.zeros(1), q], p)


def divide(a, b):
    return a / b


FUNCTIONS = {
    "torch.add": torch.add,
    "torch.linalg.vecdot": torch.linalg.vecdot,
    "torch.nn.functional.mse_loss": functional.mse_loss,
    "Tensor.add": torch.Tensor.add,
    "operator.add": operator.add,
    "max": max,
    "Linear": torch.nn.Linear,
    "divide": divide,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_run_names_the_function_as_it_is_written(bob, alice, x, name):
    p, q = bob.send(x), alice.send(x)
    for _ in range(2):  # the second time its name is remembered
        with pytest.raises(fp.PlacementError) as caught:
            bob.run(FUNCTIONS[name], p, q)
        assert str(caught.value).partition(":")[0] == name
        with pytest.raises(fp.PlacementError) as caught:
            bob.run(FUNCTIONS[name], p, torch.ones(3))
        assert str(caught.value).partition(":")[0] == name
