import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproc.federated import partition
from fedproc.federated.partition import IID, ByKey, Dirichlet, Quantity, Shards, split

SEEDS = st.integers(0, 2**32)


def rng(seed=0):
    return np.random.default_rng(seed)


def lists(parts):
    return [part.tolist() for part in parts]


@st.composite
def splits(draw):
    """Labels, a number of clients that they are enough for, and a partition."""
    clients = draw(st.integers(1, 12))
    rows = draw(st.integers(clients, 80))
    labels = np.array(draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    alpha = draw(st.sampled_from([0.001, 0.1, 1.0, 1000.0]))
    kind = draw(st.sampled_from(["iid", Dirichlet(alpha), Quantity(alpha), Shards(1)]))
    return labels, clients, kind


@given(splits(), SEEDS)
def test_every_row_lands_in_exactly_one_client_and_nobody_is_empty(case, seed):
    labels, clients, kind = case
    parts = split(kind, labels, clients, rng(seed))
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(len(part) >= 1 for part in parts)
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)


@given(splits(), SEEDS)
def test_equal_seeds_give_equal_partitions(case, seed):
    labels, clients, kind = case
    first, second = (split(kind, labels, clients, rng(seed)) for _ in range(2))
    assert lists(first) == lists(second)


@given(st.integers(1, 9), st.integers(0, 5), SEEDS)
def test_dirichlet_fills_every_client_up_to_min_size(clients, min_size, seed):
    labels = rng(seed).integers(0, 3, clients * min_size + 1)
    parts = split(Dirichlet(0.01, min_size=min_size), labels, clients, rng(seed))
    assert min(len(part) for part in parts) >= min_size
    assert sum(len(part) for part in parts) == len(labels)


def test_iid_sizes_differ_by_at_most_one_and_rows_are_mixed():
    parts = IID()(np.zeros(10), 3, rng())
    assert sorted(len(part) for part in parts) == [3, 3, 4]
    assert lists(parts) != [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_other_seeds_give_other_partitions():
    labels = np.zeros(50)
    assert lists(IID()(labels, 5, rng(1))) != lists(IID()(labels, 5, rng(2)))


def test_shards_give_each_client_few_labels():
    labels = np.repeat(np.arange(10), 20)
    parts = Shards(per_client=2)(labels, 10, rng())
    assert [len(part) for part in parts] == [20] * 10
    assert max(len(set(labels[part])) for part in parts) == 2


def test_small_alpha_is_more_skewed_than_large_alpha():
    labels = rng(1).integers(0, 10, 2000)

    def largest_label_share(alpha):
        parts = Dirichlet(alpha)(labels, 10, rng(0))
        return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])

    assert largest_label_share(0.1) > 0.4
    assert largest_label_share(1000.0) < 0.2


def test_dirichlet_with_min_size_zero_may_leave_clients_empty():
    parts = split(Dirichlet(0.01, min_size=0), np.zeros(5, int), 20, rng())
    assert len(parts) == 20
    assert sum(len(part) for part in parts) == 5
    assert any(len(part) == 0 for part in parts)


def test_by_key_has_one_client_per_distinct_key():
    keys = ["b", "a", "b", "c", "a"]
    assert ByKey(keys).names() == ["a", "b", "c"]
    assert lists(split(ByKey(keys), np.zeros(5), 3, rng())) == [[1, 4], [0, 2], [3]]


def test_by_key_takes_tensors_and_numbers():
    assert ByKey(torch.tensor([3, 1, 3])).names() == ["1", "3"]


def test_any_callable_is_a_partition():
    parts = split(lambda labels, clients, rng: [[2, 0], (), [1]], np.zeros(3), 3, rng())
    assert lists(parts) == [[0, 2], [], [1]]


@pytest.mark.parametrize(
    "parts",
    [[[0, 1], [1, 2]], [[0, 1], [3]], [[0], [1]], [[0, 1, 2]], [[-1, 0], [1]], [[0.0, 1.0], [2.0]]],
    ids=["twice", "beyond", "missing", "too few parts", "negative", "floats"],
)
def test_a_partition_that_is_not_exact_is_refused(parts):
    with pytest.raises(ValueError, match=r"part|row"):
        split(lambda *_: parts, np.zeros(3), 2, rng())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(0), "alpha"),
        (lambda: Dirichlet(float("nan")), "alpha"),
        (lambda: Dirichlet(-1.0), "alpha"),
        (lambda: Dirichlet(1.0, min_size=-1), "min_size"),
        (lambda: Quantity(float("inf")), "alpha"),
        (lambda: Shards(0), "per_client"),
        (lambda: Shards(True), "per_client"),
        (lambda: split("random", np.zeros(3), 2, rng()), "random"),
        (lambda: split(None, np.zeros(3), 2, rng()), "callable"),
        (lambda: split("iid", np.zeros(3), 4, rng()), "4 clients"),
        (lambda: split(Dirichlet(1.0), np.zeros(3), 4, rng()), "4 clients"),
        (lambda: split(Shards(2), np.zeros(3), 2, rng()), "need 4 rows"),
        (lambda: split(Dirichlet(1.0), np.zeros((4, 2)), 2, rng()), "one label per row"),
        (lambda: split(ByKey([1, 2]), np.zeros(3), 2, rng()), "2 keys for 3 rows"),
        (lambda: split(ByKey([1, 2, 2]), np.zeros(3), 3, rng()), "2 distinct keys"),
        (lambda: ByKey([[1], [2]]).names(), "shape"),
    ],
)
def test_bad_arguments_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_module_offers_what_the_contract_names():
    assert {"IID", "Shards", "Dirichlet", "Quantity", "ByKey"} <= set(dir(partition))
