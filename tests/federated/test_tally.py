"""Numbers of many updates taken in at once are those of one after the other."""

from hypothesis import given
from hypothesis import strategies as st

from fedproc.client.update import NO_BLOCK, Update
from fedproc.federated.tally import Tally

METRICS = st.dictionaries(st.sampled_from(["loss", "steps", "f1"]), st.floats(-9, 9), max_size=3)
NUMBERS = st.tuples(st.integers(1, 9), st.integers(0, 9), st.floats(0, 9), METRICS, st.booleans())


def updates(numbers: list[tuple[int, int, float, dict[str, float], bool]]) -> list[Update]:
    return [
        Update(NO_BLOCK, examples, 1.0, 1.0, rows, loss, metrics, {"place": place}, within=within)
        for place, (examples, rows, loss, metrics, within) in enumerate(numbers)
    ]


@given(st.lists(NUMBERS, max_size=8), st.integers(0, 8))
def test_updates_count_the_same_at_once_and_one_after_the_other(
    numbers: list[tuple[int, int, float, dict[str, float], bool]], cut: int
) -> None:
    found = []
    for sizes in ([1] * len(numbers), [cut, len(numbers)]):
        tally, left = Tally(), list(enumerate(updates(numbers)))
        for size in sizes:
            part, left = left[:size], left[size:]
            names = [f"c{place}" for place, _ in part]
            tally.accept(names, [update for _, update in part], [1.0 + place for place, _ in part])
        found.append((tally, tally.loss() if tally.rows else None, tally.means()))

    assert found[0] == found[1]
    tally = found[0][0]
    assert tally.examples == sum(examples for examples, *_ in numbers)
    assert list(tally.kept) == [f"c{place}" for place in range(len(numbers))]
    assert tally.within == [within for *_, within in numbers]


def test_a_metric_is_averaged_over_those_that_returned_it() -> None:
    tally = Tally()
    found = updates([(1, 0, 0.0, {"a": 1.0}, True), (1, 0, 0.0, {"a": 3.0, "b": 5.0}, True)])

    tally.accept(["x", "y"], found, [1.0, 3.0])

    assert tally.means() == {"a": 2.5, "b": 5.0}
