"""Arguments of the federated layer that cannot be, numbers, and lists of pairs as data."""

import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import NotShippableError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.callbacks import EarlyStopping
from fedproc.federated.data import FederatedDataset, federate
from fedproc.federated.partition import Dirichlet, Quantity, Shards
from fedproc.federated.privacy import DifferentialPrivacy
from fedproc.federated.rows import as_rows
from fedproc.federated.sampling import cohort_size
from fedproc.federated.secure_aggregation import SecureAggregation
from fedproc.federated.strategies import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    GeometricMedian,
    Krum,
    Scaffold,
    TrimmedMean,
)  # fmt: skip
from tests.federated.worlds import bits, blobs, cross_entropy, linear, sgd, shards

LOCAL = LocalTraining(cross_entropy, sgd)


@pytest.fixture
def inline():
    with Cluster(2, transport="inline") as cluster:
        yield cluster


def in_order(labels, clients, rng):
    return np.array_split(np.arange(len(labels)), clients)


# ---------------------------------------------------------------- cluster, shards, factories


@pytest.mark.parametrize(
    ("cluster", "kind"), [(None, "None"), ([1], "a list"), (Cluster, "a type"), ("bob", "a str")]
)
def test_what_is_no_cluster_is_named(cluster, kind):
    message = f"^cluster must be a fedproc.Cluster, got {kind}$"
    with pytest.raises(ValueError, match=message):
        federate(blobs(), cluster)
    with pytest.raises(ValueError, match=message):
        federate(blobs(), cluster, clients=2)
    with pytest.raises(ValueError, match=message):
        FederatedDataset(shards([2, 3]), cluster)
    with pytest.raises(ValueError, match=message):
        FederatedDataset.from_factories({"a": blobs}, cluster)


def test_shards_and_factories_go_by_client(inline):
    with pytest.raises(ValueError, match=r"^shards must be a dict of client -> .*got a list$"):
        FederatedDataset([blobs()], inline)
    with pytest.raises(ValueError, match=r"^factories must be a dict of client -> .*got a tuple$"):
        FederatedDataset.from_factories((blobs,), inline)
    with pytest.raises(ValueError, match=r"^sources must be a dict of client -> .*got None$"):
        FederatedDataset.from_sources(None, inline)


def test_the_client_whose_data_cannot_be_is_named(inline):
    with pytest.raises(ValueError, match=r"^client 'b': data must be a pair .*got int$"):
        FederatedDataset({"a": blobs(), "b": 3}, inline)
    with pytest.raises(ValueError, match=r"^factories: that of client 'b' must be a function .*"):
        FederatedDataset.from_factories({"a": blobs, "b": blobs()}, inline)


# ---------------------------------------------------------------- a list of pairs


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("pair", [list, tuple])
@pytest.mark.parametrize("form", ["tensors", "arrays", "numbers", "gradients", "mixed"])
def test_a_list_of_pairs_has_a_row_for_each(rows, kind, pair, form):
    x, y = blobs(rows)
    made = {
        "tensors": lambda n: (x[n], y[n]),
        "arrays": lambda n: (x[n].numpy(), y[n].numpy()),
        "numbers": lambda n: (x[n].tolist(), int(y[n])),
        "gradients": lambda n: (nn.Parameter(x[n]), int(y[n])),
        "mixed": lambda n: (x[n] if n % 2 else x[n].numpy(), int(y[n]) if n % 2 else y[n]),
    }[form]
    found = as_rows(kind(pair(made(n)) for n in range(rows)))
    assert (found[0].tolist(), found[1].tolist()) == (x.tolist(), y.tolist())
    assert (found[0].requires_grad, found[1].dtype) == (False, torch.int64)


def test_it_is_federated_like_the_pair_of_arrays(inline):
    x, y = blobs(9)
    data = federate(list(zip(x, y, strict=True)), inline, clients=3, partition=in_order)
    pieces = [data[client] for client in data.clients]
    assert torch.equal(torch.cat([piece.fetch() for piece, _ in pieces]), x)
    assert torch.equal(torch.cat([piece.fetch() for _, piece in pieces]), y)


PAIRS = {  # two elements that are arrays are inputs and targets, as they always were
    "numbers": ([[1, 2], [3, 4]], [1, 2], [3, 4]),
    "tuples": (((1.0, 2.0), (0, 1)), [1.0, 2.0], [0, 1]),
    "rows and labels": (([[1, 2], [3, 4]], [0, 1]), [[1, 2], [3, 4]], [0, 1]),
    "tensors of rows": (
        ([torch.ones(2), torch.zeros(2)], [torch.tensor(0), torch.tensor(1)]),
        [[1.0, 1.0], [0.0, 0.0]],
        [0, 1],
    ),
    "tensors": ((torch.ones(2, 1), torch.tensor([0, 1])), [[1.0], [1.0]], [0, 1]),
    "tensors in a list": ([torch.ones(2, 1), torch.tensor([0, 1])], [[1.0], [1.0]], [0, 1]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_two_elements_that_are_arrays_stay_inputs_and_targets(case):
    data, x, y = PAIRS[case]
    found = as_rows(data)
    assert (found[0].tolist(), found[1].tolist()) == (x, y)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"list of pairs, one per row; got 0 parts"),
        ([1, 2, 3], r"list of pairs, one per row; got 3 parts"),
        ([(1, 2), (3, 4), (5, 6, 7)], r"list of pairs, one per row; got 3 parts"),
        ((["a", "b"], [1, 2]), r"must be numbers, got an array of"),
        ([([1, 2], 0), ([1], 0), ([1, 2], 0)], r"rows of the dataset do not all have one shape"),
    ],
)
def test_other_lists_are_no_data(data, message):
    with pytest.raises(ValueError, match=message):
        as_rows(data)


# ---------------------------------------------------------------- callbacks


def note(aggregator, record):
    return True


@pytest.mark.parametrize(
    ("callbacks", "got"),
    [
        (note, "a function; pass [fn]"),
        (lambda aggregator, record: True, "a function; pass [fn]"),
        (print, "a function; pass [fn]"),
        (EarlyStopping(), "an EarlyStopping; pass it in a list"),
        (5, "an int"),
        (None, "None"),
        ("note", "a str"),
    ],
)
def test_callbacks_that_are_no_list(inline, callbacks, got):
    data = FederatedDataset(shards([4, 6]), inline)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared as a whole
        Aggregator(linear(), data, LOCAL, callbacks=callbacks)
    assert str(caught.value) == f"callbacks must be a list of callables, got {got}"


def test_callbacks_may_be_gone_through_once(inline):
    data = FederatedDataset(shards([4, 6]), inline)
    aggregator = Aggregator(linear(), data, LOCAL, callbacks=(each for each in [note]))
    assert len(aggregator.run(3)) == 1


# ---------------------------------------------------------------- models that cannot be sent


class Keeper(nn.Linear):
    """Keeps something beside its parameters."""

    def __init__(self, kept):
        super().__init__(6, 3)
        self.kept = kept


class Sensible(Keeper):
    """Knows what of it can be copied."""

    def __getstate__(self):
        return {**self.__dict__, "kept": None}


def said(error, cause):
    assert type(error) is NotShippableError
    assert str(error) == (
        f"the model, a Keeper, cannot be copied for the workers: {cause}. Keep locks, open files, "
        "connections and the like out of it, or leave them out of what its __getstate__ returns."
    )


def test_a_model_that_cannot_be_copied(inline):
    data = FederatedDataset(shards([4, 6]), inline)
    with pytest.raises(TypeError) as caught:
        Aggregator(Keeper(threading.Lock()), data, LOCAL)
    said(caught.value, "TypeError: cannot pickle '_thread.lock' object")
    assert type(caught.value.__cause__) is TypeError
    assert str(caught.value.__cause__) == "cannot pickle '_thread.lock' object"


def test_a_model_that_can_be_copied_but_not_sent(cluster):
    data = FederatedDataset(shards([4, 6]), cluster)
    aggregator = Aggregator(Keeper(weakref.ref(cluster)), data, LOCAL)
    before = bits(aggregator.model)
    for use in (aggregator.run_round, aggregator.evaluate_clients):
        with pytest.raises(NotShippableError) as caught:
            use()
        said(caught.value, "TypeError: cannot pickle 'weakref.ReferenceType' object")
        assert type(caught.value.__cause__) is NotShippableError
    assert bits(aggregator.model) == before


def test_what_a_model_leaves_out_does_not_matter(cluster):
    data = FederatedDataset(shards([4, 6]), cluster)
    aggregator = Aggregator(Sensible(threading.Lock()), data, LOCAL)
    assert aggregator.run_round().accepted == ("a", "b")


def test_a_model_without_a_mean_is_a_value_error_as_before(inline):
    data = FederatedDataset(shards([4, 6]), inline)
    with pytest.raises(ValueError, match="nothing can be trained"):
        Aggregator(Keeper(threading.Lock()).requires_grad_(False), data, LOCAL)


# ---------------------------------------------------------------- numbers

n64, f32 = np.int64, np.float32


def test_numbers_of_numpy_are_numbers(inline):
    local = LocalTraining(
        cross_entropy,
        sgd,
        epochs=n64(2),
        batch_size=np.uint8(4),
        max_steps=n64(3),
        clip_grad_norm=f32(2),
    )
    data = federate(
        blobs(40), inline, clients=n64(4), seed=n64(3), partition=Dirichlet(f32(0.5), n64(1))
    )
    runs = []
    for convert in (int, np.int64):
        aggregator = Aggregator(
            linear(), data, local, strategy=FedAvg(lr=f32(0.5)), seed=convert(5),
            clients_per_round=convert(3), min_clients=convert(2), retries=convert(1),
        )  # fmt: skip
        history = aggregator.run(convert(2), evaluate_on=blobs(20), evaluate_every=convert(2))
        runs.append((bits(aggregator.model), [record.clients for record in history]))
    assert runs[0] == runs[1]
    assert [len(clients) for clients in runs[0][1]] == [3, 3]
    assert {type(record.round) for record in history} == {int}


RECORDS = [
    (LocalTraining(cross_entropy, sgd, epochs=n64(2), batch_size=n64(4), max_steps=n64(3),
                   clip_grad_norm=f32(2)),
     {"epochs": 2, "batch_size": 4, "max_steps": 3, "clip_grad_norm": 2.0}),
    (FedAvg(f32(0.5)), {"lr": 0.5}),
    (FedAvgM(f32(0.5), f32(0.25)), {"lr": 0.5, "momentum": 0.25}),
    (FedProx(f32(0.5)), {"mu": 0.5}),
    (FedAdam(f32(0.5), f32(0.25), f32(0.5), f32(0.125)),
     {"lr": 0.5, "beta1": 0.25, "beta2": 0.5, "tau": 0.125}),
    (TrimmedMean(f32(0.25)), {"fraction": 0.25}),
    (Krum(n64(1), n64(2)), {"byzantine": 1, "keep": 2}),
    (GeometricMedian(n64(5), f32(0.5), f32(0.25)), {"steps": 5, "nu": 0.5, "tolerance": 0.25}),
    (Scaffold(f32(0.5)), {"lr": 0.5}),
    (Shards(n64(3)), {"per_client": 3}),
    (Quantity(f32(0.5), n64(0)), {"alpha": 0.5, "min_size": 0}),
    (DifferentialPrivacy(f32(2), n64(1), f32(0.25), max_epsilon=n64(4)),
     {"clip_norm": 2.0, "noise_multiplier": 1.0, "delta": 0.25, "max_epsilon": 4.0}),
    (SecureAggregation(f32(0.5), n64(16)), {"threshold": 0.5, "bits": 16}),
    (EarlyStopping("loss", n64(3), f32(0.5)), {"patience": 3, "min_delta": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(("record", "values"), RECORDS, ids=lambda case: type(case).__name__)
def test_they_are_kept_as_those_of_python(record, values):
    found = {name: getattr(record, name) for name in values}
    assert found == values
    assert {type(number) for number in found.values()} <= {int, float}


@pytest.mark.parametrize("fraction", [0.5, np.float64(0.5), np.float32(0.5)])
def test_a_fraction_of_the_clients_is_any_real_number(fraction):
    assert cohort_size(fraction, 8) == 4


A_COUNT = "must be a whole number of at least 1"
NO_NUMBERS = {
    "epochs": (lambda: LocalTraining(cross_entropy, sgd, epochs=1.5), f"epochs {A_COUNT}, got 1.5"),
    "batch_size": (
        lambda: LocalTraining(cross_entropy, sgd, batch_size=np.float32(2)),
        f"batch_size {A_COUNT}, or None, got np.float32(2.0)",
    ),
    "max_steps": (
        lambda: LocalTraining(cross_entropy, sgd, max_steps=0),
        f"max_steps {A_COUNT}, or None, got 0",
    ),
    "mu": (
        lambda: FedProx(float("inf")),
        "mu must be a finite number of at least 0, got inf",
    ),
    "min_delta": (
        lambda: EarlyStopping(min_delta="a"),
        "min_delta must be a finite number of at least 0, got 'a'",
    ),
    "lr": (lambda: FedAvg(True), "lr must be a finite number above 0, got True"),
    "huge lr": (lambda: FedAvg(10**400), f"lr must be a finite number above 0, got {10**400}"),
    "momentum": (
        lambda: FedAvgM(momentum=1),
        "momentum must be a number from 0 to below 1.0, got 1",
    ),
    "shuffle": (
        lambda: LocalTraining(cross_entropy, sgd, shuffle=1),
        "shuffle must be True or False, got 1",
    ),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_such_number_is_named(name):
    make, message = NO_NUMBERS[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared as a whole
        make()
    assert str(caught.value) == message


def test_a_bool_is_no_seed(inline):
    data = federate(blobs(), inline)
    with pytest.raises(ValueError, match=r"^seed must be a whole number, got True$"):
        Aggregator(linear(), data, LOCAL, seed=True)
