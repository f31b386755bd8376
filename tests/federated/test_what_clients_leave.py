"""No client finds what another has left in the model, and what users change reaches all workers."""

import copy
import functools
import threading

import pytest
import torch
from torch import nn

import fedproc as fp
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.oracle import sequential_fedavg
from tests.federated.worlds import bits, cross_entropy, linear, sgd, shards

SIZES = [9, 6, 12, 5, 8]


class Assigning(nn.Module):
    """Assigns a new tensor to its buffer, a usual way to keep a running mean."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.inner(x - self.mean)


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x) / self.calls


class Listing(nn.Module):
    """Keeps a list that grows, a list of its own parts, and a new attribute."""

    def __init__(self):
        super().__init__()
        self.inner, self.other = linear(), linear(seed=1)
        self.order = [self.inner, self.other]
        self.seen = {"calls": [1.0]}

    def forward(self, x):
        self.seen["calls"].append(1.0)
        self.order.reverse()
        self.late = getattr(self, "late", 0) + 1
        return self.order[0](x) / len(self.seen["calls"]) / self.late


class Switching(nn.Module):
    """Changes a part of torch's."""

    def __init__(self):
        super().__init__()
        self.drop, self.inner = nn.Dropout(0.0), linear()

    def forward(self, x):
        out = self.inner(self.drop(x))
        self.drop.p = 0.5
        return out


class Replacing(nn.Module):
    """Replaces a part by another."""

    def __init__(self):
        super().__init__()
        self.inner, self.act = linear(), nn.ReLU()

    def forward(self, x):
        out = self.act(self.inner(x))
        self.act = nn.Tanh()
        return out


class Sharing(nn.Module):
    """A part appends to a list that the whole reads."""

    def __init__(self):
        super().__init__()
        self.notes = []
        self.inner = Noting(self.notes)

    def forward(self, x):
        out = self.inner(x)
        return out * self.notes.pop()


class Noting(nn.Module):
    def __init__(self, notes):
        super().__init__()
        self.inner, self.notes = linear(), notes

    def forward(self, x):
        self.notes.append(float(len(x)))
        return self.inner(x)


class Locked(nn.Module):
    """Leaves a lock out of its state and makes it again."""

    def __init__(self):
        super().__init__()
        self.inner, self.lock, self.calls = linear(), threading.Lock(), [0]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            self.calls[0] += 1
            return self.inner(x) / self.calls[0]


class Adding(nn.Module):
    """Writes in place to a tensor that is no buffer, and to one in a list."""

    def __init__(self):
        super().__init__()
        self.inner, self.total = linear(), torch.zeros(6)
        self.others = [torch.ones(3)]

    def forward(self, x):
        self.total += x.detach().mean(0)
        self.others[0].mul_(2.0)
        return self.inner(x - self.total) * self.others[0]


class Averaging(nn.Module):
    """Writes a running mean into a frozen parameter, by code that does nothing but compute."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.mean = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.mean(0))
        return self.inner(x - self.mean)


class Teaching(nn.Module):
    """A frozen part follows the trained one, past autograd in two of the usual ways."""

    def __init__(self):
        super().__init__()
        self.inner, self.teacher = linear(), linear(seed=1).requires_grad_(False)

    def forward(self, x):
        self.teacher.weight.data = 0.5 * self.teacher.weight.data + 0.5 * self.inner.weight.data
        self.teacher.bias.data.mul_(0.5).add_(self.inner.bias.data)
        return self.inner(x) - self.teacher(x)


class Retaining(nn.Module):
    """Lets a buffer, a tensor and a frozen parameter become parts of the graph of a step."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = linear(), torch.zeros(3)
        self.register_buffer("mean", torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        out = self.inner(x)
        for tensor in (self.last, self.mean, self.frozen):
            tensor.add_(out.mean(0))
            out = out + tensor
        return out


class Smoothing(nn.Module):
    """Lets a buffer become part of the graph, by code that does nothing but compute."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        out = self.inner(x)
        self.mean.mul_(0.5).add_(out.mean(0))
        return out - self.mean


class Freezing(nn.Module):
    """Freezes a parameter when it meets the rows of the first client."""

    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        if len(x) == SIZES[0]:
            self.inner.weight.requires_grad_(False)
        return self.inner(x)


class Helped(nn.Module):
    """Keeps a module that counts in a list, where torch does not look."""

    def __init__(self):
        super().__init__()
        self.inner, self.helpers = linear(), [Tallying()]

    def forward(self, x):
        return self.helpers[0](self.inner(x))


class Tallying(nn.Module):
    """Counts in an attribute, in a buffer and in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.calls, self.tensor = 0, torch.zeros(())
        self.register_buffer("buffer", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.tensor.data.add_(1.0)
        self.buffer += 1.0
        return x / (self.calls + self.tensor + self.buffer)


def counted():
    """A module of torch with a hook that counts."""
    model = linear()
    model.register_forward_hook(_count)
    return model


def _count(module, args, output):
    module.calls = getattr(module, "calls", 0) + 1
    return output / module.calls


class CountingLoss(nn.Module):
    """A loss with a memory."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        return cross_entropy(outputs, targets) / self.calls


class TallyingLoss(Tallying):
    """A loss with a memory of three kinds."""

    def forward(self, outputs, targets):
        return super().forward(cross_entropy(outputs, targets))


class BufferedLoss(nn.Module):
    """Counts in a buffer, by code that does nothing but compute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs, targets):
        self.calls.add_(1.0)
        return torch.nn.functional.cross_entropy(outputs, targets) / self.calls


class ObjectLoss:
    """A loss that is no module, with a number, a list, a tensor and a module of its own."""

    def __init__(self):
        self.calls, self.seen, self.total, self.part = 0, [], torch.zeros(()), Tallying()

    def __call__(self, outputs, targets):
        self.calls += 1
        self.seen.append(self.calls)
        self.total += 1.0
        self.late = getattr(self, "late", 0) + 1
        loss = cross_entropy(self.part(outputs), targets)
        return loss / (self.calls + len(self.seen) + self.total + self.late)

    def scaled(self, scale, outputs, targets):
        return scale * self(outputs, targets)


def partly_in_place(total, outputs, targets):
    total.add_(1.0)
    return cross_entropy(outputs, targets) / total


def freezing(parameters):
    """A factory that freezes what it does not train."""
    parameters[0].requires_grad_(False)
    return sgd(parameters[1:])


def hooked(parameters):
    """A factory that hooks into the parameters in both ways."""
    for parameter in parameters:
        parameter.register_hook(lambda gradient: 0.5 * gradient)
        parameter.register_post_accumulate_grad_hook(_halve)
    return sgd(parameters)


def _halve(parameter):
    parameter.grad.mul_(0.5)


@pytest.fixture(scope="module", params=["inline-1", "process-1", "process-2"])
def anywhere(request):
    transport, count = request.param.split("-")
    with Cluster(int(count), transport=transport) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("make", "loss", "factory"),
    [
        (Assigning, cross_entropy, sgd),
        (Counting, cross_entropy, sgd),
        (Listing, cross_entropy, sgd),
        (Switching, cross_entropy, sgd),
        (Replacing, cross_entropy, sgd),
        (Sharing, cross_entropy, sgd),
        (Locked, cross_entropy, sgd),
        (Adding, cross_entropy, sgd),
        (Averaging, cross_entropy, sgd),
        (Teaching, cross_entropy, sgd),
        (Helped, cross_entropy, sgd),
        (counted, cross_entropy, sgd),
        (linear, cross_entropy, hooked),
        (linear, cross_entropy, freezing),
        (linear, TallyingLoss(), sgd),
        (linear, BufferedLoss(), sgd),
        (linear, ObjectLoss(), sgd),
        (linear, functools.partial(ObjectLoss().scaled, 0.5), sgd),
        (linear, functools.partial(partly_in_place, torch.zeros(())), sgd),
    ],
)
def test_a_client_starts_from_the_model_and_nothing_else(anywhere, make, loss, factory):
    local = LocalTraining(loss, factory, batch_size=4, epochs=2)
    aggregator = Aggregator(make(), FederatedDataset(shards(SIZES), anywhere), local)
    aggregator.run(2)
    expected = sequential_fedavg(
        make(), shards(SIZES), loss, factory, rounds=2, batch_size=4, epochs=2
    )
    assert bits(aggregator.model) == bits(expected)


@pytest.mark.parametrize("make", [Retaining, Smoothing, Freezing])
def test_a_client_of_one_step_leaves_no_graph_and_nothing_frozen(anywhere, make):
    local = LocalTraining(cross_entropy, sgd, batch_size=None)
    aggregator = Aggregator(make(), FederatedDataset(shards(SIZES), anywhere), local)
    history = aggregator.run(2)
    assert [dict(record.failures) for record in history] == [{}, {}]
    expected = sequential_fedavg(
        make(), shards(SIZES), cross_entropy, sgd, rounds=2, batch_size=None
    )
    assert bits(aggregator.model) == bits(expected)


def test_rows_that_an_embedding_has_scaled_are_as_they_were(anywhere):
    torch.manual_seed(0)
    table, last = nn.Embedding(3, 6, max_norm=0.5), nn.Linear(6, 3, bias=False)
    last.weight = table.weight.requires_grad_(False)  # which sees the rows that nobody looked up
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(6, 6), last)
    rows = {
        name: (torch.full((len(y), 1), place % 3), y)
        for place, (name, (_, y)) in enumerate(shards(SIZES).items())
    }
    local = LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(model, FederatedDataset(rows, anywhere), local)
    aggregator.run(2)
    expected = sequential_fedavg(model, rows, cross_entropy, sgd, rounds=2)
    assert bits(aggregator.model) == bits(expected)


@pytest.mark.parametrize("name", ["double", "half"])
def test_a_client_that_converts_the_model_fails_alone(anywhere, name):
    class Converting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.frozen = linear(), linear(seed=1).requires_grad_(False)
            self.register_buffer("zero", torch.zeros(3))

        def forward(self, x):
            if len(x) == SIZES[1]:
                getattr(self, name)()
                x = x.to(self.zero.dtype)
            return self.inner(x) + self.frozen(x) + self.zero

    local = LocalTraining(cross_entropy, sgd, batch_size=None)
    aggregator = Aggregator(Converting(), FederatedDataset(shards(SIZES), anywhere), local)
    history = aggregator.run(2)
    assert [set(record.failures) for record in history] == [{"b"}, {"b"}]
    assert "of another shape or dtype" in str(history[0].failures["b"])
    others = {client: rows for client, rows in shards(SIZES).items() if client != "b"}
    expected = sequential_fedavg(
        Converting(), others, cross_entropy, sgd, rounds=2, batch_size=None
    )
    assert bits(aggregator.model) == bits(expected)


def test_a_loss_starts_as_it_was(anywhere):
    local = LocalTraining(CountingLoss(), sgd, batch_size=None)
    aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), anywhere), local)
    aggregator.run(1)
    expected = sequential_fedavg(
        linear(), shards(SIZES), cross_entropy, sgd, rounds=1, batch_size=None
    )
    assert bits(aggregator.model) == bits(expected)


def test_what_a_train_function_sets_is_gone_for_the_next_client(anywhere):
    def train(model, x, y, ctx):
        found = getattr(model, "visits", 0)
        model.visits = found + 1
        return {"found": float(found)}

    aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), anywhere), train)
    assert [record.metrics["found"] for record in aggregator.run(2)] == [0.0, 0.0]


def test_hooks_of_a_train_function_are_gone_for_the_next_client(anywhere):
    def train(model, x, y, ctx):
        found = len(model._forward_hooks)
        model.register_forward_hook(_doubled)
        return {"found": float(found)}

    aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), anywhere), train)
    assert [record.metrics["found"] for record in aggregator.run(2)] == [0.0, 0.0]


def autocast_on():
    torch.autocast("cpu", dtype=torch.bfloat16).__enter__()


def autocast_off():
    torch.autocast("cpu", enabled=False).__enter__()


def autocast_depth():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def autocast_dtype():
    return str(torch.get_autocast_dtype("cpu"))


def default_dtype():
    torch.set_default_dtype(torch.float64)


def default_device():
    torch.set_default_device("meta")


SWITCHES = [
    (autocast_on, lambda: torch.is_autocast_enabled("cpu"), False),
    (autocast_off, autocast_depth, 0),
    (lambda: torch.set_autocast_dtype("cpu", torch.float16), autocast_dtype, "torch.bfloat16"),
    (lambda: torch.set_autocast_cache_enabled(False), torch.is_autocast_cache_enabled, True),
    (default_dtype, lambda: str(torch.get_default_dtype()), "torch.float32"),
    (default_device, lambda: str(torch.get_default_device()), "cpu"),
    (lambda: torch.set_num_threads(3), torch.get_num_threads, 1),
    (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.get_deterministic_debug_mode,
        0,
    ),
    (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled, False),
    (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled, True),
]


@pytest.mark.parametrize(("turn", "read", "usual"), SWITCHES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_switch_that_a_train_function_turned_is_back_for_the_next_client(
    anywhere, turn, read, usual, fails
):
    def train(model, x, y, ctx):
        found = read()
        turn()
        if fails and ctx.client == "b":
            raise ValueError(ctx.client)
        return {"usual": float(found == usual)}

    aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), anywhere), train)
    history = aggregator.run(2)
    assert [record.metrics["usual"] for record in history] == [1.0, 1.0]
    assert [set(record.failures) for record in history] == [{"b"} if fails else set()] * 2


class Turning(nn.Module):
    """Turns a switch in one client, which fails; what it computes with depends on most of them."""

    def __init__(self, turn):
        super().__init__()
        self.inner, self.turn = linear(), turn

    def forward(self, x):
        out = self.inner((x * torch.full((6,), 0.1)).to(x.dtype))
        if len(x) == SIZES[0]:
            self.turn()
            raise ValueError("before it is turned back")
        return out


@pytest.mark.parametrize("turn", [autocast_on, default_dtype, default_device])
def test_a_switch_that_a_forward_turned_is_back_for_the_next_client(anywhere, turn):
    local = LocalTraining(cross_entropy, sgd, batch_size=None)
    data = FederatedDataset(shards(SIZES), anywhere)
    aggregator = Aggregator(Turning(turn), data, local)
    history = aggregator.run(2)
    assert [set(record.failures) for record in history] == [{"a"}, {"a"}]
    others = {client: rows for client, rows in shards(SIZES).items() if client != "a"}
    expected = sequential_fedavg(
        Turning(turn), others, cross_entropy, sgd, rounds=2, batch_size=None
    )
    assert bits(aggregator.model) == bits(expected)


def test_what_autocast_keeps_of_parameters_is_gone_for_the_next_client(anywhere):
    def train(model, x, y, ctx):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(x)
        exact = copy.deepcopy(model).bfloat16()(x.bfloat16())
        with torch.no_grad():
            model.weight.mul_(2.0)
        autocast_on()
        model(x)  # which keeps what it made of the weight
        return {"exact": float(torch.equal(found, exact))}

    aggregator = Aggregator(linear(), FederatedDataset(shards(SIZES), anywhere), train)
    assert [record.metrics["exact"] for record in aggregator.run(2)] == [1.0, 1.0]


def test_a_client_that_is_evaluated_leaves_nothing_to_the_next(anywhere):
    class Drawing(Counting):
        def forward(self, x):
            return super().forward(x) + torch.rand(3)

    local = LocalTraining(TallyingLoss(), sgd)
    together = Aggregator(Drawing(), FederatedDataset(shards(SIZES), anywhere), local)
    found = together.evaluate_clients()
    for client, rows in shards(SIZES).items():
        alone = Aggregator(Drawing(), FederatedDataset({client: rows}, anywhere), local)
        assert found[client] == alone.evaluate_clients()[client]


class Noisy(nn.Module):
    """Draws in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return self.inner(nn.functional.dropout(x, 0.5))


class Shrinking(nn.Module):
    """Writes to a parameter in eval mode."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if not self.training:
            self.scale.mul_(0.5)
        return self.inner(x) * self.scale


@pytest.mark.parametrize("make", [Noisy, Shrinking, Counting])
def test_an_evaluation_does_not_depend_on_who_is_evaluated_where(make):
    local, found = LocalTraining(cross_entropy, sgd), []
    for workers in (1, 2, 3):
        with Cluster(workers, transport="inline") as cluster:
            aggregator = Aggregator(make(), FederatedDataset(shards(SIZES), cluster), local)
            rows = shards([900])["a"]
            found.append((aggregator.evaluate_clients(), aggregator.evaluate(rows)))
    assert found[0] == found[1] == found[2]


class OnceTraining(nn.Module):
    """A loss that is in train mode for its first batch, with a weight that gathers a gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        gathered = 0.0 if self.weight.grad is None else float(self.weight.grad)
        mode = 2.0 if self.training else 1.0
        self.eval()
        return (mode + gathered) * self.weight * cross_entropy(outputs, targets)


class Hiding(nn.Module):
    """The same, by a part and a tensor that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.hidden = [nn.Identity(), torch.ones((), requires_grad=True)]

    def forward(self, x):
        part, scale = self.hidden
        gathered = 0.0 if scale.grad is None else float(scale.grad)
        mode = 2.0 if part.training else 1.0
        part.eval()
        return self.inner(x) * (mode + gathered) * scale


@pytest.mark.parametrize(
    ("model", "loss"), [(linear, OnceTraining()), (Hiding, cross_entropy)], ids=["loss", "hidden"]
)
def test_modes_and_gradients_that_torch_would_not_reset_are_as_they_were(anywhere, model, loss):
    local = LocalTraining(loss, sgd, batch_size=4, shuffle=False)
    aggregator = Aggregator(model(), FederatedDataset(shards(SIZES), anywhere), local)
    aggregator.run(2)
    alone = Aggregator(model(), FederatedDataset(shards(SIZES), anywhere), local)
    for _ in range(2):
        trained, weights = [], []
        for x, y in shards(SIZES).values():
            own, criterion = copy.deepcopy((alone.model, loss))
            optimizer = sgd(own.parameters())
            for xs, ys in zip(x.split(4), y.split(4), strict=True):
                optimizer.zero_grad()
                criterion(own(xs), ys).backward()
                optimizer.step()
            trained.append(own)
            weights.append(float(len(x)))
        alone.model.load_state_dict(fp.weighted_average(trained, weights).state_dict())
    assert bits(aggregator.model) == bits(alone.model)


def test_hooks_of_a_factory_are_gone_after_the_question_for_affine_steps(anywhere):
    found = []
    for vectorize in (False, True):
        data = FederatedDataset(shards([12]), anywhere)
        local = LocalTraining(cross_entropy, hooked, batch_size=None)
        aggregator = Aggregator(linear(), data, local, vectorize=vectorize)
        aggregator.run(2)
        found.append(bits(aggregator.model))
    assert found[0] == found[1]  # a single client trains alone


def test_a_buffer_of_another_shape_is_a_failure_of_the_client(anywhere):
    class Growing(Assigning):
        def forward(self, x):
            self.mean = torch.zeros(7)
            return self.inner(x)

    local = LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(Growing(), FederatedDataset(shards(SIZES), anywhere), local)
    with pytest.raises(fp.QuorumError, match="of another shape or dtype"):
        aggregator.run(1)


def test_the_mode_of_an_evaluation_does_not_stay(anywhere):
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(linear(), data, local)
    with torch.inference_mode():
        aggregator.evaluate(shards([20])["a"])
        aggregator.evaluate_clients()
    history = aggregator.run(2)
    assert [dict(record.failures) for record in history] == [{}, {}]
    expected = sequential_fedavg(linear(), shards(SIZES), cross_entropy, sgd, rounds=2)
    assert bits(aggregator.model) == bits(expected)


def test_a_round_in_inference_mode_is_one_as_any(anywhere):
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(linear(), data, local)
    aggregator.run(1)
    with torch.inference_mode():
        aggregator.run(1)
    expected = sequential_fedavg(linear(), shards(SIZES), cross_entropy, sgd, rounds=2)
    assert bits(aggregator.model) == bits(expected)


def test_another_default_dtype_between_rounds(anywhere):
    local = LocalTraining(cross_entropy, sgd, batch_size=4)
    aggregator = Aggregator(Doubling(), FederatedDataset(shards(SIZES), anywhere), local)
    aggregator.run(1)  # steps are captured
    fresh = Aggregator(aggregator.model, FederatedDataset(shards(SIZES), anywhere), local)
    fresh._course.round = 1
    torch.set_default_dtype(torch.float64)
    try:
        for each in (aggregator, fresh):
            assert not each.run_round().failures
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(aggregator.model) == bits(fresh.model)


class Doubling(nn.Module):
    """What it computes with depends on the default dtype."""

    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return self.inner((x * torch.ones(6)).to(self.inner.weight.dtype))


# ---------------------------------------------------------------- between rounds


def dropping(p=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(p), nn.Linear(8, 3))


def changed_p(aggregator):
    aggregator.model[1].p = 0.9


def changed_hook(aggregator):
    aggregator.model[1].register_forward_hook(_doubled)


def changed_part(aggregator):
    aggregator.model[1] = nn.Tanh()


def _doubled(module, args, output):
    return 2 * output


@pytest.mark.parametrize("change", [changed_p, changed_hook, changed_part])
def test_what_is_changed_between_rounds_reaches_all_workers(anywhere, change):
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(dropping(), data, local)
    aggregator.run(1)
    change(aggregator)
    halfway = copy.deepcopy(aggregator.model)
    aggregator.run(1)

    fresh = Aggregator(halfway, FederatedDataset(shards(SIZES), anywhere), local)
    fresh._course.round = 1  # the streams of clients are those of the second round
    fresh.run(1)
    assert bits(aggregator.model) == bits(fresh.model)


def test_looking_at_the_model_does_not_change_it(anywhere):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = linear(), None

        def forward(self, x):
            self.last = self.inner(x)
            return self.last

    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(Keeping(), data, local)
    aggregator.run(1)
    trainers = {name: member.trainer for name, member in aggregator._course._crew._members.items()}
    aggregator.model.eval()
    aggregator.model(torch.ones(2, 6))
    aggregator.run(1)
    now = {name: member.trainer for name, member in aggregator._course._crew._members.items()}
    assert now.keys() == trainers.keys()
    assert all(now[name] is trainers[name] for name in now)


def test_a_frozen_parameter_that_was_replaced_reaches_all_workers(anywhere):
    model = nn.Sequential(linear(classes=6), linear())
    model[0].requires_grad_(False)
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(model, data, local)
    aggregator.run(1)
    weight = nn.Parameter(torch.full((6, 6), 0.5), requires_grad=False)
    aggregator.model[0].weight = weight
    fresh = Aggregator(aggregator.model, FederatedDataset(shards(SIZES), anywhere), local)
    fresh._course.round = 1
    aggregator.run(1)
    fresh.run(1)
    assert bits(aggregator.model) == bits(fresh.model)


def test_weights_of_a_loss_that_were_replaced_reach_all_workers(anywhere):
    loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(loss, sgd)
    aggregator = Aggregator(linear(), data, local)
    aggregator.run(1)
    loss.weight = torch.tensor([10.0, 1.0, 1.0])
    fresh = Aggregator(aggregator.model, FederatedDataset(shards(SIZES), anywhere), local)
    fresh._course.round = 1
    aggregator.run(1)
    fresh.run(1)
    assert bits(aggregator.model) == bits(fresh.model)


def test_a_lost_worker_changes_no_bit_of_a_model_that_was_changed():
    found = []
    for loses in (False, True):
        with Cluster(2, restart=True) as cluster:
            data = FederatedDataset(shards(SIZES), cluster)
            aggregator = Aggregator(dropping(), data, LocalTraining(cross_entropy, sgd))
            aggregator.run(1)
            changed_p(aggregator)
            if loses:
                cluster.workers[0].kill()
            aggregator.run(2)
            found.append(bits(aggregator.model))
    assert found[0] == found[1]


def test_a_number_of_the_loss_is_one_of_the_model(anywhere):
    loss = nn.CrossEntropyLoss()
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(loss, sgd)
    aggregator = Aggregator(linear(), data, local)
    loss.label_smoothing = 0.5
    aggregator.run(1)
    loss.label_smoothing = 0.0
    aggregator.run(1)
    between = sequential_fedavg(
        linear(), shards(SIZES), nn.CrossEntropyLoss(label_smoothing=0.5), sgd, rounds=1
    )
    again = Aggregator(between, FederatedDataset(shards(SIZES), anywhere), local)
    again._course.round = 1
    again.run(1)
    assert bits(aggregator.model) == bits(again.model)


# ---------------------------------------------------------------- what a capture brings along


def test_a_capture_does_not_import_the_compiler():
    def compilers():
        import sys

        return [name for name in sys.modules if "symbolic_shapes" in name or name == "sympy"]

    with Cluster(1) as cluster:
        data = FederatedDataset(shards([16, 16]), cluster)
        local = LocalTraining(
            cross_entropy, functools.partial(torch.optim.SGD, lr=0.1), batch_size=4
        )
        Aggregator(linear(), data, local).run(2)
        assert cluster.workers[0].run(compilers).get() == []


# ---------------------------------------------------------------- early and late trainers


class Factory:
    rate = 0.1

    def __call__(self, parameters):
        return torch.optim.SGD(parameters, lr=self.rate)


def halve_keyword(aggregator):
    aggregator.local.optimizer.keywords["lr"] *= 0.5


def halve_attribute(aggregator):
    aggregator.local.optimizer.rate *= 0.5


def double_class_weight(aggregator):
    aggregator.local.loss.weight.data.mul_(torch.tensor([2.0, 1.0, 1.0]))


def weighted():
    return nn.CrossEntropyLoss(weight=torch.ones(3))


def keyword():
    return functools.partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("loss", "optimizer", "change"),
    [
        (nn.CrossEntropyLoss, keyword, halve_keyword),
        (nn.CrossEntropyLoss, Factory, halve_attribute),
        (weighted, keyword, double_class_weight),
    ],
)
def test_local_training_that_is_changed_between_rounds_is_changed_for_all(
    anywhere, loss, optimizer, change
):
    data, local = FederatedDataset(shards(SIZES), anywhere), LocalTraining(loss(), optimizer())
    aggregator = Aggregator(linear(), data, local)
    aggregator.run(1)
    halfway = copy.deepcopy(aggregator.model)
    change(aggregator)
    aggregator.run(1)

    fresh = Aggregator(halfway, FederatedDataset(shards(SIZES), anywhere), copy.deepcopy(local))
    fresh._course.round = 1  # the streams of clients are those of the second round
    fresh.run(1)
    assert bits(aggregator.model) == bits(fresh.model)


def test_a_global_of_the_factory_that_is_changed_is_changed_for_all():
    scope = {"torch": torch, "RATES": {"lr": 0.1}}  # by value, as code of a notebook travels
    exec("def factory(p): return torch.optim.SGD(p, lr=RATES['lr'])", scope)
    found = []
    for workers in (1, 2):
        scope["RATES"]["lr"] = 0.1
        with Cluster(workers) as cluster:
            data = FederatedDataset(shards(SIZES), cluster)
            local = LocalTraining(cross_entropy, scope["factory"])
            aggregator = Aggregator(linear(), data, local, clients_per_round=1)
            for _ in range(4):
                aggregator.run(1)
                scope["RATES"]["lr"] *= 0.5
        found.append(bits(aggregator.model))
    assert found[0] == found[1]


class Scaled(nn.Module):
    """Keeps what workers are told once: a frozen value, a list, a plain tensor, a function."""

    def __init__(self):
        super().__init__()
        self.inner = linear()
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.list, self.tensor, self.act = [1.0], torch.ones(6), torch.relu

    def forward(self, x):
        return self.act(self.inner(x * self.frozen * self.list[0] * self.tensor))


def write_past_autograd(model):
    model.frozen.data.mul_(0.5)


def change_list(model):
    model.list[0] *= 0.5


def change_tensor(model):
    model.tensor.mul_(0.5)


def change_function(model):
    model.act = torch.tanh


def add_attribute(model):
    model.extra = 2.0


@pytest.mark.parametrize(
    "change", [write_past_autograd, change_list, change_tensor, change_function, add_attribute]
)
def test_trainers_that_are_made_late_are_like_the_others(change):
    """Noticed or not: the number of workers, and whether one is lost, must not decide."""
    found = []
    for workers, loses in ((1, False), (2, False), (2, True)):
        with Cluster(workers, restart=True) as cluster:
            data = FederatedDataset(shards(SIZES), cluster)
            aggregator = Aggregator(
                Scaled(), data, LocalTraining(cross_entropy, sgd), clients_per_round=1
            )
            for _ in range(4):
                aggregator.run(1)
                change(aggregator.model)
                if loses:
                    cluster.workers[0].kill()
                    loses = False
        found.append(bits(aggregator.model))
    assert found[0] == found[1] == found[2]


def test_a_function_of_the_model_that_was_replaced_reaches_all_workers(anywhere):
    local = LocalTraining(cross_entropy, sgd)
    aggregator = Aggregator(Scaled(), FederatedDataset(shards(SIZES), anywhere), local)
    aggregator.run(1)
    change_function(aggregator.model)
    fresh = Aggregator(aggregator.model, FederatedDataset(shards(SIZES), anywhere), local)
    fresh._course.round = 1
    aggregator.run(1)
    fresh.run(1)
    assert bits(aggregator.model) == bits(fresh.model)


def test_local_training_that_stays_keeps_its_trainers(anywhere):
    data = FederatedDataset(shards(SIZES), anywhere)
    local = LocalTraining(weighted(), lambda parameters: sgd(parameters))
    aggregator = Aggregator(linear(), data, local)
    aggregator.run(1)
    before = {name: member.trainer for name, member in aggregator._course._crew._members.items()}
    aggregator.run(1)
    now = {name: member.trainer for name, member in aggregator._course._crew._members.items()}
    assert all(now[name] is before[name] for name in before)
