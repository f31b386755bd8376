"""The protocol of secure aggregation without a cluster: its steps, drops, refusals, arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedproc.client import masking, shamir
from fedproc.client.fixed_point import FixedPoint
from fedproc.client.layout import Layout
from fedproc.client.secure import PublicKeys, SecureClient, Setup
from fedproc.client.summed import SummedVector
from fedproc.client.update import Update
from fedproc.errors import NotPermittedError, QuorumError
from fedproc.federated.secure_sum import SecureSum

STEPS = ("advertise", "share", "mask", "unmask")


def names(count):
    return tuple(f"client-{place}" for place in range(count))


def vectors(cohort, numel, seed=0):
    """Any integers of 64 bits: sums wrap around."""
    generator = np.random.default_rng(seed)
    return {c: generator.integers(-(2**63), 2**63, numel, dtype=np.int64) for c in cohort}


def plain_sum(rows, clients, numel):
    total = np.zeros(numel, dtype=np.uint64)
    for client in clients:
        total += rows[client].view(np.uint64)
    return total.view(np.int64).tolist()


def run(rows, threshold, drops=None, numel=None):
    """Plays the protocol; ``drops``: client -> the step it does not take. Returns the sum."""
    cohort, drops = tuple(rows), drops or {}
    numel = len(rows[cohort[0]]) if numel is None else numel
    setup = Setup(b"one sum", cohort, threshold)
    clients = {name: SecureClient(name, setup) for name in cohort}
    server = SecureSum(setup, numel)

    def left(step):
        return [c for c in cohort if STEPS.index(drops.get(c, "unmask")) >= STEPS.index(step)
                and drops.get(c) != step]  # fmt: skip

    server.take_keys({c: clients[c].advertise_keys() for c in left("advertise")})
    server.take_shares({c: clients[c].share_keys(server.keys) for c in left("share")})
    for c in left("mask"):
        words = rows[c].copy()
        clients[c].mask(words.view(np.uint64), server.sealed_for(c))
        assert not np.array_equal(words, rows[c]) or not numel
        server.add(c, torch.from_numpy(words))
    server.require_survivors()
    answers = {c: clients[c].unmask(server.survivors) for c in left("unmask")}
    return server.unmask(answers).tolist(), server.survivors


# ---------------------------------------------------------------- the sum


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dropped", [0, 1, 3])
def test_masked_sum_is_the_plain_sum_bit_for_bit(step, dropped):
    cohort = names(10)
    rows = vectors(cohort, 33)
    drops = dict.fromkeys(cohort[2 : 2 + dropped], step)
    found, survivors = run(rows, 7, drops)
    expected = cohort if step == "unmask" else [c for c in cohort if c not in drops]
    assert survivors == list(expected)
    assert found == plain_sum(rows, survivors, 33)


@pytest.mark.parametrize("step", STEPS)
def test_one_drop_too_many_ends_it(step):
    cohort = names(6)
    with pytest.raises(QuorumError, match=r"3 of 6 clients .*, 4 are needed; nothing was unmasked"):
        run(vectors(cohort, 3), 4, dict.fromkeys(cohort[:3], step))


@given(data=st.data(), count=st.integers(2, 7), seed=st.integers(0, 2**32))
@settings(max_examples=40)
def test_whoever_drops_whenever_the_sum_is_that_of_the_survivors(data, count, seed):
    cohort = names(count)
    threshold = data.draw(st.integers(2, count))
    who = data.draw(st.sets(st.sampled_from(cohort), max_size=count - threshold))
    drops = {c: data.draw(st.sampled_from(STEPS)) for c in sorted(who)}
    rows = vectors(cohort, 9, seed)
    found, survivors = run(rows, threshold, drops)
    assert set(survivors) == {c for c in cohort if drops.get(c, "unmask") == "unmask"}
    assert found == plain_sum(rows, survivors, 9)


def test_streams_longer_than_a_piece_cancel_too():
    numel = masking._PIECE_BYTES // 8 * 2 + 5
    rows = vectors(names(3), numel)
    found, _ = run(rows, 2, {"client-1": "mask"})
    assert found == plain_sum(rows, ["client-0", "client-2"], numel)


def test_without_the_last_step_the_sum_is_noise():
    rows = {c: np.zeros(1000, dtype=np.int64) for c in names(3)}
    setup = Setup(b"", tuple(rows), 2)
    clients = {c: SecureClient(c, setup) for c in rows}
    server = SecureSum(setup, 1000)
    server.take_keys({c: clients[c].advertise_keys() for c in rows})
    server.take_shares({c: clients[c].share_keys(server.keys) for c in rows})
    for c, row in rows.items():
        clients[c].mask(row.view(np.uint64), server.sealed_for(c))
        server.add(c, torch.from_numpy(row))
        assert abs(row.view(np.uint64).astype(float).mean() / 2**63 - 1) < 0.1
    assert len(set(server._words.tolist())) == 1000


# ---------------------------------------------------------------- what a client refuses


@pytest.fixture
def three():
    """Three clients after their first two steps, with what was sealed for each."""
    setup = Setup(b"three", names(3), 2)
    clients = {c: SecureClient(c, setup) for c in setup.cohort}
    keys = {c: clients[c].advertise_keys() for c in clients}
    sealed = {c: clients[c].share_keys(keys) for c in clients}
    boxes = {c: {s: sealed[s][c] for s in clients if s != c} for c in clients}
    return clients, boxes


def words():
    return np.zeros(4, dtype=np.uint64)


def test_both_shares_of_one_client_are_never_released(three):
    clients, boxes = three
    alice = clients["client-0"]
    alice.mask(words(), boxes["client-0"])
    first = alice.unmask(["client-0", "client-1"])
    assert (set(first.self_masks), set(first.masking_keys)) == (
        {"client-0", "client-1"},
        {"client-2"},
    )
    with pytest.raises(NotPermittedError, match="refuses the step 'unmask' after 'unmask'"):
        alice.unmask(["client-0", "client-2"])


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        (["client-0"], "1 survivors, the threshold is 2"),
        (["client-1", "client-2"], "it is not among the survivors"),
        (["client-0", "mallory"], "survivors of clients that did not take the step before"),
    ],
)
def test_sets_that_cannot_be_are_refused(three, survivors, why):
    clients, boxes = three
    alice = clients["client-0"]
    alice.mask(words(), boxes["client-0"])
    with pytest.raises(NotPermittedError, match=f"client 'client-0' refuses: {why}"):
        alice.unmask(survivors)


def test_too_few_shares_leave_the_vector_unmasked_and_unsent(three):
    clients, _ = three
    row = words()
    with pytest.raises(NotPermittedError, match="1 shares, the threshold is 2"):
        clients["client-0"].mask(row, {})
    assert row.tolist() == [0] * 4


def test_a_changed_or_misdirected_message_is_refused(three):
    clients, boxes = three
    box = boxes["client-0"]
    box["client-1"] = bytes([box["client-1"][0] ^ 1]) + box["client-1"][1:]
    box["client-2"] = boxes["client-1"]["client-2"]
    clients["client-0"].mask(words(), box)
    for sender in ("client-1", "client-2"):
        with pytest.raises(NotPermittedError, match="changed or is not for this client"):
            clients["client-0"]._open(sender)
    with pytest.raises(NotPermittedError, match="changed or is not for this client"):
        clients["client-0"].unmask(["client-0", "client-1"])


def test_steps_are_taken_once_and_in_order():
    setup = Setup(b"", names(2), 2)
    alice = SecureClient("client-0", setup)
    with pytest.raises(NotPermittedError, match="refuses the step 'unmask' first"):
        alice.unmask(names(2))
    alice.advertise_keys()
    with pytest.raises(NotPermittedError, match="the step 'advertise keys' after 'advertise keys'"):
        alice.advertise_keys()


def test_a_key_that_comes_twice_is_refused():
    setup = Setup(b"", names(2), 2)
    alice, bob = (SecureClient(c, setup) for c in setup.cohort)
    keys = alice.advertise_keys()
    bob.advertise_keys()
    with pytest.raises(NotPermittedError, match="a public key comes twice"):
        alice.share_keys({"client-0": keys, "client-1": PublicKeys(keys.masking, bytes(32))})


def test_a_threshold_of_one_is_refused():
    with pytest.raises(NotPermittedError, match="a sum of one"):
        SecureClient("client-0", Setup(b"", names(2), 1))


def test_keys_are_fresh_in_every_sum():
    setup = Setup(b"", names(2), 2)
    found = {SecureClient("client-0", setup).advertise_keys() for _ in range(5)}
    assert len(found) == 5


def test_shares_that_give_another_key_are_noticed():
    cohort = names(4)
    setup = Setup(b"", cohort, 2)
    clients = {c: SecureClient(c, setup) for c in cohort}
    server = SecureSum(setup, 2)
    server.take_keys({c: clients[c].advertise_keys() for c in cohort})
    server.take_shares({c: clients[c].share_keys(server.keys) for c in cohort})
    for c in cohort[:3]:
        row = words()[:2]
        clients[c].mask(row, server.sealed_for(c))
        server.add(c, torch.from_numpy(row.view(np.int64)))
    answers = {c: clients[c].unmask(server.survivors) for c in cohort[:2]}
    released = answers["client-0"].masking_keys
    released["client-3"] = bytes([0] * 32) + bytes([released["client-3"][-1] ^ 1])
    with pytest.raises(ValueError, match="shares"):
        server.unmask(answers)


# ---------------------------------------------------------------- primitives


def test_masks_wrap_and_undo():
    row = np.array([2**64 - 1, 0, 2**63], dtype=np.uint64)
    before = row.copy()
    masking.add_mask(row, bytes(32))
    # AES-256 of the zero block under the zero key (NIST, AESAVS)
    first = int.from_bytes(bytes.fromhex("dc95c078a2408989"), "little")
    second = int.from_bytes(bytes.fromhex("ad48a21492842087"), "little")
    assert row[:2].tolist() == [(2**64 - 1 + first) % 2**64, second]
    masking.add_mask(row, bytes(32), subtract=True)
    assert row.tolist() == before.tolist()


def test_both_sides_agree_on_one_key_and_other_purposes_on_another():
    a, b = (masking.private_key(bytes([place]) * 32) for place in (1, 2))
    one = masking.agree(a, masking.public_key(b), b"x", keys=2)
    assert one == masking.agree(b, masking.public_key(a), b"x", keys=2)
    other = masking.agree(a, masking.public_key(b), b"y", keys=2)
    assert len({*one, *other}) == 4
    assert {len(key) for key in one} == {32}


@given(secret=st.binary(min_size=32, max_size=32), points=st.integers(1, 9), data=st.data())
@settings(max_examples=60)
def test_any_threshold_shares_give_the_secret(secret, points, data):
    threshold = data.draw(st.integers(1, points))
    shares = shamir.split(secret, threshold, points)
    assert {len(share) for share in shares} == {shamir.SHARE_BYTES}
    chosen = data.draw(st.permutations(range(1, points + 1)))[:threshold]
    assert shamir.combine({x: shares[x - 1] for x in chosen}, threshold) == secret


def test_fewer_shares_fit_every_secret():
    """With t - 1 shares there is a polynomial for any secret: they say nothing about it."""
    shares = shamir.split(b"s" * 32, 3, 5)
    known = {1: shares[0], 2: shares[1]}
    with pytest.raises(ValueError, match="2 shares, 3 are needed"):
        shamir.combine(known, 3)
    first, second = (int.from_bytes(share, "big") for share in known.values())
    for guess in (bytes(32), b"t" * 32, b"\xff" * 32):
        # a parabola has f(0) = 3 f(1) - 3 f(2) + f(3)
        third = (int.from_bytes(guess, "big") - 3 * first + 3 * second) % shamir.PRIME
        assert shamir.combine({**known, 3: third.to_bytes(33, "big")}, 3) == guess


def test_a_polynomial_by_hand():
    """f(x) = 5 + 3x + 2x^2: f(1) = 10, f(2) = 19, f(3) = 32."""
    shares = {x: value.to_bytes(33, "big") for x, value in ((1, 10), (2, 19), (3, 32))}
    assert int.from_bytes(shamir.combine(shares, 3), "big") == 5


def test_the_field_is_a_prime_field():
    """Miller-Rabin with the first 40 primes as bases."""
    n = shamir.PRIME
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    primes = [p for p in range(2, 174) if all(p % q for q in range(2, p))]
    assert len(primes) == 40
    for base in primes:
        x = pow(base, odd, n)
        assert x in (1, n - 1) or any(pow(x, 2**s, n) == n - 1 for s in range(1, twos))


@pytest.mark.parametrize(("secret", "threshold", "points"), [(31, 2, 3), (32, 0, 3), (32, 4, 3)])
def test_bad_shares_are_refused(secret, threshold, points):
    with pytest.raises(ValueError, match=r"bytes|threshold"):
        shamir.split(bytes(secret), threshold, points)


# ---------------------------------------------------------------- fixed point


def test_fixed_point_rounds_to_even_and_comes_back():
    form = FixedPoint(bits=4, terms=10)
    values = torch.tensor([0.0, 1.0, -1.0, 1 / 32, 3 / 32, -0.03125, 0.1], dtype=torch.float64)
    words = torch.empty(7, dtype=torch.int64)
    assert form.encode(values.clone(), words)
    assert words.tolist() == [0, 16, -16, 0, 2, 0, 2]
    assert form.decode(words).tolist() == [0.0, 1.0, -1.0, 0.0, 0.125, 0.0, 0.125]


@pytest.mark.parametrize("terms", [2, 3, 10, 1000])
@pytest.mark.parametrize("bits", [1, 32, 52])
def test_sums_at_the_bound_do_not_overflow(terms, bits):
    form = FixedPoint(bits, terms)
    largest = np.nextafter(form.bound, 0)
    words = torch.empty(1, dtype=torch.int64)
    for value in (largest, -largest):
        assert form.encode(torch.tensor([value], dtype=torch.float64), words)
        assert abs(words.item()) * terms < 2**63
    for value in (form.bound, -form.bound, float("nan"), float("inf"), -float("inf")):
        words.fill_(7)
        assert not form.encode(torch.tensor([0.0, value], dtype=torch.float64), words.expand(2))
        assert words.item() == 7


@given(
    values=st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    weights=st.lists(st.integers(1, 1000), min_size=2, max_size=6),
)
def test_the_mean_is_exact_to_the_resolution(values, weights):
    form = FixedPoint(32, len(weights))
    total = torch.zeros(len(values), dtype=torch.int64)
    exact = torch.tensor(values, dtype=torch.float64)
    for weight in weights:
        words = torch.empty(len(values), dtype=torch.int64)
        assert form.encode(exact * weight, words)
        total += words
    mean = form.decode(total) / sum(weights)
    error = len(weights) * 2.0**-33 / sum(weights)
    assert torch.all((mean - exact).abs() <= error + exact.abs() * 1e-15)


def test_changes_that_were_clipped_before_are_summed_as_they_are():
    """The seam for clipping: an update that holds changes is measured from zeros."""
    layout = Layout.of(torch.nn.BatchNorm1d(2))
    form = SummedVector(layout, FixedPoint(32, 2), uniform=True)
    block = layout.new_block()
    layout.sections[0].view(block).copy_(torch.tensor([0.5, -0.25, 2.0, 0.0]))
    update = Update(block, examples=7, steps=3.0, step_norm=None, rows=14, loss_sum=7.0)
    words = form.write(layout.new_block(), update)
    totals = form.read(words + words)
    assert totals.change.tolist() == [1.0, -0.5, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert (totals.weight, totals.examples, totals.loss) == (2, 14, 0.5)
    assert (totals.growth.tolist(), totals.metrics) == ([0], {})
