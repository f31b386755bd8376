"""Rounds under secure aggregation: what comes out, who may drop out, and what the parent sees."""

import contextlib
import importlib.util
import json
import os
import signal
import struct

import pytest
import torch
from torch import nn

from fedproc.client.fixed_point import FixedPoint
from fedproc.client.summed import weighted_change
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import CommandTimeoutError, NotPermittedError, QuorumError, WorkerLostError
from fedproc.federated import secure_attempt, strategies
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.secure_aggregation import SecureAggregation
from fedproc.memory.arena import Mapped
from fedproc.transport.channel import Channel
from tests.federated.worlds import batchnorm_net, bits, cross_entropy, linear, sgd, shards

SIZES = [12, 9, 6, 15, 8, 10]
LOCAL = LocalTraining(cross_entropy, sgd, epochs=2)
RESOLUTION = len(SIZES) * 2.0**-33 / sum(SIZES)


def made(cluster, model=None, local=LOCAL, sizes=SIZES, **options):
    secure = options.pop("secure", SecureAggregation())
    data = FederatedDataset(shards(sizes), cluster)
    return Aggregator(model or linear(), data, local, secure=secure, **options)


def values(model):
    return {name: value.double() for name, value in model.state_dict().items()}


def close(one, other, rounds):
    """Equal to the fixed-point resolution, and to the last bit of float32 that it may turn."""
    one, other = values(one), values(other)
    return one.keys() == other.keys() and all(
        torch.allclose(one[n], other[n], rtol=rounds * 2e-7, atol=rounds * (RESOLUTION + 1e-7))
        for n in one
    )


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("model", [linear, batchnorm_net])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_model_is_that_of_plain_averaging(cluster, model, weighting):
    plain = made(cluster, model(), secure=None, weighting=weighting)
    secure = made(cluster, model(), weighting=weighting)
    plain.run(3), secure.run(3)
    assert close(secure.model, plain.model, rounds=3)
    for one, other in zip(secure.history, plain.history, strict=True):
        assert (one.accepted, one.clients) == (other.accepted, other.clients)
        assert (one.failures, one.examples, one.skipped) == ({}, sum(SIZES), ())
        assert one.loss == pytest.approx(other.loss, abs=1e-8)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-8)
        assert one.bytes_moved > other.bytes_moved


def test_the_counter_of_batchnorm_is_the_largest(cluster):
    local = LocalTraining(cross_entropy, sgd, epochs=2, batch_size=5)
    secure = made(cluster, batchnorm_net(), local, [12, 7, 3, 0])
    record = secure.run_round()
    assert (record.accepted, record.skipped) == (("a", "b", "c"), ("d",))
    assert secure.model[1].num_batches_tracked.item() == 2 * 3  # 12 rows: three batches an epoch
    assert secure.model[1].num_batches_tracked.dtype == torch.int64


def test_the_same_bits_on_any_number_of_workers():
    found = []
    for workers, transport in ((1, "inline"), (3, "inline"), (2, "process")):
        with Cluster(workers, transport=transport) as cluster:
            secure = made(cluster, batchnorm_net(), strategy=strategies.FedAdam())
            secure.run(2)
            found.append(bits(secure.model))
    assert found[0] == found[1] == found[2]


def test_the_mean_is_that_of_the_integers_bit_for_bit(cluster):
    """With 0, 1 and the most allowed drop-outs: parameters are set, so the integers are known."""
    wanted = {"a": 0.1, "b": -3.7, "c": 2.0**-20, "d": 5.25, "e": 1e-9, "f": -0.3}
    form = FixedPoint(32, len(SIZES))
    for gone in ("", "c", "cf"):

        def train(model, x, y, ctx, gone=gone):
            if ctx.client in gone:
                raise RuntimeError("no")
            with torch.no_grad():
                model.weight.fill_(wanted[ctx.client])

        model = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        secure = made(cluster, model, train)
        record = secure.run_round()
        left = [c for c in wanted if c not in gone]
        weights = dict(zip(wanted, SIZES, strict=True))
        integer = sum(round(weights[c] * wanted[c] * 2**form.bits) for c in left)
        assert record.accepted == tuple(left)
        assert secure.model.weight.item() == integer * 2.0**-32 / sum(weights[c] for c in left)


def test_fedprox_and_server_optimizers_work(cluster):
    for strategy in (strategies.FedProx(0.1), strategies.FedAvgM(), strategies.FedYogi()):
        plain = made(cluster, secure=None, strategy=strategy)
        secure = made(cluster, strategy=strategy)
        plain.run(2), secure.run(2)
        assert close(secure.model, plain.model, rounds=2)


def test_half_precision_and_frozen_parameters(cluster):
    def model():
        net = batchnorm_net().bfloat16()
        net[0].bias.requires_grad_(False)
        return net

    def train(net, x, y, ctx):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter += len(x)

    plain, secure = made(cluster, model(), train, secure=None), made(cluster, model(), train)
    plain.run(1), secure.run(1)
    assert bits(secure.model) == bits(plain.model)


def test_a_saved_run_goes_on_with_the_same_bits(cluster, tmp_path):
    secure = made(cluster)
    secure.run(1)
    secure.save(tmp_path / "saved")
    data = FederatedDataset(shards(SIZES), cluster)
    again = Aggregator.load(tmp_path / "saved", linear(), data, LOCAL, secure=SecureAggregation())
    secure.run(1), again.run(1)
    assert bits(secure.model) == bits(again.model)


def test_metrics_of_a_function_leave_as_means_of_loss_and_steps(cluster):
    def train(model, x, y, ctx):
        own = {"loss": float(len(x)), "secret": 1.0}
        return own | {"steps": 4.0} if ctx.client == "a" else own

    record = made(cluster, local=train).run_round()
    mean = sum(size * size for size in SIZES) / sum(SIZES)
    assert record.metrics == {"loss": mean, "steps": 4.0}
    assert record.loss == mean


def test_private_data_and_a_trace(tmp_path):
    with Cluster(2, min_rows=10) as cluster:
        data = FederatedDataset(shards(SIZES), cluster, private=True)
        secure = Aggregator(linear(), data, LOCAL, secure=SecureAggregation())
        plain = Aggregator(linear(), FederatedDataset(shards(SIZES), cluster), LOCAL)
        secure.profile(tmp_path / "trace.json")
        plain.run(1)
        assert close(secure.model, plain.model, rounds=1)
        assert secure.history[0].failures == {}
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    trained = {event["name"]: event["args"] for event in events if event.get("cat") == "train"}
    assert trained == {client: {} for client in "abcdef"}


# ---------------------------------------------------------------- refused at construction


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (strategies.Median(), "Median compares single updates"),
        (strategies.TrimmedMean(0.1), "TrimmedMean compares single updates"),
        (strategies.Krum(1), "Krum compares single updates"),
        (strategies.GeometricMedian(), "GeometricMedian compares single updates"),
        (strategies.FedNova(), "FedNova weighs every update by what it says of itself"),
        (strategies.Scaffold(), "Scaffold reads what every client keeps"),
    ],
)
def test_rules_that_need_single_updates_are_refused(cluster, strategy, why):
    with pytest.raises(ValueError, match=f"{why}, but secure aggregation shows their sum only"):
        made(cluster, strategy=strategy)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan"), True, "all", None])
def test_a_threshold_that_cannot_be_met_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        SecureAggregation(threshold=threshold)


@pytest.mark.parametrize("fractional", [0, 53, 2.5, True, None])
def test_bits_outside_of_their_range_are_refused(fractional):
    with pytest.raises(ValueError, match="bits must be a whole number"):
        SecureAggregation(bits=fractional)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fedproc\[secure\]'"):
        SecureAggregation()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"clients_per_round": 1}, "the sum of one is its update"),
        ({"secure": SecureAggregation(0.16)}, "threshold=0.16 of 6 clients a round lets 1"),
        ({"secure": "yes"}, "secure must be SecureAggregation"),
        ({"model": nn.BatchNorm1d(6), "buffers": 65}, "integer buffers of 66 elements"),
    ],
)
def test_what_a_sum_cannot_hide_or_find_is_refused(cluster, options, why):
    if "buffers" in options:
        options["model"].register_buffer("more", torch.zeros(options.pop("buffers")).long())
    with pytest.raises(ValueError, match=why):
        made(cluster, **options)


def test_how_many_must_finish():
    assert [SecureAggregation().needed(n) for n in (2, 3, 6, 10, 100)] == [2, 2, 4, 7, 66]
    assert SecureAggregation(0.07).needed(100) == 7
    assert SecureAggregation(1.0).needed(9) == 9


# ---------------------------------------------------------------- refused updates


def secret_of(client):
    return 12345.678901 + ord(client)


def misbehaving(model, x, y, ctx):
    with torch.no_grad():
        if ctx.client == "a":
            model.weight.fill_(2.0**40 + secret_of("a"))
        if ctx.client == "b":
            model.weight[0, 0] = float("nan")
    if ctx.client == "c":
        raise ValueError(f"the weights are {secret_of('c')}")
    return {"loss": float("inf") if ctx.client == "d" else 1.0}


def test_failures_name_the_client_and_show_no_value(cluster):
    record = made(cluster, local=misbehaving, secure=SecureAggregation(0.3)).run_round()
    assert record.accepted == ("e", "f")
    told = {client: str(error) for client, error in record.failures.items()}
    assert set(told) == set("abcd")
    for client, text in told.items():
        assert f"client {client!r}" in text
        everything = text + getattr(record.failures[client], "remote_traceback", "")
        assert "12345" not in everything
        assert "12442" not in everything
        assert "the weights are" not in text
    assert isinstance(record.failures["a"], OverflowError)
    assert "leaves the range of the fixed point" in told["a"]
    assert isinstance(record.failures["b"], FloatingPointError)
    assert "1 of 18 values of 'weight' are not finite" in told["b"]
    assert "failed with ValueError at" in told["c"]
    assert "its loss or number of steps is not finite" in told["d"]


def test_what_a_function_keeps_does_not_leave(cluster):
    def train(model, x, y, ctx):
        ctx.state["rows"] = x

    with pytest.raises(QuorumError, match=r"ctx\.state would leave its worker") as caught:
        made(cluster, local=train).run_round()
    assert isinstance(caught.value.failures["a"], NotPermittedError)


def test_a_counter_that_grows_too_much_is_refused(cluster):
    def train(model, x, y, ctx):
        model[1].num_batches_tracked += {"a": 4096, "b": 4097, "c": -1}.get(ctx.client, 1)

    secure = made(cluster, batchnorm_net(), train)
    record = secure.run_round()
    assert set(record.failures) == set("bc")
    assert secure.model[1].num_batches_tracked.item() == 4096


# ---------------------------------------------------------------- who drops out


@contextlib.contextmanager
def one_each(transport):
    """A worker for every client, so that a client drops out with its worker."""
    with Cluster(list("abcdef"), transport=transport) as cluster:
        yield cluster


STEPS = ["advertise_keys", "share_keys", "train_masked", "unmask"]
INLINE = [("inline", step) for step in STEPS]
ALL = [*INLINE, *(("process", step) for step in STEPS)]
LAST = [*INLINE[:3], ("process", "train_masked")]


def kill_before(monkeypatch, cluster, step, names):
    """Kills workers right before ``step`` is asked of them, each once."""
    real, left = secure_attempt.call_there, set(names)

    def call(trainer, method, *args):
        name = trainer._data().link.name
        if method == step and name in left:
            left.remove(name)
            cluster[name].kill()
        return real(trainer, method, *args)

    monkeypatch.setattr(secure_attempt, "call_there", call)


@pytest.mark.parametrize(
    ("transport", "step", "gone"),
    [*((t, s, "abe") for t, s in ALL), *((t, s, "c") for t, s in INLINE)],
)
def test_clients_that_drop_out_are_recovered(monkeypatch, transport, step, gone):
    with one_each(transport) as six:
        kill_before(monkeypatch, six, step, gone)
        secure = made(six, secure=SecureAggregation(0.5), retries=0)
        record = secure.run_round()
    counted = "abcdef" if step == "unmask" else [c for c in "abcdef" if c not in gone]
    assert record.accepted == tuple(counted)
    assert set(record.failures) == set("abcdef") - set(counted)
    assert all(isinstance(error, WorkerLostError) for error in record.failures.values())
    data = {c: shard for c, shard in shards(SIZES).items() if c in counted}
    with Cluster(1, transport="inline") as cluster:
        plain = Aggregator(linear(), FederatedDataset(data, cluster), LOCAL)
        plain.run(1)
        assert close(secure.model, plain.model, rounds=1)


@pytest.mark.parametrize(("transport", "step"), [*INLINE, ("process", "unmask")])
def test_below_the_threshold_the_round_fails_and_reveals_nothing(monkeypatch, transport, step):
    with one_each(transport) as six:
        kill_before(monkeypatch, six, step, "abe")
        secure = made(six, retries=0)  # 4 of 6 are needed
        before = bits(secure.model)
        did = dict(zip(STEPS, ["advertised", "shared", "sent", "released"], strict=True))[step]
        with pytest.raises(QuorumError) as caught:
            secure.run_round()
        text = str(caught.value)
        assert f"round 1: 3 of 6 clients {did}" in text
        assert "4 are needed; nothing was unmasked; the model is unchanged" in text
        assert set(caught.value.failures) == (set() if step == "unmask" else set("abe"))
        assert bits(secure.model) == before
        assert secure.run_round().accepted == tuple("abcdef")  # on the workers that are left


@pytest.mark.parametrize(("transport", "step"), LAST)
def test_a_lost_worker_changes_no_bit_if_there_is_another_attempt(monkeypatch, transport, step):
    with one_each(transport) as six:
        undisturbed = made(six)
        undisturbed.run(2)
        kill_before(monkeypatch, six, step, "c")
        secure = made(six)
        assert [record.failures for record in secure.run(2)] == [{}, {}]
        assert bits(secure.model) == bits(undisturbed.model)


def test_min_clients_holds_before_anything_is_unmasked(cluster, monkeypatch):
    asked = []
    real = secure_attempt.call_there
    monkeypatch.setattr(
        secure_attempt, "call_there", lambda t, m, *a: (asked.append(m), real(t, m, *a))[1]
    )

    def train(model, x, y, ctx):
        if ctx.client == "f":
            raise RuntimeError("no")

    with pytest.raises(QuorumError, match="5 of 6 clients finished, 6 are needed"):
        made(cluster, local=train, min_clients=6).run_round()
    assert "unmask" not in asked


def test_a_round_with_rows_of_one_client_is_refused(cluster):
    secure = made(cluster, sizes=[5, 0, 0], clients_per_round=3)
    with pytest.raises(QuorumError, match="1 clients have rows; the sum of one"):
        secure.run_round()


def killing():
    """A train function, sent by value: workers need not import this module for it."""

    def train(model, x, y, ctx):
        if ctx.client == "c":
            os.kill(os.getpid(), signal.SIGKILL)

    return train


@pytest.mark.faults
def test_a_client_that_kills_every_worker_is_given_up():
    with Cluster(list("abcdef"), restart=True) as cluster:
        record = made(cluster, local=killing()).run_round()
        assert list(record.failures) == ["c"]
        assert isinstance(record.failures["c"], WorkerLostError)


@pytest.mark.faults
def test_when_no_worker_is_left_the_round_fails():
    with Cluster(1) as cluster:
        secure = made(cluster, local=killing())
        with pytest.raises(QuorumError, match="no worker is left"):
            secure.run_round()


def test_who_misses_the_deadline_is_recovered(tmp_path):
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def never_ends(model, x, y, ctx):
        if ctx.client == "c" and ctx.round == 2:
            os.open(gate, os.O_RDONLY)  # a pipe without a writer

    with Cluster(list("abcdef")) as cluster:
        secure = made(cluster, local=never_ends, deadline=12.0)
        _, record = secure.run(2)
        assert record.accepted == tuple("abdef")
        assert isinstance(record.failures["c"], CommandTimeoutError)
        assert "missed the deadline of 12 s in round 2: it was still training" in str(
            record.failures["c"]
        )


# ---------------------------------------------------------------- what the parent sees


class Tap:
    """Every byte that comes out of a channel or out of another process's shared memory."""

    def __init__(self, monkeypatch):
        self.seen = []
        parse, checked = Channel._parse, Mapped._checked

        def reads_channel(channel, handle):
            self.seen.append(b"".join(channel._input[2]))
            return parse(channel, handle)

        def reads_memory(mapped, block):
            found = checked(mapped, block)
            self.seen.append(found[block.offset : block.offset + block.nbytes])
            return found

        monkeypatch.setattr(Channel, "_parse", reads_channel)
        monkeypatch.setattr(Mapped, "_checked", reads_memory)

    def everything(self, cluster):
        """And all that ever lay in the shared memory of the workers, read or not."""
        memory = [written(worker.link.mapped) for worker in cluster]
        return b"|".join([*self.seen, *memory])


def written(mapped):
    """The pages of a sparse file that were touched; what was freed is still there."""
    found, end = [], 0
    while True:
        try:
            start = os.lseek(mapped.fd, end, os.SEEK_DATA)
        except OSError:  # no data behind
            return b"|".join(found)
        end = os.lseek(mapped.fd, start, os.SEEK_HOLE)
        found.append(os.pread(mapped.fd, end - start, start))


def traces(client, shard):
    """What would give a client away: its model, its change and its loss, in every form."""
    start = linear()
    with Cluster(1, transport="inline") as cluster:
        alone = Aggregator(start, FederatedDataset({client: shard}, cluster), LOCAL)
        record = alone.run_round()
    x, y = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (start, alone.model))
    change = y.double() - x.double()
    weighted = change * len(shard[0])
    integers = (weighted * 2.0**32).round().long()
    forms = {
        "model, float32": [pair(y[i : i + 2]) for i in range(len(y) - 1)],
        "model, float64": [pair(y[i : i + 1].double()) for i in range(len(y))],
        "change, float32": [pair((y - x)[i : i + 2]) for i in range(len(y) - 1)],
        "change, float64": [pair(value) for value in change],
        "weighted change": [pair(value) for value in weighted],
        "fixed point": [pair(value) for value in integers],
        "loss": [
            struct.pack(order + "d", record.loss * rows)
            for order in "<>"
            for rows in (1, len(shard[0]), 2 * len(shard[0]))
        ],
    }
    assert all(len(needle) == 8 for needles in forms.values() for needle in needles)
    return forms


def pair(values):
    return values.numpy().tobytes()


def found(everything, forms):
    return {form for form, needles in forms.items() if any(n in everything for n in needles)}


@pytest.mark.parametrize("gone", ["", "c"])
def test_no_byte_that_reaches_the_parent_shows_an_update(cluster, monkeypatch, gone):
    tap = Tap(monkeypatch)
    if gone:
        real = secure_attempt.SecureSum.add
        monkeypatch.setattr(
            secure_attempt.SecureSum, "add", lambda s, c, w: None if c in gone else real(s, c, w)
        )
    made(cluster).run_round()
    everything = tap.everything(cluster)
    assert len(everything) > 10_000
    for client, shard in shards(SIZES).items():
        assert found(everything, traces(client, shard)) == set()


def test_the_tap_finds_an_update_in_the_clear(cluster, monkeypatch):
    tap = Tap(monkeypatch)
    made(cluster, secure=None).run_round()
    everything = tap.everything(cluster)
    for client, shard in shards(SIZES).items():
        assert {"model, float32", "loss"} <= found(everything, traces(client, shard))


@pytest.mark.parametrize("transport", ["inline"])
def test_the_tap_finds_an_update_in_fixed_point_that_was_not_masked(cluster, monkeypatch):
    """Inline workers run the code of this process, so it can be broken here."""
    monkeypatch.setattr("fedproc.client.secure.SecureClient.mask", lambda self, words, sealed: None)
    monkeypatch.setattr(secure_attempt.SecureSum, "unmask", lambda s, a: torch.ones(29).long())
    tap = Tap(monkeypatch)
    made(cluster).run_round()
    everything = tap.everything(cluster)
    for client, shard in shards(SIZES).items():
        assert found(everything, traces(client, shard)) == {"fixed point"}


def test_a_secure_trainer_trains_for_nothing_else(cluster):
    secure = made(cluster)
    secure.run_round()
    trainer = secure._crew.trainer("alice")
    for method in ("train", "train_some"):
        with pytest.raises(NotPermittedError, match="it returns masked updates"):
            getattr(trainer, method)().get()


def test_the_vector_before_the_masks_is_the_weighted_change():
    from fedproc.client.layout import Layout

    model = linear()
    layout = Layout.of(model)
    before = layout.pack(layout.tensors(model), layout.new_block())
    with torch.no_grad():
        model.weight += 0.5
    after = layout.pack(layout.tensors(model), layout.new_block())
    pieces = list(weighted_change(layout.of_kind("trained"), before, after, 3.0))
    assert torch.cat(pieces).tolist() == pytest.approx([1.5] * 18 + [0.0] * 3)
