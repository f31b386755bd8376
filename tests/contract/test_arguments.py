"""Arguments that cannot be: the error names the argument, what it may be, and what came."""

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.contract.things import each

NAN = float("nan")


def _inline(workers=1, **options):
    return fp.Cluster(workers, transport="inline", **options)


# ---------------------------------------------------------------- Cluster

NO_WORKERS = {
    "fraction": (1.5, "workers must be names or a whole number of at least 1, got 1.5"),
    "whole float": (2.0, "workers must be names or a whole number of at least 1, got 2.0"),
    "bool": (True, "workers must be names or a whole number of at least 1, got True"),
    "float array": (
        np.array(1.5),
        "workers must be names or a whole number of at least 1, got array(1.5)",
    ),
    "surrogate": (
        ["bob", "a\ud800"],
        "a worker's name must be UTF-8 without zero bytes, not 'a\\ud800'",
    ),
    "zero byte": (["a\0b"], "a worker's name must be UTF-8 without zero bytes, not 'a\\x00b'"),
}

A_COUNT = "a whole number of at least 1"
REFUSED = [
    ("threads", 1.5, f"{A_COUNT}, or None"),
    ("threads", NAN, f"{A_COUNT}, or None"),
    ("threads", "2", f"{A_COUNT}, or None"),
    ("threads", True, f"{A_COUNT}, or None"),
    ("threads", 0, f"{A_COUNT}, or None"),
    ("memory_limit", 1.5, f"{A_COUNT}, or None"),
    ("memory_limit", NAN, f"{A_COUNT}, or None"),
    ("memory_limit", "1G", f"{A_COUNT}, or None"),
    ("memory_limit", -1, f"{A_COUNT}, or None"),
    ("min_rows", NAN, A_COUNT),
    ("min_rows", 1.5, A_COUNT),
    ("min_rows", "a", A_COUNT),
    ("min_rows", True, A_COUNT),
    ("min_rows", None, A_COUNT),
    ("seed", "x", "a whole number"),
    ("seed", 1.5, "a whole number"),
    ("seed", None, "a whole number"),
    ("seed", True, "a whole number"),
    ("restart", "yes", "True or False"),
    ("restart", None, "True or False"),
    ("start_timeout", NAN, "a number of seconds above 0"),
    ("start_timeout", "a", "a number of seconds above 0"),
    ("start_timeout", 0, "a number of seconds above 0"),
    ("start_timeout", True, "a number of seconds above 0"),
]


def _refused(message, make):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared as a whole
        make().close()
    assert str(caught.value) == message


def test_what_cannot_be_workers_is_refused():
    assert each(NO_WORKERS, lambda case: _refused(case[1], lambda: _inline(case[0]))) == {}


def test_an_object_is_no_workers():
    with pytest.raises(ValueError, match=r"workers must be names or a whole number .*got <object"):
        _inline(object())


@pytest.mark.parametrize(("name", "value", "what"), REFUSED, ids=str)
def test_an_option_that_cannot_be_is_named(name, value, what):
    _refused(f"{name} must be {what}, got {value!r}", lambda: _inline(**{name: value}))


def test_whole_numbers_of_numpy_are_whole_numbers():
    options = {
        "threads": np.int64(1),
        "seed": np.uint8(7),
        "memory_limit": np.int64(1 << 22),
        "min_rows": np.int32(3),
        "start_timeout": np.float32(30),
    }
    with _inline(np.int64(2), **options) as cluster:
        assert [worker.name for worker in cluster] == ["worker-0", "worker-1"]
        assert (cluster.threads, cluster.seed, cluster.min_rows) == (1, 7, 3)
        assert {type(n) for n in (cluster.threads, cluster.seed, cluster.min_rows)} == {int}


def test_the_same_seed_draws_the_same_whichever_integer_it_is():
    drawn = []
    for seed in (7, np.int64(7)):
        with _inline(["bob"], seed=seed) as cluster:
            drawn.append(cluster["bob"].run(torch.rand, 3).get().tolist())
    assert drawn[0] == drawn[1]


# ---------------------------------------------------------------- gather, as_completed

NO_POINTERS = {
    "gather": (lambda p: fp.gather([1]), "gather needs pointers, not an int"),
    "gather, some": (lambda p: fp.gather([p, 3.5]), "gather needs pointers, not a float"),
    "gather, no list": (lambda p: fp.gather(1), "gather needs a list of pointers, not an int"),
    "gather, a group": (
        lambda p: fp.gather([fp.group(p)]),
        "gather needs pointers, not a PointerGroup",
    ),
    "as_completed": (
        lambda p: list(fp.as_completed([3])),
        "as_completed needs pointers, not an int",
    ),
    "as_completed, some": (
        lambda p: list(fp.as_completed([p, "q"])),
        "as_completed needs pointers, not a str",
    ),
    "as_completed, no list": (
        lambda p: fp.as_completed(None),
        "as_completed needs a list of pointers, not a NoneType",
    ),
    "group": (lambda p: fp.group(p, 3), "a group binds pointers, not an int"),
}


def test_what_is_no_pointer_is_named(bob, x):
    p = bob.send(x)

    def check(case):
        use, message = case
        with pytest.raises(TypeError) as caught:
            use(p)
        assert str(caught.value) == message

    assert each(NO_POINTERS, check) == {}
    assert torch.equal(fp.gather(q for q in [p])[0], x)
    assert list(fp.as_completed({p: "a"})) == [p]


def test_a_group_is_a_list_of_its_pointers(cluster, x):
    assert [t.tolist() for t in fp.gather(cluster.send(x))] == [x.tolist()] * 3


# ---------------------------------------------------------------- a closed cluster


def test_a_closed_cluster_cannot_be_entered(transport):
    cluster = fp.Cluster(["bob"], transport=transport)
    cluster.close()
    with (
        pytest.raises(fp.ClosedError, match=r"`with cluster`.*closed.*make a new Cluster"),
        cluster,
    ):
        pytest.fail("entered")
    assert cluster.closed
