"""Stacks that return the mean of their clients, against the mean of clients trained one by one."""

import functools
import math

import pytest
import torch
from torch import nn

from fedproc.client import single_step
from fedproc.client.orders import Orders, first_batches
from fedproc.client.rules import ControlVariates, Proximal
from fedproc.client.training import LocalTraining
from fedproc.client.update import Task, pack_tasks
from fedproc.client.vectorized import Stacks
from tests.client.test_vectorized import (
    CE,
    SIZES,
    mlp,
    optim,
    rows_of,
    sgd,
    start,
    tasks_of,
    trainer,
    two_rates,
)

WEIGHTS = [float(size) for size in SIZES]
ONE_STEP = {"batch_size": None}


def weighted_tasks(weights=WEIGHTS, number=2):
    tasks = [Task(f"c{n}", number, 7, n, weight=weight) for n, weight in enumerate(weights)]
    return pack_tasks(tasks)


def averaged(there, block, weights=WEIGHTS):
    """What one command gives: its result, the updates, and its first block as a vector."""
    made = there.train_stack(block, weighted_tasks(weights))
    return made, list(made.unpacked(len(block)))


def one_by_one(model, local, rows=None, **options):
    """The same clients one after the other: vectors and updates, None for one that failed."""
    layout, block = start(model)
    made = trainer(model, local, rows, **options).train_some(block, tasks_of())
    vectors = [layout.flat_trained(row[: layout.nbytes]) for row in made.blocks]
    return vectors, list(made.unpacked(len(block)))


def mean_of(vectors, updates, weights=WEIGHTS):
    done = [n for n, update in enumerate(updates) if update is not None]
    total = sum(weights[n] for n in done)
    return sum(vectors[n] * (weights[n] / total) for n in done)


def require_first(layout, made, expected):
    """The first block of what a command gives holds these values."""
    found = layout.flat_trained(made.blocks[0][: layout.nbytes])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def require_mean(model, local, rows=None, weights=WEIGHTS, **options):
    torch.manual_seed(0)
    model = model() if isinstance(model, type(mlp)) else model
    layout, block = start(model)
    there = trainer(model, local, rows, **options)
    for _ in range(3):  # by autograd, captured, replayed
        made, updates = averaged(there, block, weights)
    vectors, alone = one_by_one(model, local, rows, **options)
    expected = mean_of(vectors, alone, weights)
    (row,) = made.blocks
    found = layout.flat_trained(row[: layout.nbytes])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - layout.flat_trained(block)).abs().max()) > 1e-4  # it was trained
    done = [update for update in updates if update is not None]
    assert [update.block_weight for update in done] == pytest.approx(
        [sum(weights), *[0.0] * (len(done) - 1)]
    )
    assert torch.equal(done[0].block, row[: layout.nbytes])
    assert all(not len(update.block) for update in done[1:])
    for ours, theirs in zip(updates, alone, strict=True):
        for name in ("examples", "steps", "step_norm", "rows"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-4)
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4)
        assert ours.began < ours.ended


@pytest.fixture
def only_together(monkeypatch):
    """Fails if a stack takes its steps client by client."""
    monkeypatch.delattr(Stacks, "train")


@pytest.fixture
def only_apart(monkeypatch):
    """Fails if a stack takes one step for all."""
    monkeypatch.delattr(Stacks, "share_step")


PLAIN = [
    sgd,
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    optim(torch.optim.SGD, lr=0.1, momentum=0.9),
    optim(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    optim(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    optim(torch.optim.SGD, lr=0.1, maximize=True, weight_decay=0.1),
    two_rates,
]


@pytest.mark.parametrize("optimizer", [*PLAIN, optim(torch.optim.Adam, lr=0.01)])
def test_several_steps(optimizer, only_apart):
    require_mean(mlp, LocalTraining(CE, optimizer, batch_size=8, epochs=2))


@pytest.mark.parametrize("optimizer", PLAIN)
@pytest.mark.parametrize("weights", [WEIGHTS, [1.0] * len(SIZES), [0.5, 3.25, 1e3, 1.0, 7.0, 2.0]])
def test_one_step_is_one_for_all(optimizer, weights, only_together):
    require_mean(mlp, LocalTraining(CE, optimizer, **ONE_STEP), weights=weights)


@pytest.mark.parametrize("rows", [1, 8, 20])
def test_one_step_in_several_passes(rows, only_together, monkeypatch):
    monkeypatch.setattr(single_step, "_ROWS", rows)
    require_mean(mlp, LocalTraining(CE, sgd, **ONE_STEP))


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_step_of_clients_with_more_rows(shuffle, only_together):
    require_mean(mlp, LocalTraining(CE, sgd, batch_size=4, max_steps=1, shuffle=shuffle))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.functional.cross_entropy,
    ],
)
def test_one_step_of_other_losses(loss, only_together):
    require_mean(mlp, LocalTraining(loss, optim(torch.optim.SGD, lr=0.01), **ONE_STEP))


def test_one_step_of_float64(only_together):
    x, y = rows_of()
    model = mlp().double()
    require_mean(model, LocalTraining(CE, sgd, **ONE_STEP), (x.double(), y))


def test_one_step_of_a_model_with_frozen_tied_and_buffered_parts(only_together):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(5, 3).requires_grad_(False)
            self.register_buffer("scale", torch.tensor([1.5, 0.5, 1.0]))
            self.register_buffer("count", torch.tensor(3))

        def forward(self, x):
            return self.frozen(self.second(self.first(x))) * self.scale

    torch.manual_seed(0)
    model = Parts()
    require_mean(model, LocalTraining(CE, sgd, **ONE_STEP))
    layout, block = start(model)
    made, _ = averaged(trainer(model, LocalTraining(CE, sgd, **ONE_STEP)), block)
    for section in (*layout.of_kind("mean"), *layout.of_kind("largest")):
        assert torch.equal(section.view(made.blocks[0][: layout.nbytes]), section.view(block))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": optim(torch.optim.Adam, lr=0.01)},
        {"optimizer": optim(torch.optim.AdamW, lr=0.01)},
        {"optimizer": optim(torch.optim.RMSprop, lr=0.01)},
        {"clip_grad_norm": 0.1},
    ],
    ids=str,
)
def test_steps_that_are_no_affine_map_of_the_gradient_are_taken_apart(options, only_apart):
    options = {"optimizer": sgd, **ONE_STEP, **options}
    require_mean(mlp, LocalTraining(CE, **options))


@pytest.mark.parametrize("rule", [Proximal(0.5), ControlVariates()], ids=str)
def test_corrected_steps_are_taken_apart(rule, only_apart):
    torch.manual_seed(0)
    model = mlp()
    layout, block = start(model)
    count = layout.trained_numel
    shared = {} if isinstance(rule, Proximal) else {"c": torch.ones(count, dtype=torch.float64)}
    local = LocalTraining(CE, sgd, **ONE_STEP)
    there = trainer(model, local, rule=rule)
    made = there.train_stack(block, weighted_tasks(), {}, shared)
    alone = trainer(model, local, rule=rule).train_some(block, tasks_of(), {}, shared)
    vectors = [layout.flat_trained(row[: layout.nbytes]) for row in alone.blocks]
    expected = mean_of(vectors, list(alone.unpacked(len(block))))
    require_first(layout, made, expected)
    assert len(made.states) == (0 if isinstance(rule, Proximal) else len(SIZES))


def test_whether_steps_are_affine_is_told():
    model = mlp()
    assert trainer(model, LocalTraining(CE, sgd)).takes_affine_steps()
    for local in (
        LocalTraining(CE, optim(torch.optim.Adam, lr=0.1)),
        LocalTraining(CE, sgd, clip_grad_norm=1.0),
        LocalTraining(CE, type("Own", (torch.optim.SGD,), {})),
    ):
        assert not trainer(model, local).takes_affine_steps()
    assert not trainer(model, LocalTraining(CE, sgd), rule=Proximal(0.5)).takes_affine_steps()


class Clamped(torch.autograd.Function):
    """Clips what flows back, which no forward pass shows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-0.01, 0.01)


class Clipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return Clamped.apply(self.layer(x))


def test_what_may_do_anything_to_gradients_is_taken_apart(only_apart):
    require_mean(Clipping(), LocalTraining(CE, sgd, **ONE_STEP))

    def loss(outputs, y):
        return ((outputs - nn.functional.one_hot(y, 3)) ** 2).mean()  # what is one_hot to us?

    require_mean(mlp, LocalTraining(loss, sgd, **ONE_STEP))
    model = nn.Sequential(nn.Linear(5, 3))
    model[0].register_forward_hook(lambda module, args, out: Clamped.apply(out))
    require_mean(model, LocalTraining(CE, sgd, **ONE_STEP))


@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_one_step_of_parameters_that_do_not_lie_in_order(how, only_together):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(12, 3)
    )
    model[2].weight = nn.Parameter(torch.randn(12, 3).t())
    rows = rows_of(features=(2, 4, 4))
    require_mean(
        model, LocalTraining(CE, optim(torch.optim.SGD, lr=0.1, **{how: True}), **ONE_STEP), rows
    )


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x).half().float()


def test_half_precision_inside_of_a_model_loses_nothing_more():
    sizes = [300] * 12
    torch.manual_seed(0)
    model, rows = Half(), rows_of(sizes)
    layout, block = start(model)
    found = []
    for local in (LocalTraining(CE, sgd, **ONE_STEP), LocalTraining(CE, sgd, batch_size=300)):
        there = trainer(model, local, rows, sizes=sizes)
        made = there.train_stack(block, weighted_tasks([300.0] * 12))
        found.append(layout.flat_trained(made.blocks[0][: layout.nbytes]))
    vectors, alone = [], []
    made = trainer(model, local, rows, sizes=sizes).train_some(block, tasks_of(12))
    vectors = [layout.flat_trained(row[: layout.nbytes]) for row in made.blocks]
    alone = list(made.unpacked(len(block)))
    expected = mean_of(vectors, alone, [300.0] * 12)
    moved = float((expected - layout.flat_trained(block)).abs().max())
    for vector in found:
        assert float((vector - expected).abs().max()) < 1e-5 * moved


def test_stacks_that_would_be_too_large_are_cut(only_apart):
    torch.manual_seed(0)
    model = mlp()
    layout, block = start(model)
    local = LocalTraining(CE, optim(torch.optim.Adam, lr=0.01), **ONE_STEP)
    there, sizes = trainer(model, local), []
    stacks = there._stacks._stacks
    stacks.most, train = 2, stacks.train

    def noting(tasks, *rest):
        sizes.append(len(tasks))
        return train(tasks, *rest)

    stacks.train = noting
    made, _ = averaged(there, block)
    assert max(sizes) <= 2
    assert sum(sizes) == len(SIZES)
    expected = mean_of(*one_by_one(model, local))
    require_first(layout, made, expected)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [None, 4, 100])
def test_first_batches_are_those_of_all_orders(shuffle, batch_size):
    local = LocalTraining(CE, sgd, batch_size=batch_size, shuffle=shuffle, max_steps=1)
    starts, seeds = [10 * n for n in range(len(SIZES))], list(range(len(SIZES)))
    found = first_batches(starts, SIZES, local, seeds)
    orders = Orders(starts, SIZES, local, seeds)
    (step,) = orders.walk(torch.zeros(1), mean=True)
    expected = step.index.view(step.clients, step.width)
    for place, index, weights in zip(orders.sorted, expected, step.weights, strict=True):
        assert found[place].tolist() == index[weights > 0].tolist()


# ---------------------------------------------------------------- failures


def test_a_client_that_overflows_alone_is_not_hidden_by_its_small_part():
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)
    _, block = start(model)
    x, y = torch.zeros(sum(SIZES), 5), rows_of()[1]
    x[0] = 3.0  # the only row of c0: a step of 3e38 or more, of which the mean takes a part in 68
    local = LocalTraining(CE, functools.partial(torch.optim.SGD, lr=3e38), **ONE_STEP)
    y[0] = 1
    _, alone = one_by_one(model, local, (x, y))
    _, updates = averaged(trainer(model, local, (x, y)), block)
    assert [n for n, update in enumerate(updates) if update is None] == [0]
    assert [n for n, update in enumerate(alone) if update is None] == [0]


BOTH = [{"batch_size": 8, "epochs": 2}, ONE_STEP]


@pytest.mark.parametrize("options", BOTH, ids=str)
@pytest.mark.parametrize(
    ("part", "value", "error", "told"),
    [
        (0, math.nan, FloatingPointError, r"the loss is nan at step \d"),
        (1, 99, IndexError, "99"),
    ],
    ids=["loss-is-not-finite", "torch-raises"],
)
def test_a_client_that_fails_is_left_out(options, part, value, error, told):
    torch.manual_seed(0)
    model = mlp()
    layout, block = start(model)
    rows = rows_of()
    rows[part][2] = value  # a row of c1
    local = LocalTraining(CE, sgd, **options)
    there = trainer(model, local, rows)
    made, updates = averaged(there, block)
    assert [n for n, update in enumerate(updates) if update is None] == [1]
    assert updates[0].block_weight == sum(WEIGHTS) - WEIGHTS[1]
    require_first(layout, made, mean_of(*one_by_one(model, local, rows)))
    with pytest.raises(error, match=told):
        there.failure("c1")


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_where_no_loss_is_finite_there_is_no_mean(options):
    model = mlp()
    _, block = start(model)
    x, y = rows_of()
    there = trainer(model, LocalTraining(CE, sgd, **options), (x * math.nan, y))
    _, updates = averaged(there, block)
    assert updates == [None] * len(SIZES)
    for client in range(len(SIZES)):
        with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d"):
            there.failure(f"c{client}")


@pytest.mark.parametrize("options", [ONE_STEP, {"batch_size": 32, "max_steps": 1}], ids=str)
def test_a_client_whose_update_is_not_finite_is_left_out(options):
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)
    layout, block = start(model)
    x, y = torch.zeros(sum(SIZES), 5), rows_of()[1]
    x[3] = 1e20  # a row of c1: the loss before the step is finite, the weights after it are not
    huge = functools.partial(torch.optim.SGD, lr=1e30)
    there = trainer(model, LocalTraining(CE, huge, **options), (x, y))
    made, updates = averaged(there, block)
    assert [n for n, update in enumerate(updates) if update is None] == [1]
    assert sum(u.block_weight for u in updates if u) == sum(WEIGHTS) - WEIGHTS[1]
    assert layout.non_finite(layout.slot(made.blocks[0])) is None
    with pytest.raises(FloatingPointError, match=r"round 2: the update of client 'c1' .*'weight'"):
        there.failure("c1")


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_a_client_that_trains_alone_in_the_end_has_a_block_of_its_own(options, monkeypatch):
    torch.manual_seed(0)
    model = mlp()
    layout, block = start(model)
    local = LocalTraining(CE, sgd, **options)
    tried = Stacks._tried

    def without_c3(self, shards):
        if SIZES[3] in shards.sizes:
            raise RuntimeError("only in stacks")
        return tried(self, shards)

    monkeypatch.setattr(Stacks, "_tried", without_c3)
    made, updates = averaged(trainer(model, local), block)
    vectors, alone = one_by_one(model, local)
    weights = [0.0 if n == 3 else weight for n, weight in enumerate(WEIGHTS)]
    found = [layout.flat_trained(row[: layout.nbytes]) for row in made.blocks]
    torch.testing.assert_close(found[0], mean_of(vectors, alone, weights), rtol=0, atol=1e-5)
    assert torch.equal(found[1], vectors[3])
    assert [update.block_weight for update in updates] == [sum(weights), 0, 0, None, 0, 0]
    assert torch.equal(layout.flat_trained(updates[3].block), vectors[3])


def test_what_a_stack_leaves_behind_does_not_reach_the_next():
    torch.manual_seed(0)
    model = mlp()
    _, block = start(model)
    there = trainer(model, LocalTraining(CE, sgd, **ONE_STEP))
    first, _ = averaged(there, block)
    kept = first.blocks.clone()
    for _ in range(2):
        again, _ = averaged(there, block)
        assert torch.equal(again.blocks, kept)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_few_private_rows_take_their_numbers_along_only_in_the_sum():
    model = mlp()
    _, block = start(model)
    for options in BOTH:
        there = trainer(model, LocalTraining(CE, sgd, **options), private_rows=9)
        _, updates = averaged(there, block)
        assert [bool(update.metrics) for update in updates] == [size >= 9 for size in SIZES]
        assert updates[0].block_weight == sum(WEIGHTS)
