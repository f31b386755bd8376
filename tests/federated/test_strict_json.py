"""What is no number in JSON: NaN and the infinite, in the file of a history and in a checkpoint."""

import json

import torch

from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from fedproc.federated.history import Evaluation, History, RoundRecord
from tests.federated.worlds import linear, shards


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_json_has_null_where_there_is_no_number(tmp_path):
    nan, inf = float("nan"), float("inf")
    record = RoundRecord(
        round=1,
        clients=("a", "NaN"),
        failures={"a": ValueError("inf")},
        loss=nan,
        metrics={"score": -inf, "steps": 3.0},
        seconds=0.5,
        bytes_moved=100,
        message_bytes=None,
        evaluation=Evaluation(inf, 0.75, 8, {"each": torch.tensor([1.0, nan]), "pair": (nan, 2)}),
        epsilon=inf,
        clip_norm=1.0,
    )
    history = History([record])
    history.to_json(tmp_path / "h.json")
    text = (tmp_path / "h.json").read_text()
    (found,) = json.loads(text, parse_constant=no_constant)["rounds"]
    assert (found["loss"], found["epsilon"], found["clip_norm"]) == (None, None, 1.0)
    assert found["metrics"] == {"score": None, "steps": 3.0}
    assert found["evaluation"]["loss"] is None
    assert found["evaluation"]["metrics"] == {"each": [1.0, None], "pair": [None, 2]}
    assert (found["clients"], found["failures"]) == (["a", "NaN"], {"a": "ValueError: inf"})
    kept = history.to_dict()["rounds"][0]
    assert kept["epsilon"] == inf
    assert str(kept["loss"]) == "nan"


def test_a_checkpoint_keeps_what_json_has_no_number_for(cluster, tmp_path):
    def train(model, x, y, ctx):
        return {"score": float("inf"), "loss": float("nan")}

    data = FederatedDataset(shards([4, 6]), cluster)
    aggregator = Aggregator(linear(), data, train)
    aggregator.run_round()
    aggregator.save(tmp_path / "saved")
    (record,) = Aggregator.load(tmp_path / "saved", linear(), data, train).history
    assert record.metrics["score"] == float("inf")
    assert str(record.loss) == "nan"
