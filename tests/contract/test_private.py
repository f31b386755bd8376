"""Private objects: usable where they are, never leaving."""

import functools
import operator
import traceback

import numpy as np
import pytest
import torch
from torch import nn

import fedproc as fp
from tests.contract.things import Counter, explode, outcome

SECRET = 43210.5


@pytest.fixture
def p(bob):
    return bob.send(torch.tensor([SECRET]), private=True)


WAYS_OUT = {
    "get": lambda p, alice: p.get(),
    "fetch": lambda p, alice: p.fetch(),
    "borrow": lambda p, alice: p.borrow().__enter__(),
    "item": lambda p, alice: p.item(),
    "float": lambda p, alice: float(p),
    "int": lambda p, alice: int(p),
    "bool": lambda p, alice: bool(p > 0),
    "tolist": lambda p, alice: p.tolist(),
    "numpy": lambda p, alice: p.numpy(),
    "equal": lambda p, alice: torch.equal(p, p),
    "allclose": lambda p, alice: torch.allclose(p, p),
    "move": lambda p, alice: p.move(alice).get(),
    "send": lambda p, alice: p.send(alice),
    "worker.send": lambda p, alice: alice.send(p),
    "gather": lambda p, alice: fp.gather([p]),
    "group": lambda p, alice: fp.group(p).get(),
    "copy": lambda p, alice: p.copy().get(),
    "row": lambda p, alice: p[0].get(),
    "view": lambda p, alice: p.view(1, 1).get(),
    "sum": lambda p, alice: (p + 1).sum().item(),
    "several results": lambda p, alice: p.max(dim=0).values.get(),
    "data": lambda p, alice: p.data.get(),
    "run": lambda p, alice: p.worker.run(float, p).get(),
    "run, container": lambda p, alice: p.worker.run(lambda t: {"t": t}, p).get(),
    "run, part of a container": lambda p, alice: p.worker.run(lambda t: [t, 1], p)[1].get(),
    "search": lambda p, alice: next(iter(p.worker.search("tag"))).get(),
}


def test_no_way_out_is_permitted(bob, alice):
    wrong = {}
    for name, way in WAYS_OUT.items():
        p = bob.send(torch.tensor([SECRET]), private=True, tags="tag")
        result = outcome(lambda way=way, p=p: way(p, alice))
        if not isinstance(result, fp.NotPermittedError) or "43210" in str(result):
            wrong[name] = repr(result)
        assert p.worker is bob
        assert p.id in bob.objects
        del p
    assert wrong == {}
    assert (len(bob.objects), len(alice.objects)) == (0, 0)


def test_text_and_listing_show_no_values(bob, p):
    info = bob.objects[p.id]
    assert info.private is True
    for text in (repr(p), str(p), f"{p}", repr(info), repr(bob.objects), repr(p + 1)):
        assert "43210" not in text


def test_metadata_may_be_read(p):
    assert p.shape == (1,)
    assert p.dtype is torch.float32
    assert len(p) == 1


def test_an_array_of_it_is_refused(p):
    with pytest.raises((fp.NotPermittedError, fp.PlacementError)):
        np.asarray(p)


def test_it_may_be_used_in_its_worker(bob, p):
    q = bob.send(torch.tensor([1.0]))
    for result in (p + q, torch.mul(q, p), bob.run(torch.sum, p), p.clone()):
        result.wait()
        assert bob.objects[result.id].private is True


def test_what_public_objects_make_is_public(bob, p):
    q = bob.send(torch.tensor([1.0]))
    (q + p).wait()
    assert bob.objects[q.id].private is False
    assert (q + q).item() == 2.0


def test_results_of_results_are_private(p):
    with pytest.raises(fp.NotPermittedError):
        ((p * 0 + 1).exp() - 1).get()


def test_run_can_make_private_objects(bob):
    p = bob.run(torch.ones, 2, private=True)
    p.wait()
    assert bob.objects[p.id].private is True
    with pytest.raises(fp.NotPermittedError):
        p.get()


def test_any_object_can_be_private(bob):
    for thing in ({"a": 1}, nn.Linear(2, 1), "text"):
        p = bob.send(thing, private=True)
        for way in (p.get, p.fetch, p.copy().get):
            with pytest.raises(fp.NotPermittedError):
                way()
    box = bob.send([SECRET], private=True)
    for way in (
        lambda: box[0].get(),
        lambda: next(iter(box)).get(),
        lambda: box.index(SECRET).get(),
    ):
        with pytest.raises(fp.NotPermittedError):
            way()


WRITES = {
    "add_": lambda public, p: public.add_(p),
    "copy_": lambda public, p: public.copy_(p),
    "item": lambda public, p: public.__setitem__(0, p[0]),
    "operator": lambda public, p: public.__iadd__(p),
    "out": lambda public, p: torch.add(p, p, out=public),
    "data": lambda public, p: setattr(public, "data", p),
    "run": lambda public, p: public.worker.run(torch.Tensor.copy_, public, p),
    "through a view": lambda public, p: public[0].copy_(p[0]),
    "index_copy_": lambda public, p: public.index_copy_(0, public.long(), p),
    "setitem by function": lambda public, p: public.worker.run(operator.setitem, public, 0, p[0]),
    "gradient": lambda public, p: setattr(public, "grad", p),
    "backward": lambda public, p: (public.requires_grad_() * p).sum().backward(),
    "keyword": lambda public, p: public.worker.run(torch.mul, p, p, out=public),
    "nested": lambda public, p: public.worker.run(
        lambda d: d["a"].copy_(d["b"]), {"a": public, "b": p}
    ),
}


def test_writing_a_private_value_makes_the_object_private(bob, p):
    wrong = {}
    for name, write in WRITES.items():
        public = bob.send(torch.zeros(1))
        write(public, p)
        result = outcome(public.get)
        if not isinstance(result, fp.NotPermittedError):
            wrong[name] = repr(result)
    assert wrong == {}


def test_views_of_a_written_object_become_private_too(bob, p):
    public = bob.send(torch.zeros(2))
    row, flat = public[:1], public.view(-1)
    public[0] = p[0]
    for handle in (row, flat, public.detach(), public):
        with pytest.raises(fp.NotPermittedError):
            handle.get()


def test_a_base_written_through_a_view_becomes_private(bob, p):
    public = bob.send(torch.zeros(2))
    row, other = public[:1], public[1:]
    row.copy_(p)
    for handle in (public, row, other):
        with pytest.raises(fp.NotPermittedError):
            handle.fetch()


def test_buffers_written_in_a_call_make_the_module_private(bob):
    m = bob.send(nn.BatchNorm1d(1))
    m(bob.send(torch.tensor([[SECRET], [1.0]]), private=True)).wait()
    for way in (
        m.get,
        m.fetch,
        lambda: m.running_mean.get(),
        lambda: m.state_dict()["running_mean"].get(),
    ):
        with pytest.raises(fp.NotPermittedError):
            way()


def test_a_container_given_to_a_run_with_a_private_value_becomes_private(bob, p):
    box, counter = bob.send([]), bob.send(Counter())
    bob.run(lambda b, t: b.append(t.item()), box, p).wait()
    bob.run(lambda c, t: c.keep(t), counter, p).wait()
    for way in (box.get, lambda: box[0].get(), counter.get, lambda: counter.tensor.get()):
        with pytest.raises(fp.NotPermittedError):
            way()


def test_an_optimizer_with_private_gradients_keeps_them(bob):
    w = bob.send(torch.ones(1, requires_grad=True))
    opt = bob.run(torch.optim.SGD, [w], lr=0.1, momentum=0.9)
    (w * bob.send(torch.tensor([SECRET]), private=True)).sum().backward()
    opt.step()
    for way in (w.get, w.fetch, opt.get, lambda: opt.state_dict().get(), lambda: w.grad.item()):
        with pytest.raises(fp.NotPermittedError):
            way()


def test_moving_does_not_launder(bob, alice, p):
    m = bob.send(nn.Linear(1, 1))
    m(p).sum().backward()
    for way in (lambda: m.move(alice), lambda: m.send(alice), lambda: m.copy().get()):
        with pytest.raises(fp.NotPermittedError):
            way()
    assert len(alice.objects) == 0


def test_putting_a_private_value_into_a_container_makes_it_private(bob, p):
    box = bob.send([])
    box.append(p).wait()
    with pytest.raises(fp.NotPermittedError):
        box.get()
    with pytest.raises(fp.NotPermittedError):
        box[0].get()


def test_training_on_private_data_makes_the_model_private(bob):
    m = bob.send(nn.Linear(2, 1))
    opt = bob.run(torch.optim.SGD, m.parameters(), lr=0.1)
    loss = m(bob.send(torch.tensor([[SECRET, 1.0]]), private=True)).sum()
    loss.backward()
    opt.step()
    for way in (m.get, lambda: m.weight.grad.get(), lambda: m.weight.fetch(), loss.item):
        with pytest.raises(fp.NotPermittedError):
            way()


def test_error_text_carries_no_values(bob, p):
    bad = bob.run(explode, p)
    with pytest.raises(fp.RemoteError) as caught:
        bad.get()
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.args)
    assert "43210" not in shown
    assert "43210" not in caught.value.remote_traceback
    assert "ValueError" in str(caught.value)
    assert "explode" in str(caught.value) + caught.value.remote_traceback


def test_errors_of_operations_carry_no_values(bob, p):
    bad = bob.run(lambda t: {}[t.item()], p)
    with pytest.raises(fp.RemoteError) as caught:
        bad.get()
    shown = "".join(traceback.format_exception(caught.value))
    assert "KeyError" in shown
    assert "43210" not in shown


def test_refusals_consume_nothing(bob, p):
    for _ in range(2):
        with pytest.raises(fp.NotPermittedError):
            p.get()
    assert list(bob.objects) == [p.id]
    (p + 1).wait()


def test_dropping_a_private_object_frees_it(bob, p):
    assert len(bob.objects) == 1
    held = bob.send(torch.ones(1), private=True)
    assert len(bob.objects) == 2
    del held
    assert len(bob.objects) == 1


def test_moving_to_where_it_is_is_no_way_out(bob, p):
    assert p.move(bob) is p
    assert p.worker is bob


def _federated(cluster, rows):
    x = torch.linspace(-1, 1, 2 * rows).reshape(rows, 2)
    data = fp.federate((x, x.sum(dim=1, keepdim=True)), cluster, private=True)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    local = fp.LocalTraining(loss=nn.MSELoss(), optimizer=sgd, batch_size=4)
    return data, fp.Aggregator(nn.Linear(2, 1), data, local)


def test_federated_data_can_be_private(cluster):
    data, _ = _federated(cluster, 30)
    for client in data.clients:
        for pointer in data[client]:
            with pytest.raises(fp.NotPermittedError):
                pointer.fetch()
    assert all(info.private for worker in cluster for info in worker.objects.values())


def test_what_an_aggregator_folds_may_leave(cluster):
    _, aggregator = _federated(cluster, 60)
    before = aggregator.model.weight.tolist()
    record = aggregator.run_round()
    assert record.failures == {}
    assert aggregator.model.weight.tolist() != before
    assert record.loss > 0


def test_means_over_few_private_rows_do_not_leave(cluster):
    _, aggregator = _federated(cluster, 6)
    record = aggregator.run_round()
    assert record.loss is None
    clients = outcome(aggregator.evaluate_clients)
    if not isinstance(clients, fp.NotPermittedError):
        assert [evaluation.loss for evaluation in clients.values()] == [None] * 3
