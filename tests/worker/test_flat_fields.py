"""The fields of a flat call: what the parent writes is read without pickle, all else by pickle."""

import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproc.worker import flat
from fedproc.worker import loop as loops
from tests.remote.ways import exact
from tests.worker.pair import made, needs_compiled, pickled

pytestmark = needs_compiled

EDGES = [0, 2**7, 2**8, 2**15, 2**16, 2**31, 2**32, 2**63]
NUMBERS = st.builds(
    lambda edge, sign, more: sign * edge + more,
    st.sampled_from(EDGES), st.sampled_from([1, -1]), st.integers(-2, 2),
)  # fmt: skip
PLAIN = st.one_of(
    NUMBERS, st.floats(), st.booleans(), st.none(), st.text(max_size=70),
    st.sampled_from(["\ud800", "é" * 127, "é" * 128, "a" * 255, "a" * 256]),
    st.binary(max_size=70), st.sampled_from([bytes(255), bytes(256)]),
)  # fmt: skip
GIVEN_BACK = f":{__name__}:given_back"


def given_back(*args):
    return args


@pytest.fixture
def unpickled():
    """Bodies that the compiled way has given to pickle."""
    seen, loads = [], pickle.loads

    def watched(body):
        seen.append(body)
        return loads(body)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle, "loads", watched)
        flat.prepared(loops.REPORT_COMMANDS, 1e9)
    return seen


@pytest.mark.parametrize(
    "args",
    [
        (), (0, 255), (256, 65535, 65536, -1, -256), (2**31 - 1, -(2**31)),
        (2**56, -(2**56) - 1, 2**63 - 1, -(2**63)), (True, False, None),
        (0.5, -0.0, math.inf, 5e-324), ("", "é𝄞", "a" * 255), (b"", bytes(255)), tuple(range(40)),
    ],
)  # fmt: skip
def test_plain_values_are_read_without_pickle(pair, unpickled, args):
    made_of = pair.call(GIVEN_BACK, *args)
    assert exact(pair.value(made_of)) == exact(args)
    assert not pair.left
    assert not unpickled


@pytest.mark.parametrize("args", [("a" * 256,), (2**31,), (2**63,), ([3],), (bytes(256),)])
def test_others_are_read_by_pickle(pair, unpickled, args):
    made_of = pair.call(GIVEN_BACK, *args)
    assert pair.value(made_of) == args
    assert not pair.left
    assert len(unpickled) == 1


@settings(max_examples=150)
@given(st.lists(st.lists(PLAIN, max_size=12), max_size=5))
def test_any_plain_values_are_the_same(calls):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for pair in made(monkeypatch):
            for args in calls:
                number = pair.call(GIVEN_BACK, *args)
                assert exact(pair.value(number)) == exact(tuple(args))


CODES = b"\x80\x05KMJ\x8aG\x8cCN\x88\x89}()\x85\x86\x87t.\x00\x01\x08\xff"


@st.composite
def broken(draw):
    """The body of a call with some bytes changed, left out or put in, all codes that are known."""
    args = draw(st.lists(st.sampled_from([1, 300, -1, 2**40, 0.5, "ab", b"c", None]), max_size=6))
    body = bytearray(pickled((GIVEN_BACK, tuple(args), {}, None, False, ())))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body) - 1))
        new = draw(st.sampled_from([b"", *(bytes([code]) for code in CODES)]))
        body[at : at + draw(st.integers(0, 2))] = new
    return bytes(body)


WHOLE = pickled((GIVEN_BACK, (1,), {}, None, False, ()))


@pytest.mark.parametrize(
    "body",
    [
        WHOLE[:-1] + b"(.",  # a mark is left
        WHOLE[:-1] + b"N.",  # an item more: pickle takes the last
        WHOLE + b"N",  # bytes behind the end, which pickle does not mind
        WHOLE[:-1],
        WHOLE.replace(b"\x80\x05", b"\x80\x04", 1),
        b"\x80\x05(K\x01(\x85t.",  # a tuple over a mark
        b"\x80\x05K\x01\x86.",
        b"\x80\x05t.",
    ],
)
def test_a_body_that_the_parent_never_writes_is_what_pickle_says(pair, body):
    pair.give(body)
    pair.call(GIVEN_BACK, 2)


@settings(max_examples=400)
@given(st.lists(broken(), min_size=1, max_size=5))
def test_both_ways_refuse_the_same_bodies(bodies):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for pair in made(monkeypatch):
            for body in bodies:
                pair.give(body)
