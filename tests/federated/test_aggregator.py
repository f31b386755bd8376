import copy
import functools
import signal

import pytest
import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.errors import QuorumError, RemoteError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.strategies import FedAvg, FedProx, Krum, Scaffold
from tests.federated.worlds import (
    batchnorm_net,
    bits,
    blobs,
    cross_entropy,
    dropout_net,
    linear,
    sgd,
    shards,
)

LOCAL = LocalTraining(cross_entropy, sgd)


@pytest.fixture
def data(cluster):
    return FederatedDataset(shards([20, 10, 5]), cluster)


def constant_client(value):
    """A train function that sets every parameter to a number of the client's own."""

    def train(model, x, y, ctx):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value[ctx.client])
        return {"loss": float(value[ctx.client]), "rows": len(x)}

    return train


# ---------------------------------------------------------------- the mean


def test_updates_are_weighted_by_rows(data):
    aggregator = Aggregator(linear(), data, constant_client({"a": 7.0, "b": 0.0, "c": 14.0}))
    aggregator.run(1)
    assert set(aggregator.model.weight.flatten().tolist()) == {(7 * 20 + 14 * 5) / 35}


def test_uniform_weighting_ignores_rows(data):
    train = constant_client({"a": 3.0, "b": 0.0, "c": 6.0})
    aggregator = Aggregator(linear(), data, train, weighting="uniform")
    aggregator.run(1)
    assert set(aggregator.model.weight.flatten().tolist()) == {3.0}


def test_the_given_model_is_not_changed_and_the_own_one_stays_the_same_object(data):
    model = linear()
    before = bits(model)
    aggregator = Aggregator(model, data, LOCAL)
    own = aggregator.model
    aggregator.run(2)
    assert bits(model) == before
    assert aggregator.model is own
    assert bits(own) != before


def test_training_learns(data):
    aggregator = Aggregator(linear(), data, LOCAL)
    history = aggregator.run(15, evaluate_on=blobs(35))
    assert history[-1].evaluation.accuracy > 0.85
    assert history[-1].loss < history[0].loss


# ---------------------------------------------------------------- rounds


def test_rounds_count_from_one_and_run_continues(data):
    seen = []

    def train(model, x, y, ctx):
        return {"round": ctx.round}

    aggregator = Aggregator(linear(), data, train, callbacks=[lambda a, r: seen.append(r.round)])
    assert aggregator.run_round().round == 1
    history = aggregator.run(2)
    assert [record.round for record in history] == [1, 2, 3] == seen
    assert [record.metrics["round"] for record in history] == [1.0, 2.0, 3.0]
    assert aggregator.history is history
    assert len(aggregator.run(0)) == 3


def test_a_callback_that_returns_true_ends_the_run(data):
    aggregator = Aggregator(linear(), data, LOCAL, callbacks=[lambda a, r: r.round == 2])
    assert len(aggregator.run(10)) == 2
    assert len(aggregator.run(10)) == 12


def test_the_cohort_is_drawn_and_recorded(cluster):
    data = FederatedDataset(shards([4] * 10), cluster)
    aggregator = Aggregator(linear(), data, LOCAL, clients_per_round=0.3)
    records = aggregator.run(3)
    assert [len(record.clients) for record in records] == [3, 3, 3]
    assert len({record.clients for record in records}) > 1


def test_evaluation_happens_every_so_many_rounds(data):
    history = Aggregator(linear(), data, LOCAL).run(4, evaluate_on=blobs(), evaluate_every=2)
    assert [record.evaluation is not None for record in history] == [False, True, False, True]


def test_the_model_of_the_user_between_rounds_is_the_start_of_the_next(data):
    aggregator = Aggregator(linear(), data, lambda model, x, y, ctx: {})
    aggregator.run(1)
    with torch.no_grad():
        aggregator.model.weight.fill_(5.0)
    aggregator.run(1)
    assert set(aggregator.model.weight.flatten().tolist()) == {5.0}


@pytest.mark.parametrize("how", ["callback", "runs", "rounds"])
def test_what_torch_does_not_count_as_a_change_is_noticed_too(data, how):
    def double(aggregator, _):
        aggregator.model.weight.data.mul_(2.0)  # counts no version

    def add_one(model, x, y, ctx):
        with torch.no_grad():
            model.weight.add_(1.0)

    model = linear()
    nn.init.zeros_(model.weight)
    callbacks = [double] if how == "callback" else []
    aggregator = Aggregator(model, data, add_one, callbacks=callbacks)
    for _ in range(3 if how != "callback" else 1):
        if how == "rounds":
            aggregator.run_round()
        else:
            aggregator.run(3 if how == "callback" else 1)
        if how != "callback":
            double(aggregator, None)
    assert set(aggregator.model.weight.flatten().tolist()) == {14.0}  # ((0+1)2 + 1)2 + 1, doubled


def test_a_parameter_replaced_between_runs_is_the_one_that_is_trained(data):
    aggregator = Aggregator(linear(), data, constant_client({"a": 3.0, "b": 3.0, "c": 3.0}))
    aggregator.run(2)
    aggregator.model.weight = nn.Parameter(torch.zeros_like(aggregator.model.weight))
    aggregator.run(2)
    assert set(aggregator.model.weight.flatten().tolist()) == {3.0}


def test_an_interrupted_run_leaves_nothing_that_the_next_one_starts_from(data):
    class Interrupted(FedAvg):
        rounds = 0

        def step(self, x, received, state):
            Interrupted.rounds += 1
            if Interrupted.rounds == 2:
                raise KeyboardInterrupt
            return super().step(x, received, state)

    aggregator = Aggregator(linear(), data, lambda model, x, y, ctx: {}, strategy=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        aggregator.run(5)
    assert aggregator._course.round == 1
    nn.init.constant_(aggregator.model.weight, 5.0)
    aggregator.run(2)
    assert set(aggregator.model.weight.flatten().tolist()) == {5.0}


def test_a_round_that_fails_uses_its_number(data):
    def late(number, frame):
        raise TimeoutError("late")

    class Signalling(FedAvg):
        rounds = 0

        def step(self, x, received, state):
            Signalling.rounds += 1
            if Signalling.rounds == 2:
                signal.raise_signal(signal.SIGUSR1)
            return super().step(x, received, state)

    before = signal.signal(signal.SIGUSR1, late)
    try:
        aggregator = Aggregator(linear(), data, LOCAL, strategy=Signalling())
        with pytest.raises(TimeoutError, match="late"):
            aggregator.run(5)
    finally:
        signal.signal(signal.SIGUSR1, before)
    aggregator.run(1)
    assert [record.round for record in aggregator.history] == [1, 3]


def test_the_flat_model_is_not_kept_after_a_run(data):
    aggregator = Aggregator(linear(), data, LOCAL)
    aggregator.run(2)
    assert aggregator._course._block is None


def test_frozen_parameters_changed_by_the_user_reach_the_clients(data):
    model = dropout_net()
    model[0].requires_grad_(False)
    aggregator = Aggregator(model, data, lambda model, x, y, ctx: {"sum": model[0].weight.sum()})
    aggregator.run(1)
    aggregator.model[0].weight.fill_(1.0)
    assert aggregator.run_round().metrics["sum"] == 16.0 * 6


def test_freezing_during_a_run_is_refused(data):
    aggregator = Aggregator(linear(), data, LOCAL)
    aggregator.model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        aggregator.run(1)


# ---------------------------------------------------------------- numbers of a record


def test_the_loss_of_a_round_is_the_mean_over_all_rows_processed(data):
    record = Aggregator(linear(), data, LocalTraining(cross_entropy, sgd, batch_size=None)).run(1)[
        0
    ]
    model = linear()
    rows = [(x, y) for x, y in shards([20, 10, 5]).values()]
    total = sum(cross_entropy(model(x), y).item() * len(x) for x, y in rows)
    assert record.loss == pytest.approx(total / 35, rel=1e-6)
    assert record.examples == 35
    assert record.metrics["steps"] == 1.0


def test_metrics_of_a_custom_function_are_weighted_like_the_updates(data):
    value = {"a": 7.0, "b": 0.0, "c": 14.0}
    record = Aggregator(linear(), data, constant_client(value)).run_round()
    assert record.loss == record.metrics["loss"] == (7 * 20 + 14 * 5) / 35
    assert record.metrics["rows"] == (20 * 20 + 10 * 10 + 5 * 5) / 35
    record = Aggregator(linear(), data, constant_client(value), weighting="uniform").run_round()
    assert record.loss == 7.0


def test_without_a_loss_there_is_none(data):
    assert Aggregator(linear(), data, lambda model, x, y, ctx: None).run_round().loss is None


def test_bytes_moved_are_the_model_down_and_the_updates_up(data):
    record = Aggregator(linear(), data, LOCAL).run_round()
    assert record.bytes_moved == 3 * 2 * 4 * (6 * 3 + 3)


# ---------------------------------------------------------------- custom functions


def test_state_is_kept_per_client_and_starts_empty(data):
    def count(model, x, y, ctx):
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        return {"n": ctx.state["n"]}

    aggregator = Aggregator(linear(), data, count, clients_per_round=2)
    history = aggregator.run(9)
    last = {}
    for record in history:
        for client in record.clients:
            last[client] = last.get(client, 0) + 1
        expected = sum(last[c] * data.sizes[c] for c in record.clients)
        assert record.metrics["n"] == expected / sum(data.sizes[c] for c in record.clients)


def test_state_of_a_failed_client_is_not_committed(data):
    def fails_in_round_two(model, x, y, ctx):
        ctx.state["n"] = ctx.state.get("n", 0) + 1
        if ctx.client == "a" and ctx.round == 2:
            raise RuntimeError("no")
        return {"n": ctx.state["n"]}

    aggregator = Aggregator(linear(), data, fails_in_round_two, weighting="uniform")
    history = aggregator.run(3)
    assert [record.metrics["n"] for record in history] == [1.0, 2.0, (2 + 3 + 3) / 3]


def test_a_function_may_write_into_its_rows_and_freeze_layers(data):
    def rough(model, x, y, ctx):
        total = float(x.sum())
        x.zero_()
        model.bias.requires_grad_(False)
        return {"total": total}

    first, second = Aggregator(linear(), data, rough).run(2)
    assert first.metrics == second.metrics
    assert first.failures == {}


def _replace(model):
    model[3] = nn.Linear(16, 3)


def _write(model):
    with torch.no_grad():
        model[0].weight.fill_(1.0)


def _write_past_autograd(model):
    model[0].weight.data.fill_(1.0)


def _write_by_numpy(model):
    model[0].weight.numpy()[:] = 1.0


@pytest.mark.parametrize("do", [_replace, _write, _write_past_autograd, _write_by_numpy])
def test_a_function_that_breaks_the_model_fails_alone(data, do):
    def rough(model, x, y, ctx):
        if ctx.client == "a":
            do(model)
        return {"sum": model[0].weight.sum()}

    model = dropout_net()
    model[0].requires_grad_(False)
    record = Aggregator(model, data, rough).run_round()
    assert list(record.failures) == ["a"]
    assert "train function" in str(record.failures["a"])
    assert record.metrics["sum"] == pytest.approx(float(model[0].weight.sum()))


@pytest.mark.parametrize("returned", [3, {"a": "text"}, {1: 2.0}, [("a", 1)]])
def test_what_is_not_a_dict_of_numbers_is_a_failure(data, returned):
    with pytest.raises(QuorumError, match="dict of numbers"):
        Aggregator(linear(), data, lambda *_: returned).run_round()


# ---------------------------------------------------------------- failures


def test_an_exception_is_a_failure_with_its_cause_and_the_round_goes_on(data):
    def train(model, x, y, ctx):
        if ctx.client == "b":
            raise KeyError("lost key")
        return constant_client({"a": 1.0, "c": 6.0})(model, x, y, ctx)

    aggregator = Aggregator(linear(), data, train)
    record = aggregator.run_round()
    assert list(record.failures) == ["b"]
    error = record.failures["b"]
    assert isinstance(error, RemoteError)
    assert isinstance(error, KeyError)
    assert "lost key" in str(error)
    assert "lost key" in error.remote_traceback
    assert record.accepted == ("a", "c")
    assert set(aggregator.model.weight.flatten().tolist()) == {(20 + 30) / 25}


def test_too_few_clients_leave_the_model_unchanged_and_the_next_round_is_possible(data):
    def train(model, x, y, ctx):
        nn.init.constant_(model.weight, 1.0)
        if ctx.round == 1 and ctx.client != "a":
            raise RuntimeError("not today")
        return {}

    aggregator = Aggregator(linear(), data, train, min_clients=2)
    before = bits(aggregator.model)
    with pytest.raises(QuorumError, match=r"(?s)round 1.*1 of 3.*b: .*not today") as caught:
        aggregator.run(1)
    assert sorted(caught.value.failures) == ["b", "c"]
    assert bits(aggregator.model) == before
    assert len(aggregator.history) == 0
    record = aggregator.run_round()
    assert record.round == 2
    assert record.failures == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_update_is_a_failure_that_says_where(data, bad):
    train = constant_client({"a": 1.0, "b": bad, "c": 1.0})
    aggregator = Aggregator(linear(), data, train)
    record = aggregator.run_round()
    assert list(record.failures) == ["b"]
    assert isinstance(record.failures["b"], FloatingPointError)
    assert "'b'" in str(record.failures["b"])
    assert "'weight'" in str(record.failures["b"])
    assert set(aggregator.model.weight.flatten().tolist()) == {1.0}


def test_a_non_finite_loss_and_a_non_finite_buffer_are_failures(cluster):
    x, y = blobs(8)
    data = FederatedDataset({"good": (x, y), "bad": (x * float("inf"), y)}, cluster)
    record = Aggregator(linear(), data, LOCAL).run_round()
    assert "loss is nan" in str(record.failures["bad"])

    def poison(model, x, y, ctx):
        if ctx.client == "bad":
            model[1].running_var.fill_(float("nan"))

    record = Aggregator(batchnorm_net(), data, poison).run_round()
    assert "1.running_var" in str(record.failures["bad"])


def test_empty_clients_are_skipped_not_failed(cluster):
    data = FederatedDataset(shards([0, 8, 0]), cluster)
    record = Aggregator(linear(), data, LOCAL).run_round()
    assert record.clients == ("a", "b", "c")
    assert record.skipped == ("a", "c")
    assert record.accepted == ("b",)
    assert record.failures == {}


def test_all_clients_empty_is_no_quorum(cluster):
    data = FederatedDataset(shards([0, 0]), cluster)
    with pytest.raises(QuorumError, match="0 of 2"):
        Aggregator(linear(), data, LOCAL).run_round()


def test_a_last_batch_of_one_row_with_batchnorm_is_a_failure_that_says_why(cluster):
    data = FederatedDataset(shards([9, 8]), cluster)
    record = Aggregator(
        batchnorm_net(), data, LocalTraining(cross_entropy, sgd, batch_size=8)
    ).run_round()
    assert list(record.failures) == ["a"]
    assert "more than 1 value per channel" in str(record.failures["a"])


def test_a_loss_that_is_a_vector_and_targets_of_the_wrong_dtype_say_so(data):
    vector = LocalTraining(nn.CrossEntropyLoss(reduction="none"), sgd)
    with pytest.raises(QuorumError, match=r"(?s)round 1.*a: .*\(20,\).*one number"):
        Aggregator(linear(), data, vector).run_round()
    with pytest.raises(QuorumError, match="a: "):
        Aggregator(linear(), data, LocalTraining(nn.MSELoss(), sgd)).run_round()


# ---------------------------------------------------------------- evaluation


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_evaluation_is_the_plain_one(data):
    x, y = blobs(700, seed=3)
    aggregator = Aggregator(dropout_net(), data, LOCAL)
    aggregator.run(1)
    found = aggregator.evaluate((x, y))
    model = copy.deepcopy(aggregator.model).eval()
    outputs = model(x)
    assert found.examples == 700
    assert found.accuracy == (outputs.argmax(1) == y).sum().item() / 700
    assert found.loss == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-6)


def test_evaluation_with_own_loss_and_metrics(data):
    x, y = blobs(300, seed=3)
    aggregator = Aggregator(linear(), data, lambda *_: {})
    assert aggregator.evaluate((x, y)).loss is None
    found = aggregator.evaluate(
        (x.numpy(), y.numpy()),
        loss=cross_entropy,
        metrics={"rows": lambda outputs, targets: len(outputs), "y": lambda o, t: t.tolist()},
    )
    assert found.metrics == {"rows": 300, "y": y.tolist()}
    assert found.loss == pytest.approx(cross_entropy(linear()(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("way", ["module", "partial"])
def test_a_loss_of_an_evaluation_may_hold_tensors(data, way):
    x, y = blobs(30, seed=3)
    weight = torch.tensor([0.2, 1.0, 3.0])
    weighted = functools.partial(nn.functional.cross_entropy, weight=weight)
    loss = nn.CrossEntropyLoss(weight=weight) if way == "module" else weighted
    found = Aggregator(linear(), data, LOCAL).evaluate((x, y), loss=loss)
    assert found.loss == pytest.approx(weighted(linear()(x), y).item(), rel=1e-6)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0])], ids=["equal", "weights"])
def test_rows_without_a_label_count_nothing_in_the_loss_of_an_evaluation(data, weight):
    x, y = blobs(700, seed=3)
    y[:300] = -100  # more than a chunk
    y[400::3] = -100
    loss = nn.CrossEntropyLoss(weight=weight)
    found = Aggregator(linear(), data, LOCAL).evaluate((x, y), loss=loss)
    assert found.loss == pytest.approx(loss(linear()(x), y).item(), rel=1e-6)
    assert found.accuracy == (linear()(x).argmax(1) == y).sum().item() / 700


def test_a_loss_that_is_a_sum_is_told_as_the_mean_of_the_rows(data):
    means, sums = (
        Aggregator(linear(), data, LocalTraining(loss, still, batch_size=4))
        for loss in (cross_entropy, nn.CrossEntropyLoss(reduction="sum"))
    )
    rows = blobs(700, seed=3)
    assert sums.evaluate(rows).loss == pytest.approx(means.evaluate(rows).loss, rel=1e-6)
    own = {client: found.loss for client, found in means.evaluate_clients().items()}
    for client, found in sums.evaluate_clients().items():
        assert found.loss == pytest.approx(own[client], rel=1e-6)
    (mine,), (other,) = (aggregator.run(1) for aggregator in (sums, means))
    assert mine.loss == pytest.approx(other.loss, rel=1e-6)
    assert mine.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-6)


def test_accuracy_needs_classes(data):
    x, y = blobs(20)
    aggregator = Aggregator(linear(), data, LOCAL)
    targets = nn.functional.one_hot(y, 3).float()
    assert aggregator.evaluate((x, targets)).accuracy is None
    assert aggregator.evaluate((x, targets)).loss > 0


def test_every_client_is_evaluated_on_its_own_rows(cluster):
    data = FederatedDataset(shards([20, 0, 5]), cluster)
    aggregator = Aggregator(linear(), data, LOCAL)
    found = aggregator.evaluate_clients()
    assert list(found) == ["a", "b", "c"]
    x, y = shards([20, 0, 5])["a"]
    assert found["a"].accuracy == (linear()(x).argmax(1) == y).float().mean().item()
    assert (found["b"].loss, found["b"].accuracy, found["b"].examples) == (None, None, 0)


def test_evaluation_does_not_change_the_next_round(cluster):
    models = []
    for evaluate_on in (None, blobs(50)):
        data = FederatedDataset(shards([20, 10]), cluster)
        aggregator = Aggregator(batchnorm_net(), data, LOCAL)
        aggregator.run(3, evaluate_on=evaluate_on)
        models.append(bits(aggregator.model))
    assert models[0] == models[1]


def test_an_empty_evaluation_set_is_refused(data):
    with pytest.raises(ValueError, match="no rows"):
        Aggregator(linear(), data, LOCAL).evaluate(blobs(0))


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "linear"}, "model"),
        ({"data": blobs()}, "FederatedDataset"),
        ({"local": 3}, "local"),
        ({"local": LocalTraining}, "local"),
        ({"strategy": FedAvg}, "strategy"),
        ({"clients_per_round": 4}, "clients_per_round"),
        ({"clients_per_round": 0.0}, "clients_per_round"),
        ({"clients_per_round": True}, "clients_per_round"),
        ({"weighting": "rows"}, "weighting"),
        ({"seed": "x"}, "seed"),
        ({"min_clients": 0}, "min_clients"),
        ({"min_clients": 4}, "min_clients"),
        ({"retries": -1}, "retries"),
        ({"callbacks": [3]}, "callback"),
        ({"strategy": Krum(1)}, "Krum"),
        ({"strategy": FedProx(0.1), "local": lambda *_: {}}, "LocalTraining"),
        ({"strategy": Scaffold(), "local": lambda *_: {}}, "LocalTraining"),
    ],
)
def test_bad_arguments_are_value_errors_at_construction(cluster, arguments, message):
    data = FederatedDataset(shards([4, 4, 4]), cluster)
    given = {"model": linear(), "data": data, "local": LOCAL, **arguments}
    with pytest.raises(ValueError, match=message):
        Aggregator(given.pop("model"), given.pop("data"), given.pop("local"), **given)


@pytest.mark.parametrize("arguments", [{"rounds": -1}, {"rounds": 1.5}, {"rounds": True}])
def test_bad_numbers_of_rounds(data, arguments):
    with pytest.raises(ValueError, match="rounds"):
        Aggregator(linear(), data, LOCAL).run(**arguments)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(6, 3).requires_grad_(False), "requires_grad"),
        (lambda: nn.LazyLinear(3), "no values yet"),
        (lambda: nn.Linear(6, 3, device="meta"), "no values yet"),
        (lambda: nn.Linear(6, 3, dtype=torch.complex64), "complex64"),
    ],
)
def test_models_without_a_defined_mean_are_refused(data, model, message):
    with pytest.raises(ValueError, match=message):
        Aggregator(model(), data, LOCAL)


def test_federate_names_one_client_per_worker(cluster):
    data = federate(blobs(30), cluster)
    assert data.clients == ("alice", "bob", "carol")
    assert [data.worker_of(client).name for client in data.clients] == ["alice", "bob", "carol"]


# ---------------------------------------------------------------- modes of torch


def test_clients_train_whatever_the_mode_of_the_caller_is(data):
    plain, other = (Aggregator(linear(), data, LOCAL, seed=3) for _ in range(2))
    plain.run(2)
    with torch.no_grad():
        other.run(2)
        assert not torch.is_grad_enabled()
    assert bits(plain.model) == bits(other.model)


def test_ctrl_c_at_the_end_of_no_grad_leaves_gradients_enabled(data, monkeypatch):
    class Torn(torch.no_grad):
        def __exit__(self, *raised):
            raise KeyboardInterrupt  # before it has put back what was

    aggregator = Aggregator(linear(), data, LOCAL)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "no_grad", Torn)
        with pytest.raises(KeyboardInterrupt):
            aggregator.run(1)
    assert torch.is_grad_enabled()
    assert len(aggregator.run(1)) == 1


def test_metrics_have_names(data):
    aggregator = Aggregator(linear(), data, LOCAL)
    for metrics in (len, {"one": 1}, [len]):
        with pytest.raises(ValueError, match="metrics must be a dict of name -> function"):
            aggregator.evaluate((torch.zeros(2, 6), torch.zeros(2).long()), metrics=metrics)
