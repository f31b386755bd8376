"""Clients trained at once, against the same clients trained one after the other."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from fedproc.client.layout import Layout
from fedproc.client.program import Program
from fedproc.client.row_loss import NotVectorizableError
from fedproc.client.rules import ControlVariates, Proximal
from fedproc.client.trainer import Trainer
from fedproc.client.training import LocalTraining
from fedproc.client.update import Task, pack_tasks
from fedproc.client.vectorizable import require_vectorizable
from fedproc.client.work import Span, Work

SIZES = [1, 9, 3, 8, 30, 17]  # of batches of 8: less than one, one, one and a bit, several
CE = nn.CrossEntropyLoss()
WEIGHTS = torch.tensor([1.0, 2.0, 9.0])
sgd = functools.partial(torch.optim.SGD, lr=0.1)
optim = functools.partial


def mlp(features=5, classes=3):
    return nn.Sequential(nn.Linear(features, 7), nn.Tanh(), nn.Linear(7, classes))


def rows_of(sizes=SIZES, features=(5,), classes=3):
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(classes, (sum(sizes),), generator=draw)
    return torch.randn(len(y), *features, generator=draw), y


def trainer(model, local, rows=None, *, sizes=SIZES, apart=False, **work):
    """A trainer whose clients lie in one block of rows, or ``apart`` in a block each."""
    rows = rows or rows_of(sizes)
    pieces = list(zip(*(part.split(sizes) for part in rows), strict=True))
    spans, end = {}, 0
    for place, size in enumerate(sizes):
        spans[f"c{place}"] = Span(place, 0, size) if apart else Span(0, end, end + size)
        end += size
    return Trainer(model, Work(local, **work), pieces if apart else [rows], spans)


def start(model):
    layout = Layout.of(model)
    return layout, layout.pack(layout.tensors(model), layout.new_block())


def tasks_of(count=6, number=2):
    return pack_tasks([Task(f"c{place}", number, 7, place) for place in range(count)])


def both(model, local, rows=None, *, states=None, shared=None, sizes=SIZES, **options):
    """Trains the same clients at once and one by one: two lists of (vector, update)."""
    torch.manual_seed(0)
    model = model() if isinstance(model, type(mlp)) else model
    layout, block = start(model)
    found = []
    for method in ("train_stack", "train_some"):
        there = trainer(model, local, rows, sizes=sizes, **options)
        # first by autograd, then captured, then replayed, where the model allows it
        first, _, result = (
            getattr(there, method)(block, tasks_of(len(sizes)), copy.deepcopy(states), shared)
            for _ in range(3)
        )
        assert torch.equal(first.blocks, result.blocks)
        vectors = [layout.flat_trained(row[: layout.nbytes]) for row in result.blocks]
        found.append(list(zip(vectors, result.unpacked(layout.nbytes), strict=True)))
    return found


def require_equal(found, atol=1e-5):
    for (stacked, ours), (alone, theirs) in zip(*found, strict=True):
        torch.testing.assert_close(stacked, alone, rtol=0, atol=atol)
        for name in ("examples", "steps", "step_norm", "rows"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-4)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4)
        assert ours.state.keys() == theirs.state.keys()
        assert ours.began < ours.ended


def two_rates(parameters):
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.05}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "optimizer",
    [
        sgd,
        optim(torch.optim.SGD, lr=0.1, momentum=0.9),
        optim(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        optim(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
        optim(torch.optim.SGD, lr=0.1, maximize=True),
        optim(torch.optim.Adam, lr=0.01),
        optim(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
        optim(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        optim(torch.optim.RMSprop, lr=0.01, momentum=0.5),
        optim(torch.optim.Adagrad, lr=0.1),
        optim(torch.optim.NAdam, lr=0.01),
        two_rates,
    ],
    ids=lambda o: (
        f"{o.func.__name__}{o.keywords}" if isinstance(o, functools.partial) else "groups"
    ),
)
def test_every_optimizer_does_to_a_stack_what_it_does_to_each_client(optimizer):
    require_equal(both(mlp, LocalTraining(CE, optimizer, batch_size=8, epochs=3)))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 8},
        {"batch_size": 8, "shuffle": False, "epochs": 2},
        {"batch_size": None, "epochs": 2},
        {"batch_size": 100},
        {"batch_size": 1},
        {"batch_size": 8, "epochs": 3, "max_steps": 4},
        {"batch_size": 8, "max_steps": 1},
        {"batch_size": 8, "epochs": 2, "clip_grad_norm": 0.1},
    ],
    ids=str,
)
def test_batches_are_those_of_each_client(options):
    momentum = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    require_equal(both(mlp, LocalTraining(CE, momentum, **options)))


@pytest.mark.parametrize(
    "loss",
    [
        CE,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"),
        nn.functional.cross_entropy,
        lambda out, y: nn.functional.nll_loss(out.log_softmax(1), y),
        lambda out, y: (out.logsumexp(1) - out.gather(1, y[:, None])[:, 0]).sum(),
        lambda out, y: nn.functional.mse_loss(out, nn.functional.one_hot(y, 3).float()),
    ],
)
def test_losses_of_labels(loss):
    local = LocalTraining(loss, functools.partial(torch.optim.SGD, lr=0.01), batch_size=8)
    require_equal(both(mlp, local))


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(reduction="sum"), nn.BCEWithLogitsLoss()]
)
def test_losses_of_vectors(loss):
    x, y = rows_of()
    rows = x, nn.functional.one_hot(y, 3).float()
    require_equal(both(mlp, LocalTraining(loss, sgd, batch_size=8, epochs=2), rows))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_divergences_of_distributions(reduction):
    x, y = rows_of()
    rows = x, nn.functional.one_hot(y, 3) * 0.7 + 0.1
    loss = nn.KLDivLoss(reduction=reduction)
    local = LocalTraining(loss, functools.partial(torch.optim.SGD, lr=0.01), batch_size=8)
    require_equal(both(lambda: mlp().append(nn.LogSoftmax(1)), local, rows))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.scale


def frozen():
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))
    net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize("make", [Tied, frozen, lambda: mlp().double()])
def test_models(make):
    torch.manual_seed(0)
    x, y = rows_of()
    model = make()
    rows = x.to(next(model.parameters()).dtype), y
    require_equal(both(model, LocalTraining(CE, sgd, batch_size=8, epochs=2), rows))


def test_images_and_buffers_that_travel():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 3),
    )  # fmt: skip
    model.register_buffer("note", torch.tensor([1.5, 2.5]))
    found = both(model, LocalTraining(CE, sgd, batch_size=8), rows_of(features=(1, 8, 8)))
    require_equal(found)


def test_words():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(11, (sum(SIZES), 4), generator=draw), rows_of()[1]
    model = nn.Sequential(nn.Embedding(11, 3), nn.Flatten(), nn.Linear(12, 3))
    require_equal(both(model, LocalTraining(CE, sgd, batch_size=8, epochs=2), rows))


def test_frozen_values_and_buffers_come_back_as_they_were_sent():
    torch.manual_seed(0)
    model = Tied()
    layout, block = start(model)
    there = trainer(model, LocalTraining(CE, sgd, batch_size=8))
    result = there.train_stack(block, tasks_of())
    for section in (*layout.of_kind("mean"), *layout.of_kind("largest")):
        for row in result.blocks:
            assert torch.equal(section.view(row[: layout.nbytes]), section.view(block))


def test_clients_in_blocks_of_their_own():
    require_equal(both(mlp, LocalTraining(CE, sgd, batch_size=8, epochs=2), apart=True))


def test_the_proximal_term():
    local = LocalTraining(CE, sgd, batch_size=8, epochs=3)
    pulled = both(mlp, local, rule=Proximal(0.5))
    require_equal(pulled)
    free = both(mlp, local, rule=Proximal(0.0))
    require_equal(free)
    assert float((pulled[0][4][0] - free[0][4][0]).abs().max()) > 1e-3


def test_control_variates_and_what_is_kept_of_them():
    count = sum(p.numel() for p in mlp().parameters())
    draw = torch.Generator().manual_seed(3)
    shared = {"c": 0.1 * torch.randn(count, generator=draw, dtype=torch.float64)}
    states = {
        "c1": {"c_i": 0.1 * torch.randn(count, generator=draw)},
        "c4": {"c_i": torch.ones(count)},
    }
    local = LocalTraining(CE, sgd, batch_size=8, epochs=2)
    found = both(mlp, local, states=states, shared=shared, rule=ControlVariates())
    require_equal(found)
    for (_, ours), (_, theirs) in zip(*found, strict=True):
        assert ours.state["c_i"].dtype == theirs.state["c_i"].dtype
        torch.testing.assert_close(ours.state["c_i"], theirs.state["c_i"], rtol=0, atol=1e-4)


def test_the_same_clients_at_once_are_the_same_bits():
    local = LocalTraining(CE, sgd, batch_size=8, epochs=2)
    first, second = (both(mlp, local)[0] for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- failures


def results(there, block):
    made = there.train_stack(block, tasks_of())
    return made.blocks, list(made.unpacked(len(block)))


def test_a_loss_that_is_not_finite_is_the_failure_of_one_client():
    torch.manual_seed(0)
    model = mlp()
    _, block = start(model)
    x, y = rows_of()
    local = LocalTraining(CE, sgd, batch_size=8, epochs=2)
    clean, _ = results(trainer(model, local, (x, y)), block)
    broken = x.clone()
    broken[2] = math.nan  # the second row of c1
    there = trainer(model, local, (broken, y))
    blocks, updates = results(there, block)
    assert [place for place, update in enumerate(updates) if update is None] == [1]
    for place in (0, 2, 3, 4, 5):
        assert torch.equal(blocks[place], clean[place])
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d"):
        there.failure("c1")
    with pytest.raises(KeyError):
        there.failure("c0")


def test_an_update_that_is_not_finite_is_a_failure_with_the_name_of_the_tensor():
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)  # no class is certain, so the large row has a gradient
    layout, block = start(model)
    x, y = torch.zeros(sum(SIZES), 5), rows_of()[1]
    x[3] = 1e20  # a row of c1: the loss before its only step is finite, the weights are not
    huge = functools.partial(torch.optim.SGD, lr=1e30)
    there = trainer(model, LocalTraining(CE, huge, batch_size=None), (x, y))
    blocks, updates = results(there, block)
    assert [place for place, update in enumerate(updates) if update is None] == [1]
    for place in (0, 2, 3, 4, 5):
        assert layout.non_finite(layout.slot(blocks[place])) is None
    with pytest.raises(FloatingPointError, match=r"round 2: the update of client 'c1' .*'weight'"):
        there.failure("c1")


def test_rows_that_raise_are_the_failure_of_their_client_only():
    x, y = rows_of()
    y[2] = 99  # a row of c1
    torch.manual_seed(0)
    model = mlp()
    layout, block = start(model)
    local = LocalTraining(CE, sgd, batch_size=8)
    there, alone = trainer(model, local, (x, y)), trainer(model, local, (x, y))
    blocks, updates = results(there, block)
    made = alone.train_some(block, tasks_of())
    assert [place for place, update in enumerate(updates) if update is None] == [1]
    for place in (0, 2, 3, 4, 5):
        ours, theirs = (
            layout.flat_trained(b[place][: layout.nbytes]) for b in (blocks, made.blocks)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(IndexError, match="99"):
        there.failure("c1")


def test_the_streams_of_the_process_and_the_model_stay_as_they_were():
    torch.manual_seed(0)
    model = mlp()
    _, block = start(model)
    there = trainer(model, LocalTraining(CE, sgd, batch_size=8))
    before = torch.random.get_rng_state()
    there.train_stack(block, tasks_of())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_few_private_rows_take_their_numbers_along_only_in_the_sum():
    model = mlp()
    _, block = start(model)
    there = trainer(model, LocalTraining(CE, sgd, batch_size=8), private_rows=9)
    _, updates = results(there, block)
    assert [bool(update.metrics) for update in updates] == [size >= 9 for size in SIZES]


# ---------------------------------------------------------------- what is refused


class Plain(nn.Module):
    """A linear layer and a twist."""

    def __init__(self, twist):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.twist = twist

    def forward(self, x):
        return self.twist(self, self.layer(x))


def counting(model, out):
    model.seen += 1
    return out


def branching(_, out):
    return out if out.sum() > 0 else -out


def middling(_, out):
    return out - out.mean(0)


def numbering(_, out):
    return out * torch.arange(1.0, len(out) + 1)[:, None]


def summing(_, out):
    return out.cumsum(0)


def beginning(_, out):
    return out + out[:1]


def dropping(_, out):
    return nn.functional.dropout(out, 0.5)


def pairing(_, out):
    return out, out


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), "1 .BatchNorm1d. .*GroupNorm"),
        (nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1)), "1 .Dropout. .*set p=0"),
        (nn.LSTM(5, 3), "model .LSTM. .*cells"),
        (nn.Sequential(nn.Embedding(5, 3, sparse=True)), "sparse gradients"),
        (nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3).double()), "all in float64"),
        (nn.Linear(5, 3).bfloat16(), "bfloat16"),
    ],
)
def test_modules_that_are_refused_at_sight(model, reason):
    with pytest.raises(NotVectorizableError, match=reason) as caught:
        require_vectorizable(model, LocalTraining(CE, sgd), None)
    assert isinstance(caught.value, ValueError)


def test_modules_that_do_nothing_in_the_way_are_not():
    quiet = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0), nn.InstanceNorm1d(3))
    require_vectorizable(quiet, LocalTraining(CE, sgd), None)


def test_a_train_function_is_refused():
    with pytest.raises(NotVectorizableError, match="needs LocalTraining"):
        require_vectorizable(mlp(), lambda model, x, y, ctx: {}, None)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "class weights"),
        (nn.NLLLoss(weight=torch.ones(3)), "class weights"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction='none'"),
    ],
)
def test_losses_that_are_refused_at_sight(loss, reason):
    with pytest.raises(NotVectorizableError, match=reason):
        require_vectorizable(mlp(), LocalTraining(loss, sgd), None)


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        (counting, "writes to its buffers"),
        (branching, r"data-dependent control flow|vmap cannot run"),
        (middling, "depends on the other rows"),
        (numbering, "depends on the other rows"),
        (summing, "depends on the other rows"),
        (beginning, "depends on the other rows"),
        (dropping, "depends on the other rows of its batch, or is drawn at random"),
        (pairing, "returns one tensor"),
    ],
)
def test_models_that_are_refused_when_they_are_tried(twist, reason):
    torch.manual_seed(0)
    model = Plain(twist)
    _, block = start(model)
    loss = (lambda out, y: CE(out[0], y)) if twist is pairing else CE
    there = trainer(model, LocalTraining(loss, sgd, batch_size=8))
    with pytest.raises(NotVectorizableError, match=reason):
        there.train_stack(block, tasks_of())


@pytest.mark.parametrize(
    ("local", "reason"),
    [
        (LocalTraining(lambda o, y: CE(o, y).sqrt(), sgd), "neither the mean nor the sum"),
        (
            LocalTraining(lambda o, y: nn.functional.cross_entropy(o, y, WEIGHTS), sgd),
            "neither the mean nor the sum",
        ),
        (LocalTraining(CE, torch.optim.LBFGS), "LBFGS cannot step"),
        (LocalTraining(CE, optim(torch.optim.Adam, differentiable=True)), "differentiable=True"),
        (
            LocalTraining(CE, optim(torch.optim.SGD, lr=0.1, differentiable=True)),
            "differentiable=True",
        ),
        (LocalTraining(CE, lambda p: sgd(p[:1]), clip_grad_norm=1.0), "add up from step to step"),
        (LocalTraining(nn.CrossEntropyLoss(ignore_index=2), sgd), "some targets are 2"),
    ],
)  # fmt: skip
def test_local_training_that_is_refused_when_it_is_tried(local, reason):
    torch.manual_seed(0)
    model = mlp()
    _, block = start(model)
    with pytest.raises(NotVectorizableError, match=reason):
        trainer(model, local).train_stack(block, tasks_of())


def masked(outputs, targets):
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    kept = (targets != 0).float()
    return (losses * kept).sum() / kept.sum().clamp(min=1)


def observed(outputs, targets):
    known = ~targets.isnan()
    return ((outputs - targets.nan_to_num()).square() * known).sum() / known.sum()


def padding(value, places):
    """Classes 1 and 2 in each row, once or three times; the rows of one client end in padding."""
    x, y = rows_of()
    y = (1 + y % 2).view(-1, *[1] * bool(places)).repeat(1, *[3] * bool(places))
    last = slice(sum(SIZES[:4]) + 25, sum(SIZES[:5]))
    y[(last, slice(1, None)) if places else last] = value
    return x, y


def gaps():
    x, y = rows_of()
    targets = nn.functional.one_hot(y, 3).float()
    targets[40, 1] = math.nan
    return x, targets


def nets(places, zeros=False):
    model = nn.Sequential(nn.Linear(5, 9), nn.Unflatten(1, (3, 3))) if places else nn.Linear(5, 3)
    if zeros:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    return model


@pytest.mark.parametrize("zeros", [False, True], ids=["drawn", "zeros"])
@pytest.mark.parametrize("apart", [False, True], ids=["block", "apart"])
@pytest.mark.parametrize("places", [False, True], ids=["labels", "sequences"])
@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (lambda o, y: nn.functional.cross_entropy(o, y), -100),
        (lambda o, y: nn.functional.cross_entropy(o, y, ignore_index=0), 0),
        (lambda o, y: nn.functional.cross_entropy(o, y, ignore_index=255), 255),
        (masked, 0),
    ],
    ids=["-100", "0", "255", "masked"],
)
def test_targets_that_a_loss_leaves_out_are_found_in_any_row(loss, value, places, apart, zeros):
    torch.manual_seed(0)
    model = nets(places, zeros)
    _, block = start(model)
    rows = padding(value, places)
    there = trainer(model, LocalTraining(loss, sgd, batch_size=8), rows, apart=apart)
    with pytest.raises(NotVectorizableError, match=r"leaves them out|neither the mean|not weigh"):
        there.train_stack(block, tasks_of())


def test_values_that_a_loss_takes_as_missing_are_found():
    torch.manual_seed(0)
    model = mlp()
    _, block = start(model)
    there = trainer(model, LocalTraining(observed, sgd, batch_size=8), gaps())
    with pytest.raises(NotVectorizableError, match=r"neither the mean|not weigh"):
        there.train_stack(block, tasks_of())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_finite_loss_are_no_reason_to_refuse(bad):
    torch.manual_seed(0)
    x, y = rows_of()
    y[45] = -1  # the class of one row, which has no finite loss
    x[45] = bad
    loss = LocalTraining(lambda o, y: CE(o, y % 3), sgd, batch_size=8)
    layout, block = start(mlp())
    there = trainer(mlp(), loss, (x, y))
    for train in (there.train_stack, there.train_some):
        updates = train(block, tasks_of()).unpacked(layout.nbytes)
        assert [update is None for update in updates] == [False, False, False, False, True, False]
        with pytest.raises(FloatingPointError, match="the loss is"):
            there.failure("c4")


def test_padding_is_no_matter_to_a_sum_or_where_all_rows_have_as_much():
    x, y = padding(0, places=True)
    y[:, 1:] = 0
    require_equal(both(lambda: nets(True), LocalTraining(masked, sgd, batch_size=8), (x, y)))
    total = LocalTraining(lambda o, y: masked(o, y) * (y != 0).sum(), sgd, batch_size=8)
    require_equal(both(lambda: nets(True), total, padding(0, places=True)), atol=1e-4)


def test_a_parameter_without_a_gradient_is_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    _, block = start(model)
    with pytest.raises(NotVectorizableError, match="2 trained parameters get no gradient"):
        trainer(model, LocalTraining(CE, sgd)).train_stack(block, tasks_of())


def test_an_optimizer_with_hooks_is_refused():
    def watched(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer

    model = mlp()
    _, block = start(model)
    with pytest.raises(NotVectorizableError, match="hooks"):
        trainer(model, LocalTraining(CE, watched)).train_stack(block, tasks_of())


def test_steps_of_a_stack_are_replayed_when_their_shapes_come_again():
    model = mlp()
    _, block = start(model)
    there = trainer(model, LocalTraining(CE, sgd, batch_size=8))
    for _ in range(3):
        there.train_stack(block, tasks_of())
    found = there._stacks._stacks._programs._found.values()
    assert found
    assert all(isinstance(program, Program) for program in found)


def test_an_embedding_that_counts_the_rows_of_a_batch_is_refused():
    model = nn.Sequential(nn.Embedding(4, 6, scale_grad_by_freq=True), nn.Flatten(), mlp())
    with pytest.raises(NotVectorizableError, match="scale_grad_by_freq counts the rows"):
        require_vectorizable(model, LocalTraining(CE, sgd), None)
