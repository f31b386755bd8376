"""Clients train on the device of their worker; what comes home is on the CPU.

A CPU that is named explicitly takes the same path as a GPU. What only a GPU can show is marked so.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedproc.client import seeding
from fedproc.client.devices import at_home, placed_loss
from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import WorkerStartError
from fedproc.federated import strategies
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import bits, blobs, dropout_net, sgd, shards

SIZES = [12, 18, 6, 24]
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
LOCAL = LocalTraining(WEIGHTED, sgd, epochs=2, batch_size=6)
NO_GPU = not torch.cuda.is_available()
gpu = pytest.mark.skipif(NO_GPU, reason="no CUDA device")


def train_where_the_rows_are(model, x, y, ctx):
    """A custom function that keeps a tensor of the device it trained on."""
    assert x.device == y.device == next(model.parameters()).device
    kept = ctx.state.get("seen", [torch.zeros(())])[0]
    assert kept.device.type == "cpu"
    ctx.state["seen"] = [kept.to(x.device) + x.sum()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.rand_like(parameter)
    return {"index": float(x.device.index if x.device.index is not None else -1)}


def trained(transport, devices, local=LOCAL, strategy=strategies.FedAvg(), workers=2):  # noqa: B008
    with Cluster(workers, transport=transport, devices=devices) as cluster:
        data = FederatedDataset(shards(SIZES), cluster)
        aggregator = Aggregator(dropout_net(), data, local, strategy=strategy)
        aggregator.run(3, evaluate_on=blobs())
        assert not any(record.failures for record in aggregator.history)
        own = {client: found.loss for client, found in aggregator.evaluate_clients().items()}
    return aggregator, own


@pytest.mark.parametrize("devices", [["cpu"], ["cpu:0"], [torch.device("cpu", 0), "cpu"]], ids=str)
@pytest.mark.parametrize("strategy", [strategies.FedAvg(), strategies.Scaffold()], ids=repr)
def test_a_named_cpu_gives_the_same_bits_as_none(transport, devices, strategy):
    named, own = trained(transport, devices, strategy=strategy)
    plain, expected = trained("inline", None, strategy=strategy)
    assert bits(named.model) == bits(plain.model)
    assert own == expected
    assert [r.evaluation for r in named.history] == [r.evaluation for r in plain.history]


def test_the_model_and_the_rows_of_a_client_are_on_the_device_of_its_worker(transport):
    aggregator, _ = trained(transport, ["cpu:0"], train_where_the_rows_are)
    assert {record.metrics["index"] for record in aggregator.history} == {-1.0}  # as torch says it
    x = shards(SIZES)["a"][0]
    assert aggregator._course.kept["a"]["seen"][0].item() == pytest.approx(3 * x.sum().item())


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "3"])
def test_a_device_that_is_not_there_is_named_at_construction(transport, name):
    with pytest.raises(WorkerStartError, match=f"device '{name}' cannot be used here") as caught:
        Cluster(2, transport=transport, devices=["cpu", name])
    assert "'worker-1'" in str(caught.value)
    assert "Cluster(devices=" in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "words"), [("cpu", r"a list, such as \['cpu'\]"), ([], "empty"), (0, "a list")]
)
def test_devices_are_a_list_that_is_not_empty(devices, words):
    with pytest.raises(ValueError, match=words):
        Cluster(2, transport="inline", devices=devices)


def test_seeding_means_the_device_of_the_worker_and_not_the_current_one(monkeypatch):
    told = []

    class Chosen:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            told.append(self.device)

        def __exit__(self, *_):
            told.append("over")

    module = SimpleNamespace(device=Chosen, manual_seed=told.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    before = torch.random.get_rng_state()
    seeding.seed_streams(5, torch.device("cuda", 1))
    torch.random.set_rng_state(before)
    assert told == [torch.device("cuda", 1), 5, "over"]


def test_a_loss_with_weights_is_moved_and_a_function_is_left():
    moved = placed_loss(nn.CrossEntropyLoss(weight=torch.ones(3)), torch.device("meta"))
    assert moved.weight.is_meta
    assert placed_loss(torch.nn.functional.mse_loss, torch.device("meta")) is not None
    assert placed_loss(None, torch.device("meta")) is None


def test_what_is_kept_comes_home_with_everything_in_it():
    inner = torch.ones(2)
    kept = at_home({"a": [inner, {"b": inner, 3: "text"}], "none": None})
    assert kept["a"][0].tolist() == kept["a"][1]["b"].tolist() == [1.0, 1.0]
    assert (kept["a"][1][3], kept["none"]) == ("text", None)


# ---------------------------------------------------------------- with a GPU


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "strategy", [strategies.FedAvg(), strategies.Scaffold(), strategies.FedProx(0.1)], ids=repr
)
def test_several_workers_share_one_gpu_and_results_are_home_on_the_cpu(transport, strategy):
    aggregator, own = trained(transport, ["cuda:0"], strategy=strategy, workers=3)
    cpu, expected = trained("inline", None, strategy=strategy)
    for name, value in aggregator.model.state_dict().items():
        assert value.device.type == "cpu"
        assert value.shape == cpu.model.state_dict()[name].shape
    assert all(value > 0 for value in own.values())
    assert own.keys() == expected.keys()
    for state in aggregator._kept.values():
        assert all(tensor.device.type == "cpu" for tensor in state.values())


@pytest.mark.gpu
@gpu
def test_the_rows_and_the_model_are_on_the_gpu_and_what_is_kept_is_not(transport):
    aggregator, _ = trained(transport, ["cuda:0"], train_where_the_rows_are)
    assert {record.metrics["index"] for record in aggregator.history} == {0.0}
    assert aggregator._course.kept["a"]["seen"][0].device.type == "cpu"


@pytest.mark.gpu
@gpu
def test_equal_runs_on_one_gpu_are_equal_for_any_number_of_workers(transport):
    deterministic = LocalTraining(WEIGHTED, functools.partial(torch.optim.SGD, lr=0.1))
    one, _ = trained(transport, ["cuda:0"], deterministic, workers=1)
    three, _ = trained(transport, ["cuda:0"], deterministic, workers=3)
    assert bits(one.model) == bits(three.model)
