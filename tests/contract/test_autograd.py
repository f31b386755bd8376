"""Autograd lives with the data: backward, gradients, what travels and what is cut."""

import pytest
import torch

import fedproc as fp


@pytest.fixture
def w(bob):
    return bob.send(torch.tensor([1.0, 2.0], requires_grad=True))


def test_backward_runs_there(w, bob):
    assert w.grad is None
    loss = (w * w).sum()
    assert loss.requires_grad is True
    assert loss.is_leaf is False
    loss.backward()
    assert isinstance(w.grad, fp.TensorPointer)
    assert w.grad.worker is bob
    assert w.grad.get().tolist() == [2.0, 4.0]


def test_gradients_accumulate(w):
    for _ in range(2):
        w.sum().backward()
    assert w.grad.tolist() == [2.0, 2.0]
    w.grad.zero_()
    assert w.grad.tolist() == [0.0, 0.0]


def test_backward_takes_a_gradient_on_the_same_worker(w, bob):
    (w * 3).backward(bob.send(torch.tensor([1.0, 10.0])))
    assert w.grad.tolist() == [3.0, 30.0]
    with pytest.raises(fp.PlacementError):
        (w * 3).backward(torch.ones(2))


def test_fetching_the_gradient_gives_the_gradient(w):
    (w * 5).sum().backward()
    assert w.grad.fetch().tolist() == [5.0, 5.0]
    assert w.grad.copy().get().tolist() == [5.0, 5.0]


def test_a_leaf_comes_home_with_its_gradient(w):
    (w * 5).sum().backward()
    for home in (w.fetch(), w.get()):
        assert home.tolist() == [1.0, 2.0]
        assert home.requires_grad is True
        assert home.is_leaf is True
        assert home.grad.tolist() == [5.0, 5.0]


def test_a_leaf_is_sent_with_its_gradient(bob):
    local = torch.ones(2, requires_grad=True)
    (local * 4).sum().backward()
    p = bob.send(local)
    assert p.requires_grad is True
    assert p.grad.tolist() == [4.0, 4.0]
    p.grad.zero_()
    p.wait()
    assert local.grad.tolist() == [4.0, 4.0]


def test_remote_backward_leaves_the_local_tensor_alone(bob):
    local = torch.ones(2, requires_grad=True)
    bob.send(local).sum().backward()
    assert local.grad is None


def test_a_copy_is_a_new_leaf_without_gradient(w):
    w.sum().backward()
    q = w.copy()
    assert (q.requires_grad, q.is_leaf, q.grad) == (True, True, None)
    (q * 2).sum().backward()
    assert q.grad.tolist() == [2.0, 2.0]
    assert w.grad.tolist() == [1.0, 1.0]


def test_a_copy_of_a_result_is_a_leaf(w):
    q = (w * 2).copy()
    assert (q.requires_grad, q.is_leaf) == (True, True)
    assert q.tolist() == [2.0, 4.0]


def test_a_non_leaf_comes_home_detached(w):
    y = w * 2
    for home in (y.fetch(), y.get()):
        assert home.requires_grad is False
        assert home.is_leaf is True
        assert home.tolist() == [2.0, 4.0]


def test_fetching_does_not_cut_the_graph(w):
    y = w * 2
    y.fetch()
    y.sum().backward()
    assert w.grad.tolist() == [2.0, 2.0]


def test_sending_a_local_non_leaf_warns(bob):
    y = torch.ones(2, requires_grad=True) * 2
    with pytest.warns(UserWarning, match="graph|history"):
        p = bob.send(y)
    assert p.tolist() == [2.0, 2.0]
    assert p.is_leaf is True


def test_sending_a_non_leaf_without_gradients_is_silent(bob, x):
    assert bob.send(x * 2).tolist() == [2.0, 4.0, 6.0]


def test_a_failed_backward_is_an_error_nobody_can_miss(cluster, w):
    (w.detach() * 2).sum().backward()
    with pytest.raises(RuntimeError, match="grad"):
        cluster.wait()
    assert w.grad is None


class Tenfold(torch.autograd.Function):
    """Multiplies gradients by ten."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 10


def test_a_function_of_autograd_is_refused_here_and_runs_there(w, bob):
    with pytest.raises(fp.PlacementError, match=r"worker\.run\(Tenfold\.apply, pointer\)"):
        Tenfold.apply(w)
    (bob.run(Tenfold.apply, w) + w).sum().backward()
    assert w.grad.tolist() == [11.0, 11.0]


class Remote(torch.autograd.Function):
    """A step of this process whose forward and backward are computed by a worker."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return (weight.worker.send(x.detach()) * weight).get()

    @staticmethod
    def backward(ctx, gradient):
        return (ctx.weight.worker.send(gradient) * ctx.weight).get(), None


def test_a_function_of_this_process_may_use_pointers(w):
    x = torch.ones(2, requires_grad=True)
    Remote.apply(x, w.detach()).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0]


LAYOUTS = {
    "coo": lambda dense: dense.to_sparse(),
    "uncoalesced": lambda dense: torch.sparse_coo_tensor(
        [[0, 1, 1], [1, 0, 0]], [1.0, 1.0, 1.0], check_invariants=True
    ),
    "hybrid": lambda dense: dense.to_sparse(1),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
    "bsr": lambda dense: dense.to_sparse_bsr((1, 1)),
    "bsc": lambda dense: dense.to_sparse_bsc((1, 1)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_leaf_is_one_everywhere(bob, alice, layout):
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    x = LAYOUTS[layout](dense).requires_grad_()
    x.grad = x.detach().clone()
    p = bob.send(x)
    assert bob.run(lambda leaf: (leaf.requires_grad, leaf.grad is not None), x).get() == (
        True,
        True,
    )
    p.move(alice)
    for home in (p.fetch(), bob.send([x]).get()[0]):
        assert home.requires_grad
        assert home.layout is x.layout
        assert home.layout is not torch.sparse_coo or home.is_coalesced() == x.is_coalesced()
        assert torch.equal(home.to_dense(), dense)
        assert torch.equal(home.grad.to_dense(), dense)
    assert not bob.send(x.detach()).fetch().requires_grad


def test_nobody_keeps_a_sparse_tensor_that_travelled(bob):
    p = bob.send(torch.ones(2, 2).to_sparse())
    p.get()

    def kept():
        return len(torch._utils._sparse_tensors_to_validate)

    assert (kept(), bob.run(kept).get()) == (0, 0)


def test_a_gradient_handle_stays_that_tensor(w):
    w.sum().backward()
    grad = w.grad
    w.sum().backward()
    assert grad.tolist() == [2.0, 2.0]
    w.grad = None
    assert grad.tolist() == [2.0, 2.0]


def test_descent_by_hand_equals_plain_torch(bob):
    local = torch.tensor([[1.0], [-2.0]], requires_grad=True)
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    remote, remote_data = bob.send(local), bob.send(data)
    for weight, rows in ((local, data), (remote, remote_data)):
        for _ in range(5):
            (rows.mm(weight) ** 2).mean().backward()
            with torch.no_grad():
                weight -= 0.01 * weight.grad
            weight.grad.zero_()
    assert torch.equal(remote.get(), local.detach())


def test_messages_of_a_step_depend_on_neither_batch_nor_parameters(cluster, bob):
    def messages(batch, layers):
        wide = [torch.nn.Linear(4, 4) for _ in range(layers)]
        m = bob.send(torch.nn.Sequential(*wide, torch.nn.ReLU(), torch.nn.Linear(4, 1)))
        opt = bob.run(torch.optim.SGD, m.parameters(), lr=0.1)
        data = bob.send(torch.ones(batch, 4))
        loss = m(data).sum()
        before = cluster.messages
        loss.backward()
        opt.step()
        spent = cluster.messages - before
        cluster.wait()
        return spent

    assert messages(8, 1) == messages(512, 1) == messages(8, 6)
    assert 2 <= messages(8, 1) <= 4
