"""Module pointers: calls, parameters, modes, state, the way home, moving."""

import pytest
import torch
from torch import nn

import fedproc as fp
from tests.contract.things import Net

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


@pytest.fixture
def local():
    torch.manual_seed(0)
    return Net(2, 3)


@pytest.fixture
def m(bob, local):
    return bob.send(local)


def test_send_makes_one_object(bob, m):
    assert isinstance(m, fp.ModulePointer)
    assert list(bob.objects) == [m.id]


def test_sending_leaves_the_local_module_alone(m, local):
    before = local.fc.weight.clone()
    with torch.no_grad():
        local.fc.weight.add_(1)
    assert torch.equal(m.fc.weight.fetch(), before)


def test_a_call_runs_there(bob, m, local):
    out = m(bob.send(X))
    assert out.worker is bob
    assert torch.equal(out.get(), local(X).detach())
    assert torch.equal(m(bob.send(X), scale=2.0).get(), local(X, scale=2.0).detach())


def test_a_call_does_not_wait(bob, m, gate):
    held = bob.run(gate.hold)
    out = m(bob.send(X))
    total = torch.sum(out * 2)
    assert not held.done()
    gate.open()
    total.backward()
    assert m.fc.bias.grad.tolist() == [4.0, 4.0, 4.0]
    held.wait()


def test_get_brings_the_same_class_with_everything(bob, m, local):
    m(bob.send(X)).sum().backward()
    home = m.get()
    assert type(home) is Net
    assert torch.equal(home.fc.weight, local.fc.weight)
    assert home.calls.item() == 1
    assert torch.equal(home.offset, local.offset)
    assert home.fc.bias.grad.tolist() == [2.0, 2.0, 2.0]
    assert home.fc.weight.requires_grad
    assert len(bob.objects) == 0


def test_fetch_and_copy_leave_the_module_there(bob, m):
    fetched, copied = m.fetch(), m.copy()
    copied.fc.weight.data.zero_()
    assert torch.equal(m.fc.weight.fetch(), fetched.fc.weight)
    assert copied.get().fc.weight.abs().sum().item() == 0.0


def test_parameters_is_a_list_of_pointers(bob, m, local):
    parameters = m.parameters()
    assert isinstance(parameters, list)
    assert all(isinstance(p, fp.TensorPointer) and p.worker is bob for p in parameters)
    assert [tuple(p.shape) for p in parameters] == [(3, 2), (3,)]
    assert [p.requires_grad for p in parameters] == [True, True]
    assert torch.equal(parameters[0].fetch(), local.fc.weight)


def test_named_parameters_is_a_list_of_pairs(m, local):
    pairs = m.named_parameters()
    assert isinstance(pairs, list)
    assert [name for name, _ in pairs] == ["fc.weight", "fc.bias"]
    assert torch.equal(dict(pairs)["fc.bias"].fetch(), local.fc.bias)


def test_state_dict_is_a_dict_of_pointers(m, local):
    state = m.state_dict()
    assert isinstance(state, dict)
    assert list(state) == list(local.state_dict())
    assert all(isinstance(p, fp.TensorPointer) for p in state.values())
    assert state["offset"].tolist() == [0.5, 0.5, 0.5]


def test_the_values_of_a_state_dict_are_written_in_place(bob, alice, m, local):
    m(bob.send(X)).sum().backward()
    state = m.state_dict()
    assert {name: p.requires_grad for name, p in state.items()} == dict.fromkeys(state, False)
    assert state["fc.weight"].grad is None
    assert type(state["fc.weight"].fetch()) is torch.Tensor
    for values in state.values():
        values.mul_(2)
    assert torch.equal(m.fc.weight.fetch(), local.fc.weight.detach() * 2)
    m.move(alice)
    assert state["fc.bias"].worker is alice
    state["fc.bias"].zero_()
    assert m.fc.bias.tolist() == [0.0, 0.0, 0.0]


def test_parameters_are_the_modules_own(m):
    weight = m.parameters()[0]
    weight.data.fill_(2.0)
    assert m.fetch().fc.weight.unique().tolist() == [2.0]


def test_names_give_parameters_buffers_and_submodules(m, bob):
    assert isinstance(m.fc, fp.ModulePointer)
    assert isinstance(m.fc.weight, fp.TensorPointer)
    assert m.offset.tolist() == [0.5, 0.5, 0.5]
    assert m.fc(bob.send(X)).shape == (2, 3)
    with pytest.raises(AttributeError):
        m.frobnicate  # noqa: B018


def test_train_and_eval_return_the_module(bob):
    m = bob.send(nn.Dropout(0.5))
    ones = bob.send(torch.ones(1000))
    assert m.eval() is m
    assert m(ones).sum().item() == 1000.0
    assert m.train() is m
    assert sorted(m(ones).unique().tolist()) == [0.0, 2.0]
    assert m.train(False) is m
    assert m.get().training is False


def test_requires_grad_freezes(m):
    assert m.requires_grad_(False) is m
    assert [p.requires_grad for p in m.parameters()] == [False, False]
    m.requires_grad_()
    assert m.get().fc.weight.requires_grad is True


def test_zero_grad_clears(bob, m):
    m(bob.send(X)).sum().backward()
    assert m.fc.bias.grad.tolist() == [2.0, 2.0, 2.0]
    assert m.zero_grad() is m
    assert m.fc.bias.grad is None


def test_load_state_dict_takes_local_tensors(m):
    other = Net(2, 3)
    assert m.load_state_dict(other.state_dict()) is m
    assert torch.equal(m.get().fc.weight, other.fc.weight)


def test_load_state_dict_takes_pointers_of_the_same_worker(bob, alice, m):
    other = Net(2, 3)
    m.load_state_dict(bob.send(other).state_dict())
    assert torch.equal(m.fc.weight.fetch(), other.fc.weight)
    with pytest.raises(fp.PlacementError):
        m.load_state_dict(alice.send(other).state_dict())


def test_load_state_dict_of_wrong_keys_fails_as_in_torch(cluster, m, local):
    m.load_state_dict({"nonsense": torch.ones(1)})
    with pytest.raises(RuntimeError, match="nonsense"):
        cluster.wait()
    assert torch.equal(m.get().fc.weight, local.fc.weight)


def test_an_optimizer_lives_with_the_parameters(bob, m, local):
    opt = bob.run(torch.optim.SGD, m.parameters(), lr=0.1, momentum=0.9)
    local_opt = torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)
    data = bob.send(X)
    for module, rows, optimizer in ((m, data, opt), (local, X, local_opt)):
        for _ in range(3):
            optimizer.zero_grad()
            (module(rows) ** 2).mean().backward()
            optimizer.step()
    home = m.get()
    assert torch.equal(home.fc.weight, local.fc.weight)
    assert torch.equal(home.fc.bias, local.fc.bias)
    assert home.calls.item() == 3


def test_parameter_pointers_follow_a_move(bob, alice, m, local):
    weight = m.fc.weight
    m.move(alice)
    assert m.worker is alice
    assert weight.worker is alice
    assert torch.equal(m(alice.send(X)).get(), local(X).detach())
    weight.data.zero_()
    assert m.get().fc.weight.abs().sum().item() == 0.0
    assert len(bob.objects) == 0


def test_moving_a_module_leaves_its_optimizer_and_warns(bob, alice, m):
    opt = bob.run(torch.optim.SGD, m.parameters(), lr=0.1)
    opt.zero_grad()
    with pytest.warns(UserWarning, match="optimizer"):
        m.move(alice)
    assert m.worker is alice
    assert opt.worker is bob


def test_gradients_move_with_a_module(bob, alice, m):
    m(bob.send(X)).sum().backward()
    m.move(alice)
    assert m.fc.bias.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_module_got_once_is_gone(m, bob):
    m.get()
    with pytest.raises(fp.ObjectGoneError):
        m.get()
    with pytest.raises(fp.ObjectGoneError):
        m(bob.send(X)).get()


def test_batchnorm_and_modes_come_home(bob):
    local = nn.BatchNorm1d(2)
    m = bob.send(local)
    m(bob.send(X)).wait()
    local(X)
    home = m.get()
    assert torch.equal(home.running_mean, local.running_mean)
    assert torch.equal(home.running_var, local.running_var)
    assert home.num_batches_tracked.item() == 1
    assert home.training is True


def test_modules_with_several_outputs_unpack(bob):
    torch.manual_seed(0)
    local = nn.LSTM(2, 3, batch_first=True)
    x = torch.ones(1, 4, 2)
    out, (h, c) = bob.send(local)(bob.send(x))
    local_out, (local_h, local_c) = local(x)
    assert torch.equal(out.get(), local_out.detach())
    assert torch.equal(h.get(), local_h.detach())
    assert torch.equal(c.get(), local_c.detach())


def test_embeddings_train(bob):
    local = nn.Embedding(4, 2)
    m = bob.send(local)
    rows = m(bob.send(torch.tensor([1, 1, 3])))
    rows.sum().backward()
    assert m.weight.grad.tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]


def test_tied_parameters_stay_tied(bob):
    local = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    local[1].weight = local[0].weight
    m = bob.send(local)
    assert len(m.parameters()) == 1
    home = m.get()
    assert home[0].weight is home[1].weight


class WithExtraState(nn.Module):
    """Adds a tensor of its own to its state_dict."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.extra = torch.tensor([7.0])

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_state_dict_has_extra_state(bob):
    model = bob.send(nn.Sequential(WithExtraState()))
    state = model.state_dict()
    assert sorted(state) == ["0._extra_state", "0.inner.bias", "0.inner.weight"]
    assert state["0._extra_state"].tolist() == [7.0]
    state["0._extra_state"].mul_(2)
    other = bob.send(nn.Sequential(WithExtraState()))
    other.load_state_dict(state)
    assert other.get()[0].extra.tolist() == [14.0]


def test_the_parts_of_a_sequential_are_taken_by_number(cluster, alice, bob):
    x = torch.arange(6.0).reshape(3, 2)
    local = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    model, remote = alice.send(local), alice.send(x)

    first, last = model[0], model[-1]
    out = remote
    for part in model:
        out = part(out)

    assert (len(model), len(list(model)), bool(model)) == (3, 3, True)
    assert torch.equal(out.get(), local(x))
    assert torch.equal(last.weight.fetch(), local[2].weight)
    model.move(bob)
    assert torch.equal(first.weight.fetch(), local[0].weight)


def test_a_module_has_only_the_parts_that_it_has(alice):
    model, single = alice.send(nn.Sequential(nn.ReLU())), alice.send(nn.Linear(1, 1))

    for place in (1, -2):
        with pytest.raises(IndexError, match=f"has 1 parts, and no part {place}"):
            model[place]
    with pytest.raises(TypeError, match=r"taken by its number, not by 'a'.*getattr"):
        model["a"]
    with pytest.raises(TypeError, match="object of type 'Linear' has no len"):
        len(single)
    assert single  # like every module


def test_parts_are_those_of_modules_with_numbers(bob):
    lists = bob.send(nn.ModuleList([nn.ReLU(), nn.Linear(1, 1)]))
    assert all(isinstance(part, fp.ModulePointer) for part in lists)
    tensors = bob.send(nn.ParameterList([torch.ones(1), torch.zeros(2)]))
    assert [part.shape for part in tensors] == [(1,), (2,)]
    assert isinstance(tensors[1], fp.TensorPointer)
    for other in (nn.ModuleDict({"a": nn.ReLU()}), nn.Linear(1, 1)):
        pointer = bob.send(other)
        with pytest.raises(TypeError, match="which is no sequence"):
            iter(pointer)
        with pytest.raises(TypeError, match="which is no sequence"):
            pointer[0]


def test_attributes_of_a_module_are_set_where_it_is(bob):
    model = bob.send(nn.Linear(1, 1))
    with pytest.raises(AttributeError, match=r"worker.run\(setattr, pointer, 'weight', value\)"):
        model.weight = bob.send(torch.zeros(1, 1))
