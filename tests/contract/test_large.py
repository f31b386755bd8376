"""Large tensors: results are the caller's own, and as ordinary as small ones."""

import gc
import pickle
import weakref

import pytest
import torch

import fedproc as fp
from fedproc.memory import copying, spares

COUNT = copying.SIDE_BY_SIDE_BYTES // 4 + 3


@pytest.fixture
def values():
    return torch.rand(COUNT)


def lives(storage):
    return storage() is not None


def test_results_in_use_are_never_given_again(bob, values):
    p = bob.send(values)
    first = p.fetch()
    first.neg_()
    views = [p.fetch()[5:9], p.fetch().numpy()[5:9], p.fetch().detach().view(-1, 1)[7:9]]
    first_views = [torch.as_tensor(view).clone() for view in views]
    q = bob.run(torch.zeros, COUNT)
    assert all((q.fetch() == 0).all() for _ in range(5))
    assert torch.equal(first, -values)
    for view, then in zip(views, first_views, strict=True):
        assert torch.equal(torch.as_tensor(view), then)


def test_a_dropped_result_is_not_seen_in_the_next(bob, values):
    p, q = bob.send(values), bob.run(torch.ones, COUNT)
    for _ in range(3):
        assert torch.equal(p.fetch(), values)
        assert (q.fetch() == 1).all()
    assert torch.equal(p.get(), values)


def test_a_large_result_can_do_what_any_tensor_can(bob, values):
    p = bob.send(values)
    p.fetch()
    result = p.fetch()
    assert result.untyped_storage().nbytes() == values.nbytes
    assert torch.equal(pickle.loads(pickle.dumps(result)), values)
    result.requires_grad_().sum().backward()
    assert (result.grad == 1).all()
    result = result.detach()
    result.resize_(2 * COUNT)
    assert torch.equal(result[:COUNT], values)
    shared = p.fetch().share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, values)
    del shared, result
    assert not p.fetch().is_shared()


def test_a_model_with_large_parameters_trains_after_it_came_home(bob):
    model = bob.send(torch.nn.Linear(COUNT // 1000, 1000))
    for _ in range(2):
        here = model.fetch()
        optimizer = torch.optim.SGD(here.parameters(), lr=0.1)
        here(torch.ones(1, COUNT // 1000)).sum().backward()
        before = here.weight.detach().clone()
        optimizer.step()
        assert torch.allclose(here.weight, before - 0.1)
        assert torch.equal(model.fetch().weight, before)


def test_a_computed_result_of_any_layout_comes_home_exactly(bob):
    made = torch.arange(2 * COUNT).remainder_(100)
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64, torch.complex64]
    sent = bob.send(made)
    for dtype in dtypes:
        for layout in range(5):
            result = bob.run(changed, sent, dtype, layout)
            expected = changed(made, dtype, layout)
            fetched = result.fetch()
            assert torch.equal(fetched, expected)
            assert fetched.is_contiguous() or fetched.stride() == expected.stride()


def test_memory_that_was_used_before_is_lent_without_a_copy_all_the_same(bob):
    """What a worker computes in such memory moves into its arena when it is lent."""
    p = bob.run(in_memory_used_before, COUNT)
    assert bob.run(resizable, p).get()
    for _ in range(2):
        with p.borrow() as lent:
            assert (lent == 7).all()
    assert not bob.run(resizable, p).get()


def test_it_goes_back_when_nobody_wants_it_and_at_the_end(monkeypatch, values):
    with fp.Cluster(["bob"]) as cluster, fp.Cluster(["carol"]) as other:
        p = cluster["bob"].send(values)
        kept = weakref.ref(p.fetch().untyped_storage())
        cluster._supervisor.hub._upkeep()
        assert lives(kept)
        monkeypatch.setattr(spares, "IDLE_SECONDS", -1.0)
        cluster._supervisor.hub._upkeep()
        assert not lives(kept)
        held = p.fetch()
        kept = weakref.ref(p.fetch().untyped_storage())
        other.close()
        assert lives(kept)
    assert not lives(kept)
    assert torch.equal(held, values)
    kept = weakref.ref(held.untyped_storage())
    del held
    gc.collect()
    assert not lives(kept)


def test_a_worker_keeps_memory_too(bob):
    assert bob.run(keeps).get()


def keeps():
    kept = weakref.ref(copying.fresh(copying.SIDE_BY_SIDE_BYTES).untyped_storage())
    return lives(kept)


def changed(tensor, dtype, layout):
    tensor = tensor.to(dtype)
    if layout == 1:
        return tensor[3 : COUNT + 3]
    if layout == 2:
        tensor = tensor[: COUNT // 12 * 12].view(2, 3, -1, 2)
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == 3:
        return tensor[: COUNT // 2 * 2].view(2, -1).t()
    return tensor[::2] if layout == 4 else tensor


def in_memory_used_before(count):
    return copying.fresh(4 * count).view(torch.float32).fill_(7)


def resizable(tensor):
    return tensor.untyped_storage().resizable()
