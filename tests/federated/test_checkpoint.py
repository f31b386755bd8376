import json
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import CheckpointError
from fedproc.federated import plainstate, strategies, tensorfile
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import (
    batchnorm_net,
    bits,
    blobs,
    cross_entropy,
    dropout_net,
    linear,
    sgd,
    shards,
)

LOCAL = LocalTraining(cross_entropy, sgd, epochs=2, batch_size=6)
SIZES = [12, 18, 6, 24]


@pytest.fixture(scope="module")
def inline():
    with Cluster(2, transport="inline") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def other():
    with Cluster(3) as cluster:
        yield cluster


def make(cluster, model=None, local=LOCAL, load=None, **options):
    data = FederatedDataset(shards(SIZES), cluster)
    model = batchnorm_net() if model is None else model
    if load is not None:
        return Aggregator.load(load, model, data, local, **options)
    return Aggregator(model, data, local, **options)


def personal(model, x, y, ctx):
    """Keeps a bit of everything that can be kept."""
    ctx.state.setdefault("tensor", torch.zeros(3))
    ctx.state["tensor"] += torch.rand(3, generator=ctx.generator)
    ctx.state["array"] = ctx.state.get("array", np.zeros(2, np.float32)) + 1
    ctx.state["deep"] = [None, 1.5, "ü", {"n": ctx.round, 7: True}]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += ctx.state["tensor"].sum() * 0.01 + float(ctx.state["array"].sum()) * 0.01


@pytest.mark.parametrize(
    ("local", "strategy"),
    [
        (LOCAL, strategies.FedAvg()),
        (LOCAL, strategies.FedAdam()),
        (LOCAL, strategies.Scaffold()),
        (personal, strategies.FedAvgM()),
    ],
)
def test_continuing_after_a_load_gives_the_same_bits(inline, other, tmp_path, local, strategy):
    options = {"strategy": strategy, "local": local, "clients_per_round": 3, "seed": 5}
    whole = make(inline, **options)
    whole.run(4)
    for stop in (0, 1, 3):
        first = make(inline, **options)
        first.run(stop)
        first.save(tmp_path / "run")
        second = make(other, model=dropout_like(), load=tmp_path / "run", **options)
        history = second.run(4 - stop)
        assert bits(second.model) == bits(whole.model)
        assert [r.loss for r in history] == [r.loss for r in whole.history]
        assert [r.clients for r in history] == [r.clients for r in whole.history]


def dropout_like():
    """A model of the same shape with other values."""
    model = batchnorm_net(seed=99)
    model[1].running_mean.fill_(7.0)
    return model


def test_the_model_given_to_load_stays_as_it_is(inline, tmp_path):
    make(inline).save(tmp_path / "run")
    model = dropout_like()
    before = bits(model)
    loaded = make(inline, model=model, load=tmp_path / "run")
    assert bits(model) == before
    assert bits(loaded.model) == bits(batchnorm_net())


def test_frozen_tied_and_half_precision_come_back(inline, tmp_path):
    def model(seed):
        made = nn.Sequential(linear(6, 6, seed), linear(6, 6, seed), dropout_net(seed=seed).half())
        made[1].weight = made[0].weight
        made[2].requires_grad_(False)
        return made

    make(inline, model=model(0)).save(tmp_path / "run")
    loaded = make(inline, model=model(1), load=tmp_path / "run").model
    assert bits(loaded) == bits(model(0))
    assert loaded[1].weight is loaded[0].weight


def test_history_comes_back(inline, tmp_path):
    def train(model, x, y, ctx):
        if ctx.client == "b":
            raise RuntimeError("b is out")
        return {"loss": 0.5}

    aggregator = make(inline, local=train)
    aggregator.run(2, evaluate_on=blobs(20))
    aggregator.save(tmp_path / "run")
    found = make(inline, local=train, load=tmp_path / "run").history
    assert found.to_dict() | {} == aggregator.history.to_dict()
    assert found[1].accepted == ("a", "c", "d")
    assert "b is out" in str(found[0].failures["b"])


@pytest.mark.parametrize(
    "change",
    [
        {"model": linear()},
        {"model": batchnorm_net(classes=4)},
        {"model": batchnorm_net().double()},
        {"strategy": strategies.FedAvgM()},
        {"seed": 1},
    ],
    ids=["names", "shapes", "dtypes", "strategy", "seed"],
)
def test_another_run_is_refused(inline, tmp_path, change):
    make(inline).save(tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        make(inline, load=tmp_path / "run", **change)
    assert not isinstance(caught.value, CheckpointError)


def test_other_clients_are_refused(inline, tmp_path):
    make(inline).save(tmp_path / "run")
    data = FederatedDataset({"x": blobs(5)}, inline)
    with pytest.raises(ValueError, match="clients"):
        Aggregator.load(tmp_path / "run", batchnorm_net(), data, LOCAL)


def test_every_truncation_and_every_flipped_byte_is_noticed(inline, tmp_path):
    path = tmp_path / "run"
    make(inline, model=linear()).save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            make(inline, model=linear(), load=path)
    for place in range(0, len(whole), 31):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            tensorfile.read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        make(inline, model=linear(), load=path)
    with pytest.raises(FileNotFoundError):
        make(inline, load=tmp_path / "nothing")


@pytest.mark.parametrize("bad", [object(), {1, 2}, (1, 2), lambda: 0, {None: 1}, np.array([None])])
def test_a_state_that_cannot_be_saved_is_a_type_error_at_save(inline, tmp_path, bad):
    aggregator = make(inline, local=lambda m, x, y, ctx: None)
    aggregator._course.kept["b"] = {"bad": [bad]}
    path = tmp_path / "run"
    path.write_bytes(b"older")
    with pytest.raises(TypeError, match="client b"):
        aggregator.save(path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_a_safetensors_file_without_pickle(inline, tmp_path):
    make(inline, model=linear()).save(tmp_path / "run")
    raw = (tmp_path / "run").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    entry = header["model/weight"]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    assert (entry["dtype"], entry["shape"]) == ("F32", [3, 6])
    values = np.frombuffer(raw[start:stop], "<f4").reshape(3, 6)
    assert np.array_equal(values, linear().weight.detach().numpy())
    ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
    assert max(ends) == len(raw) - 8 - length


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_plain_values_come_back_exactly(value):
    tensors = {}
    data = json.loads(json.dumps(plainstate.encode(value, "s", tensors)))
    assert repr(plainstate.decode(data, tensors)) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor(True),
        torch.empty(0, 3),
        torch.tensor([1 + 2j]),
        torch.ones(2, dtype=torch.bfloat16),
        nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        np.arange(6, dtype=np.uint16).reshape(2, 3).T,
        np.zeros((0, 2)),
        np.array("text"),
        np.float32(0.1),
        np.bool_(True),
    ],
    ids=repr,
)
def test_tensors_and_arrays_come_back_exactly(tmp_path, value):
    tensors = {}
    document = {"v": plainstate.encode([value], "s", tensors)}
    tensorfile.write(tmp_path / "f", document, tensors)
    document, tensors = tensorfile.read(tmp_path / "f")
    (found,) = plainstate.decode(document["v"], tensors)
    assert type(found) is type(value)
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    assert found.tolist() == value.tolist()
    assert getattr(found, "requires_grad", None) == getattr(value, "requires_grad", None)


# Writes a file, then forks writers that are killed at their first, second, third ... line, and
# tells what each left. sys.argv: the file, and what to replace by what in the code of the module.
KILLED = """
import os, pathlib, signal, sys, torch
from fedproc.federated import tensorfile
path, old, new = sys.argv[1:]
source = pathlib.Path(tensorfile.__file__).read_text()
assert old in source
module = dict(vars(tensorfile))
exec(compile(source.replace(old, new), "altered", "exec"), module)
def kill_at(line):
    seen = iter(range(line))
    def trace(frame, event, arg):
        if frame.f_code.co_filename == "altered" and next(seen, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
def left():
    try:
        document, tensors = tensorfile.read(path)
        return {(1, 5): "old", (2, 90_000): "new"}[document["n"], len(tensors["t"])]
    except Exception as error:
        return type(error).__name__
for line in range(200):
    tensorfile.write(path, {"n": 1}, {"t": torch.arange(5)})
    child = os.fork()
    if not child:
        kill_at(line)
        module["write"](path, {"n": 2}, {"t": torch.arange(90_000)})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), left(), flush=True)
    if status == 0:
        break
"""
IN_PLACE = 'target.with_name(f".{target.name}.partial")'


def killed_writes(path, old, new):
    """What writers left that were killed at every line, the last one not: [(exit code, left)]."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), old, new],
        check=True,
        capture_output=True,
        text=True,
        timeout=50,
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert {code for code, _ in found[:-1]} == {str(-signal.SIGKILL)}
    assert found[-1] == ["0", "new"] or old == IN_PLACE
    return [left for _, left in found[:-1]]


@pytest.mark.faults
def test_a_kill_anywhere_in_a_write_leaves_the_older_file_or_the_new_one(tmp_path):
    left = killed_writes(tmp_path / "run", "partial", "partial")
    switch = left.index("new")
    assert switch > 20  # killed while the header, the tensor and the sync were on their way
    assert left == ["old"] * switch + ["new"] * (len(left) - switch)
    tensorfile.write(tmp_path / "run", {"n": 3}, {})
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.mark.faults
def test_the_kills_would_find_a_write_in_place(tmp_path):
    left = killed_writes(tmp_path / "run", IN_PLACE, "target")
    assert "CheckpointError" in left
