"""Who trains whom, where each worker could train anybody: exact small cases and laws."""

import hypothesis
import pytest
from hypothesis import strategies as st

from fedproc.federated.balancing import balanced

WORKERS = ["w0", "w1", "w2", "w3"]


def loads_of(found, costs, workers=WORKERS):
    """Worker -> cost of all that it trains; idle ones included."""
    loads = dict.fromkeys(workers, 0.0)
    for client, name in found.items():
        loads[name] += costs[client]
    return loads


def spread(costs, homes, most=4, workers=WORKERS):
    """``balanced`` of clients "a", "b", … as a string of the digits of workers."""
    clients = "abcdefghijklmnopqrstuvwxyz"[: len(costs)]
    lives = {client: f"w{home}" for client, home in zip(clients, homes, strict=True)}
    found = balanced(lives, dict(zip(clients, costs, strict=True)), workers, most)
    assert list(found) == list(clients)
    return "".join(name[1] for name in found.values())


# ---------------------------------------------------------------- small cases


@pytest.mark.parametrize(
    ("costs", "homes", "most", "found"),
    [
        ([1], "0", 4, "0"),
        ([1, 1, 1, 1], "0123", 4, "0123"),
        ([1, 1], "00", 2, "01"),
        ([1, 1, 1, 1], "0000", 1, "0000"),
        ([5, 1], "00", 4, "01"),
        ([5, 1], "03", 1, "00"),
        ([1, 5], "03", 1, "00"),
        ([1, 5, 1], "023", 2, "010"),
        ([1, 1, 1, 1], "2323", 2, "0101"),
    ],
)
def test_small_cases(costs, homes, most, found):
    assert spread(costs, homes, most) == found


def test_what_is_even_enough_stays():
    assert spread([16, 16, 16, 17], "0123") == "0123"


def test_the_costliest_that_does_not_turn_the_two_around_moves():
    assert spread([1, 2, 3, 8], "0000", workers=["w0", "w1"]) == "1110"
    assert spread([4, 4, 4], "000", workers=["w0", "w1"]) == "001"


def test_one_that_costs_more_than_the_gap_stays():
    assert spread([8, 9], "00", workers=["w0", "w1"]) == "10"
    assert spread([8, 7], "01", workers=["w0", "w1"]) == "01"


def test_nobody_at_all():
    assert balanced({}, {}, WORKERS, 2) == {}


def test_what_is_given_is_not_changed():
    homes, costs, workers = {"a": "w0", "b": "w0"}, {"a": 1.0, "b": 1.0}, ["w0", "w1"]
    assert set(balanced(homes, costs, workers, 2).values()) == {"w0", "w1"}
    assert homes == {"a": "w0", "b": "w0"}
    assert costs == {"a": 1.0, "b": 1.0}
    assert workers == ["w0", "w1"]


# ---------------------------------------------------------------- laws


@st.composite
def rounds(draw):
    """Arguments of ``balanced``: clients anywhere, costs that doubles add up exactly."""
    workers = WORKERS[: draw(st.integers(1, 4))]
    places = st.tuples(st.sampled_from(workers), st.integers(1, 1000))
    lives = draw(st.lists(places, max_size=30))
    homes = {f"c{place}": home for place, (home, _) in enumerate(lives)}
    costs = {f"c{place}": float(cost) for place, (_, cost) in enumerate(lives)}
    return homes, costs, workers, draw(st.integers(1, 6))


@hypothesis.given(rounds())
def test_every_client_is_trained_once_by_one_of_the_first_workers(arguments):
    homes, _, workers, most = arguments
    found = balanced(*arguments)
    assert list(found) == list(homes)
    assert set(found.values()) <= set(workers[:most])


@hypothesis.given(rounds())
def test_the_same_each_time(arguments):
    assert balanced(*arguments) == balanced(*arguments)


@hypothesis.given(rounds())
def test_nobody_has_more_to_do_than_before(arguments):
    homes, costs, workers, _ = arguments
    found = balanced(homes, costs, workers, len(workers))
    before, after = loads_of(homes, costs, workers), loads_of(found, costs, workers)
    assert max(after.values()) <= max(before.values())
    assert min(after.values()) >= min(before.values())


@hypothesis.given(rounds())
def test_the_load_is_as_even_as_the_clients_allow(arguments):
    """Of those that may train, none has a whole client more than the one with the least."""
    _, costs, workers, most = arguments
    loads = loads_of(balanced(*arguments), costs, workers)
    used = sorted(loads.values(), reverse=True)[:most]
    even = sum(used) / len(used) / 16
    assert used[0] - used[-1] <= max(even, 0.0, *costs.values())


@hypothesis.given(st.integers(1, 4), st.integers(0, 8), st.integers(4, 6))
def test_nobody_moves_if_all_have_the_same_to_do(count, each, most):
    workers = WORKERS[:count]
    homes = {f"{name}-{n}": name for n in range(each) for name in workers}
    assert balanced(homes, dict.fromkeys(homes, 3.0), workers, most) == homes
