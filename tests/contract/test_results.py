"""Several results, plain answers, views, in-place methods, iteration."""

import pytest
import torch

import fedproc as fp


@pytest.fixture
def p(bob):
    return bob.send(torch.tensor([[1.0, 5.0], [3.0, 2.0]]))


def test_max_gives_the_same_tuple_type(p):
    r = p.max(dim=0)
    assert isinstance(r, torch.return_types.max)
    assert len(r) == 2
    assert r.values.tolist() == [3.0, 5.0]
    assert r.indices.tolist() == [1, 0]
    assert r[1].tolist() == [1, 0]


def test_several_results_unpack_into_pointers(p, bob):
    values, indices = p.sort(dim=1, descending=True)
    assert isinstance(values, fp.TensorPointer)
    assert values.worker is bob
    assert values.get().tolist() == [[5.0, 1.0], [3.0, 2.0]]
    assert indices.get().dtype is torch.int64


def test_unpacking_a_known_count_does_not_wait(bob, gate):
    held = bob.run(gate.hold)
    p = bob.send(torch.tensor([1.0, 5.0, 3.0]))
    values, indices = torch.topk(p, 2)
    total = values.sum()
    assert not held.done()
    gate.open()
    assert total.item() == 8.0
    assert indices.tolist() == [1, 2]
    held.wait()


def test_functions_with_several_results(p):
    values, indices = torch.max(p, dim=1)
    assert (values.tolist(), indices.tolist()) == ([5.0, 3.0], [1, 0])
    var, mean = torch.var_mean(p)
    assert mean.item() == 2.75
    assert var.item() == torch.var(p).item()
    u, s, vh = torch.linalg.svd(p)
    assert (u.shape, s.shape, vh.shape) == ((2, 2), (2,), (2, 2))


def test_split_and_friends_unpack(bob):
    p = bob.send(torch.arange(5))
    a, b, c = p.split(2)
    assert [t.get().tolist() for t in (a, b, c)] == [[0, 1], [2, 3], [4]]
    assert len(p.chunk(2)) == 2
    assert [t.item() for t in p.unbind()] == [0, 1, 2, 3, 4]
    first, second = torch.split(p, [1, 4])
    assert (first.tolist(), second.tolist()) == ([0], [1, 2, 3, 4])
    assert p.split(2)[2].tolist() == [4]


def test_an_unknown_count_unpacks_after_waiting(bob):
    p = bob.run(torch.arange, 4)
    a, b = p.split(2)
    assert (a.tolist(), b.tolist()) == ([0, 1], [2, 3])
    rows, columns = torch.nonzero(bob.run(torch.eye, 2), as_tuple=True)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [0, 1])


def test_parts_count_while_held(bob):
    p = bob.send(torch.arange(4))
    parts = list(p.split(2))
    assert len(bob.objects) >= 3
    del parts
    assert len(bob.objects) == 1


def test_plain_answers_come_as_values(bob, p):
    q, ints = bob.send(torch.ones(2, 2)), bob.send(torch.arange(3))
    answers = {
        "equal": (torch.equal(p, q), False),
        "equal method": (p.equal(p), True),
        "allclose": (torch.allclose(q, q), True),
        "is_contiguous": (p.is_contiguous(), True),
        "transposed": (p.t().is_contiguous(), False),
        "stride": (p.stride(), (2, 1)),
        "stride of one": (p.stride(0), 2),
        "is_floating_point": (torch.is_floating_point(ints), False),
        "numel": (torch.numel(p), 4),
        "element_size": (ints.element_size(), 8),
        "type": (p.type(), "torch.FloatTensor"),
        "storage_offset": (p[1].storage_offset(), 2),
        "size": (p.t().size(), torch.Size([2, 2])),
    }
    wrong = {name: got for name, (got, right) in answers.items() if got != right}
    assert wrong == {}
    assert all(type(got) is type(right) for got, right in answers.values())


def test_plain_answers_leave_nothing(bob, p):
    assert torch.equal(p, p) is True
    assert p.stride() == (2, 1)
    assert list(bob.objects) == [p.id]


def test_an_in_place_method_returns_the_same_handle(bob, p):
    assert p.add_(1) is p
    assert p.zero_() is p
    assert p.requires_grad_() is p
    assert len(bob.objects) == 1


def test_in_place_operators_keep_the_handle(bob, p):
    q = p
    q += 1
    q *= 2
    assert q is p
    assert p.tolist() == [[4.0, 12.0], [8.0, 6.0]]
    assert len(bob.objects) == 1


def test_a_row_is_a_view(p):
    row = p[0]
    row.add_(10)
    assert p.tolist() == [[11.0, 15.0], [3.0, 2.0]]
    p.zero_()
    assert row.tolist() == [0.0, 0.0]


def test_other_views_are_views_too(p):
    for view in (p.view(-1), p.t(), p[:, 1:], p.T, p.detach(), p.narrow(0, 0, 1)):
        view.fill_(3.0)
    assert p.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_writing_into_a_view_by_assignment(p):
    row = p[1]
    row[0] = 7.0
    p[0][1] = 8.0
    assert p.tolist() == [[1.0, 8.0], [7.0, 2.0]]


def test_a_view_outlives_a_dropped_base(bob):
    row = bob.send(torch.ones(2, 2))[0]
    assert row.get().tolist() == [1.0, 1.0]
    assert len(bob.objects) == 0


def test_get_leaves_views_valid(bob, p):
    row = p[0]
    home = p.get()
    home.add_(100)
    assert row.tolist() == [1.0, 5.0]
    row.add_(1)
    assert row.get().tolist() == [2.0, 6.0]
    assert home[0].tolist() == [101.0, 105.0]


def test_move_leaves_views_valid(bob, alice, p):
    row = p[0]
    p.move(alice)
    row.add_(1)
    p.mul_(2)
    assert row.worker is bob
    assert row.get().tolist() == [2.0, 6.0]
    assert p.get().tolist() == [[2.0, 10.0], [6.0, 4.0]]


def test_a_result_that_is_the_argument_is_another_handle(bob, p):
    same = bob.run(lambda t: t, p)
    same.add_(1)
    assert p.tolist() == [[2.0, 6.0], [4.0, 3.0]]
    assert len(bob.objects) == 1
    also = p.contiguous()
    also.zero_()
    assert same.sum().item() == 0.0
    assert len(bob.objects) == 1


def test_iteration_yields_rows(bob, p):
    rows = list(p)
    assert [row.worker for row in rows] == [bob, bob]
    assert [row.tolist() for row in rows] == [[1.0, 5.0], [3.0, 2.0]]
    rows[0].zero_()
    assert p.tolist() == [[0.0, 0.0], [3.0, 2.0]]


def test_iteration_frees_each_row(bob, p):
    counts = []
    for row in p:
        counts.append(len(bob.objects))
        del row
    assert counts == [2, 2]
    assert len(bob.objects) == 1


def test_unpacking_a_tensor_gives_rows(p):
    first, second = p
    assert (first + second).tolist() == [4.0, 7.0]
