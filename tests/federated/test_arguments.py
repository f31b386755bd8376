"""Arguments of the federated layer that cannot be, and lists of pairs as data."""

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
from fedproc.federated.rows import as_rows
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
