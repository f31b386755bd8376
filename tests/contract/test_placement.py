"""Nothing is moved silently: every position of a wrong operand is a PlacementError."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fedproc as fp
from tests.contract.things import outcome

# Each takes a pointer and a stranger: a pointer of another worker, or a local tensor.
POSITIONS = {
    "operator": lambda p, s: p + s,
    "operator, other order": lambda p, s: s + p,
    "matmul": lambda p, s: p @ s,
    "matmul, other order": lambda p, s: s @ p,
    "comparison": lambda p, s: p == s,
    "comparison, other order": lambda p, s: s < p,
    "method": lambda p, s: p.add(s),
    "method, other order": lambda p, s: s.add(p),
    "method keyword": lambda p, s: p.add(other=s),
    "in-place method": lambda p, s: p.add_(s),
    "in-place method, other order": lambda p, s: s.add_(p),
    "in-place operator": lambda p, s: p.__iadd__(s),
    "function": lambda p, s: torch.add(p, s),
    "function, other order": lambda p, s: torch.add(s, p),
    "function keyword": lambda p, s: torch.add(p, other=s),
    "out keyword": lambda p, s: torch.add(p, p, out=s),
    "third argument": lambda p, s: torch.addcmul(p, p, s),
    "second argument": lambda p, s: torch.addcmul(p, s, p),
    "functional": lambda p, s: F.mse_loss(p, s),
    "functional, other order": lambda p, s: F.mse_loss(s, p),
    "functional keyword": lambda p, s: F.linear(p, weight=s),
    "list": lambda p, s: torch.cat([p, s]),
    "list, other order": lambda p, s: torch.cat([s, p]),
    "last of a list": lambda p, s: torch.stack([p, p, s]),
    "index": lambda p, s: p[s > 0],
    "index, other order": lambda p, s: s[p > 0],
    "index tuple": lambda p, s: p[(s > 0,)],
    "item assignment": lambda p, s: p.__setitem__(0, s[0]),
    "item assignment, other order": lambda p, s: s.__setitem__(0, p[0]),
    "assignment by index": lambda p, s: p.__setitem__(s > 0, 0.0),
    "run": lambda p, s: p.worker.run(torch.add, p, s),
    "run, other order": lambda p, s: p.worker.run(torch.add, s, p),
    "run keyword": lambda p, s: p.worker.run(torch.add, p, other=s),
    "run, nested": lambda p, s: p.worker.run(torch.stack, [p, s]),
    "run, deep": lambda p, s: p.worker.run(dict, a=p, b={"c": (1, [s])}),
    "gradient": lambda p, s: setattr(p, "grad", s),
    "data": lambda p, s: setattr(p, "data", s),
}


def _refusal(position, p, stranger):
    """The PlacementError's text, or what happened instead."""
    result = outcome(lambda: position(p, stranger))
    return str(result) if isinstance(result, fp.PlacementError) else "no refusal"


def test_a_pointer_of_another_worker_is_refused_in_every_position(bob, alice, x):
    wrong = {}
    for name, position in POSITIONS.items():
        p, stranger = bob.send(x), alice.send(x)
        text = _refusal(position, p, stranger)
        if not all(word in text for word in ("alice", "bob", "move(")):
            wrong[name] = text
        assert torch.equal(p.get(), x), name
        assert torch.equal(stranger.get(), x), name
    assert wrong == {}
    assert (len(bob.objects), len(alice.objects)) == (0, 0)


def test_a_local_tensor_is_refused_in_every_position(bob, x):
    wrong = {}
    for name, position in POSITIONS.items():
        p, local = bob.send(x), x.clone()
        text = _refusal(position, p, local)
        if not all(word in text for word in ("bob", "send(")):
            wrong[name] = text
        assert torch.equal(p.get(), x), name
        assert torch.equal(local, x), name
    assert wrong == {}
    assert len(bob.objects) == 0


def test_a_placement_error_is_a_type_error(bob, x):
    with pytest.raises(TypeError) as caught:
        bob.send(x) + x
    assert type(caught.value) is fp.PlacementError


def test_module_calls_obey_too(bob, alice):
    m = bob.send(nn.Linear(3, 3))
    here, there = torch.ones(1, 3), alice.send(torch.ones(1, 3))
    for stranger in (here, there):
        with pytest.raises(fp.PlacementError):
            m(stranger)
        with pytest.raises(fp.PlacementError):
            m(input=stranger)
    assert m(bob.send(here)).shape == (1, 3)


def test_a_local_module_refuses_a_pointer(bob):
    with pytest.raises(fp.PlacementError, match="bob"):
        nn.Linear(3, 1)(bob.send(torch.ones(1, 3)))


def test_a_module_without_weights_works_on_a_pointer(bob):
    assert nn.ReLU()(bob.send(torch.tensor([-1.0, 2.0]))).get().tolist() == [0.0, 2.0]


def test_running_elsewhere_is_refused(bob, alice, x):
    p = bob.send(x)
    with pytest.raises(fp.PlacementError, match="alice"):
        alice.run(torch.sum, p)


def test_methods_of_objects_obey_too(bob, alice, x):
    box = bob.send([])
    for stranger in (alice.send(x), x):
        with pytest.raises(fp.PlacementError):
            box.append(stranger)
    box.append(bob.send(x)).wait()
    assert len(box) == 1


def test_the_same_worker_mixes_freely(bob, x):
    p, q = bob.send(x), bob.send(x)
    assert torch.equal(torch.cat([p, q]).get(), torch.cat([x, x]))
    assert torch.equal(torch.add(p, other=q).get(), 2 * x)
    assert torch.equal(torch.addcmul(p, p, q).get(), x + x * x)


def test_numbers_shapes_dtypes_and_slices_mix_freely(bob, x):
    p = bob.send(x)
    assert (2 * p - 1.5).get().tolist() == [0.5, 2.5, 4.5]
    assert p.view(torch.Size([3, 1])).shape == (3, 1)
    assert p.to(torch.float64).dtype is torch.float64
    assert p[1:].get().tolist() == [2.0, 3.0]
    assert p[..., None].shape == (3, 1)
    assert p[[0, 2]].get().tolist() == [1.0, 3.0]
    assert torch.full_like(p, 7).get().tolist() == [7.0, 7.0, 7.0]
    assert p.sum(dim=0, keepdim=True).get().tolist() == [6.0]


def test_pointers_of_another_cluster_are_refused(transport, x):
    with (
        fp.Cluster(["bob"], transport=transport) as one,
        fp.Cluster(["bob"], transport="inline") as two,
    ):
        p, q = one["bob"].send(x), two["bob"].send(x)
        for use in (lambda: p + q, lambda: one["bob"].run(torch.add, p, q)):
            with pytest.raises(fp.PlacementError):
                use()
        assert torch.equal(p.get(), x)
        assert torch.equal(q.get(), x)


def test_a_list_of_pointers_becomes_no_local_tensor(bob, x):
    p = bob.send(x)
    for make in (torch.tensor, torch.as_tensor):
        with pytest.raises(fp.PlacementError, match=r"torch\.stack"):
            make([p.sum(), p[0]])
    assert torch.stack([p.sum(), p[0]]).tolist() == [6.0, 1.0]
