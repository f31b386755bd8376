import pytest

from fedproc.federated.sampling import cohort_size, draw_cohort


@pytest.mark.parametrize(
    ("asked", "population", "size"),
    [(1.0, 7, 7), (0.29, 100, 29), (0.057, 1000, 57), (0.001, 10, 1), (1, 5, 1), (5, 5, 5)],
)
def test_size_is_rounded_and_at_least_one(asked, population, size):
    assert cohort_size(asked, population) == size


@pytest.mark.parametrize(
    "asked", [0, 0.0, -1, -0.5, 1.5, 6, True, False, "all", None, float("nan")]
)
def test_anything_else_is_a_value_error(asked):
    with pytest.raises(ValueError, match="clients_per_round"):
        cohort_size(asked, 5)


def test_a_cohort_depends_on_seed_and_round_alone_and_keeps_the_order():
    clients = [f"client-{n}" for n in range(100)]
    first = draw_cohort(clients, 10, seed=3, round_number=1)
    assert first == draw_cohort(clients, 10, seed=3, round_number=1)
    assert first != draw_cohort(clients, 10, seed=3, round_number=2)
    assert first != draw_cohort(clients, 10, seed=4, round_number=1)
    assert len(set(first)) == 10
    assert list(first) == sorted(first, key=clients.index)


def test_everybody_is_drawn_in_the_end():
    clients = [str(n) for n in range(20)]
    drawn = {c for number in range(100) for c in draw_cohort(clients, 2, 0, number)}
    assert drawn == set(clients)
