"""What people get wrong: each is an error or a recorded failure that says who, when and why.

The model is the one before, to the bit. Other bad input is tested beside what it goes into.
"""

import pytest
import torch
from torch import nn

from fedproc.client.training import LocalTraining
from fedproc.errors import CheckpointError, QuorumError, RemoteError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset, federate
from tests.federated.worlds import bits, blobs, cross_entropy, linear, sgd, shards

LOCAL = LocalTraining(cross_entropy, sgd)


@pytest.fixture
def data(cluster):
    return FederatedDataset(shards([4, 6, 8]), cluster)


class Broken(nn.Linear):
    """Its forward fails for rows it does not like; which ones, the buffer says."""

    def __init__(self, least_rows):
        super().__init__(6, 3)
        self.register_buffer("least_rows", torch.tensor(least_rows))

    def forward(self, x):
        if len(x) < self.least_rows:
            raise LookupError(f"{len(x)} rows are too few for me")
        return super().forward(x)


def nothing_changes(aggregator, message, kind=QuorumError):
    before, rounds = bits(aggregator.model), len(aggregator.history)
    with pytest.raises(kind, match=message):
        aggregator.run_round()
    assert bits(aggregator.model) == before
    assert len(aggregator.history) == rounds


@pytest.mark.parametrize("share", [-0.5, 1.5, 0, -1, 4, float("nan"), float("inf"), "half", None])
def test_a_cohort_that_cannot_be_is_refused(data, share):
    with pytest.raises(ValueError, match=r"clients_per_round"):
        Aggregator(linear(), data, LOCAL, clients_per_round=share)


@pytest.mark.parametrize("clients", [0, -1, 2.5])
def test_a_number_of_clients_that_cannot_be_is_refused(cluster, clients):
    with pytest.raises(ValueError, match="clients"):
        federate(blobs(30), cluster, clients=clients)


def test_fewer_rows_than_clients_say_both_numbers_and_the_remedy(cluster):
    with pytest.raises(ValueError, match=r"5.*3.*min_size=0"):
        federate(blobs(3), cluster, clients=5, partition="iid")


def test_a_model_whose_forward_fails_for_one_client_is_its_failure(data):
    record = Aggregator(Broken(5), data, LOCAL).run_round()
    assert list(record.failures) == ["a"]
    assert isinstance(record.failures["a"], LookupError)
    assert isinstance(record.failures["a"], RemoteError)
    assert "in forward" in record.failures["a"].remote_traceback
    assert record.accepted == ("b", "c")


def test_a_model_whose_forward_fails_for_all_changes_nothing(data):
    aggregator = Aggregator(Broken(100), data, LOCAL)
    nothing_changes(aggregator, r"(?s)round 1: 0 of 3.*unchanged.*a: .*4 rows are too few for me")
    with pytest.raises(LookupError, match="too few for me"):
        aggregator.evaluate(blobs(20))


def test_targets_of_the_wrong_dtype_change_nothing(cluster):
    rows = {client: (x, y.double()) for client, (x, y) in shards([4, 6]).items()}
    aggregator = Aggregator(linear(), FederatedDataset(rows, cluster), LOCAL)
    nothing_changes(aggregator, r"(?s)round 1.*a: .*(Double|scalar type)")


def test_a_loss_that_is_a_vector_changes_nothing(data):
    vector = LocalTraining(nn.CrossEntropyLoss(reduction="none"), sgd)
    aggregator = Aggregator(linear(), data, vector)
    nothing_changes(aggregator, r"(?s)round 1.*a: .*shape \(4,\).*use reduction='mean'")


def test_a_loss_that_is_not_finite_names_the_step_and_the_remedy(data):
    def loss(outputs, targets):
        return cross_entropy(outputs, targets) * (float("nan") if len(targets) == 6 else 1.0)

    record = Aggregator(linear(), data, LocalTraining(loss, sgd)).run_round()
    assert list(record.failures) == ["b"]
    assert "nan at step 1: lower the learning rate" in str(record.failures["b"])
    assert isinstance(record.failures["b"], FloatingPointError)


@pytest.mark.parametrize(
    ("damage", "kind"), [(lambda raw: raw[:-9], CheckpointError), (None, ValueError)]
)
def test_a_checkpoint_that_does_not_fit_changes_no_model(data, tmp_path, damage, kind):
    path, model = tmp_path / "state", linear(seed=3)
    Aggregator(linear() if damage else linear(classes=4), data, LOCAL).save(path)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    before = bits(model)
    with pytest.raises(kind, match=str(path)):
        Aggregator.load(path, model, data, LOCAL)
    assert bits(model) == before


def test_objects_of_torchmetrics_are_metrics(data):
    torchmetrics = pytest.importorskip("torchmetrics")
    x, y = blobs(90, seed=3)
    metrics = {
        "top1": torchmetrics.Accuracy(task="multiclass", num_classes=3, average="micro"),
        "f1": torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro"),
        "auc": torchmetrics.AUROC(task="multiclass", num_classes=3),
    }
    aggregator = Aggregator(linear(), data, LOCAL)
    for _ in range(2):  # what an object saw in the first evaluation is not in the second
        found = aggregator.evaluate((x, y), metrics=metrics)
        assert found.metrics["top1"].item() == pytest.approx(found.accuracy)
        for name, metric in metrics.items():
            expected = metric.clone()
            expected.reset()
            expected.update(aggregator.model(x).detach(), y)
            assert found.metrics[name].item() == pytest.approx(expected.compute().item())
        aggregator.run(1)
