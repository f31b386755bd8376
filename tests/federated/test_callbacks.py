import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedproc.client.training import LocalTraining
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.callbacks import CSVLogger, EarlyStopping, TensorBoard
from fedproc.federated.data import FederatedDataset
from fedproc.federated.history import Evaluation, History, RoundRecord
from tests.federated.worlds import blobs, cross_entropy, linear, sgd, shards


def record(number, loss=None, metrics=None, evaluation=None, failures=None):
    return RoundRecord(
        round=number,
        clients=("a", "b"),
        failures=failures or {},
        loss=loss,
        metrics=metrics or {},
        seconds=0.5,
        bytes_moved=0,
        message_bytes=None,
        evaluation=evaluation,
        accepted=("a", "b"),
    )


def evaluated(number, loss=None, accuracy=None, **metrics):
    return record(number, loss=9.0, evaluation=Evaluation(loss, accuracy, 10, metrics))


def stops_at(stopping, records):
    """The rounds after which it says True."""
    return [one.round for one in records if stopping(None, one) is True]


def aggregator(cluster, *callbacks):
    data = FederatedDataset(shards([8, 4]), cluster)
    local = LocalTraining(cross_entropy, sgd)
    return Aggregator(linear(), data, local, callbacks=callbacks)


class Writer:
    def __init__(self):
        self.written, self.flushed = [], 0

    def add_scalar(self, tag, value, step):
        self.written.append((tag, value, step))

    def flush(self):
        self.flushed += 1


# ---------------------------------------------------------------- CSVLogger


def test_the_file_is_after_every_round_what_the_history_writes(cluster, tmp_path):
    logged, whole = tmp_path / "logged.csv", tmp_path / "whole.csv"
    seen = []

    def compare(aggregator, record):
        aggregator.history.to_csv(whole)
        seen.append(logged.read_bytes() == whole.read_bytes())

    aggregator(cluster, CSVLogger(logged), compare).run(3, evaluate_on=blobs(20), evaluate_every=2)
    assert seen == [True, True, True]
    with logged.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert [row["evaluation_loss"] == "" for row in rows] == [True, False, True]


def test_an_older_file_gives_way_and_a_new_metric_gets_a_column(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("of another run\n")
    logger, history = CSVLogger(str(path)), History()
    for one in (record(1, 2.0), record(2, 1.5, {"steps": 3.0}), record(3, 1.0)):
        history.append(one)
        assert logger(SimpleNamespace(history=history), one) is None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric_steps"] for row in rows] == ["", "3.0", ""]
    assert [row["loss"] for row in rows] == ["2.0", "1.5", "1.0"]


def test_a_resumed_run_has_its_earlier_rounds(cluster, tmp_path):
    first = aggregator(cluster)
    first.run(2)
    first.save(tmp_path / "state")
    logger = CSVLogger(tmp_path / "log.csv")
    again = Aggregator.load(
        tmp_path / "state", linear(), first.data, first.local, callbacks=[logger]
    )
    again.run(1)
    with logger.path.open(newline="") as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["1", "2", "3"]


# ---------------------------------------------------------------- TensorBoard


def test_scalars_are_the_numbers_of_the_record():
    writer = Writer()
    evaluation = Evaluation(0.25, 0.75, 10, {"f1": torch.tensor(0.5), "per_class": [1.0, 2.0]})
    one = record(7, 1.5, {"loss": 1.5, "steps": 4.0}, evaluation, {"c": ValueError("x")})
    assert TensorBoard(writer)(None, one) is None
    assert writer.written == [
        ("train/loss", 1.5, 7),
        ("train/steps", 4.0, 7),
        ("round/seconds", 0.5, 7),
        ("round/accepted", 2.0, 7),
        ("round/failures", 1.0, 7),
        ("evaluation/loss", 0.25, 7),
        ("evaluation/accuracy", 0.75, 7),
        ("evaluation/f1", 0.5, 7),
    ]
    assert writer.flushed == 1


def test_numbers_that_are_not_there_are_not_written():
    writer = SimpleNamespace(tags=[])
    writer.add_scalar = lambda tag, value, step: writer.tags.append(tag)
    TensorBoard(writer)(None, record(1))
    assert writer.tags == ["round/seconds", "round/accepted", "round/failures"]


def test_a_directory_makes_a_summary_writer(monkeypatch, tmp_path):
    made = []

    class SummaryWriter(Writer):
        def __init__(self, log_dir):
            super().__init__()
            made.append((log_dir, self))

    stand_in = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    TensorBoard(tmp_path)(None, record(1, 2.0))
    [(directory, writer)] = made
    assert directory == str(tmp_path)
    assert ("train/loss", 2.0, 1) in writer.written


def test_a_directory_without_tensorboard_is_a_clear_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"'fedproc\[tensorboard\]', or pass an object"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("bad", [None, 3, object(), Writer])
def test_what_cannot_write_scalars_is_refused(bad):
    with pytest.raises(ValueError, match="add_scalar"):
        TensorBoard(bad)


# ---------------------------------------------------------------- EarlyStopping


def test_it_stops_after_so_many_rounds_without_an_improvement():
    stopping = EarlyStopping("loss", patience=2)
    losses = [3.0, 2.0, 2.5, 1.0, 1.0, 1.0]
    assert stops_at(stopping, [record(n, loss) for n, loss in enumerate(losses, 1)]) == [6]
    assert (stopping.best, stopping.best_round, stopping.stopped_round) == (1.0, 4, 6)


def test_small_improvements_do_not_count_and_do_not_move_the_best():
    stopping = EarlyStopping("evaluation_accuracy", patience=3, min_delta=0.125)
    values = [0.5, 0.5625, 0.625, 0.75, 0.75, 0.8125, 0.875]
    assert stops_at(stopping, [evaluated(n, 1.0, v) for n, v in enumerate(values, 1)]) == [7]
    assert (stopping.best, stopping.best_round) == (0.75, 4)


def test_rounds_without_the_number_do_not_count():
    stopping = EarlyStopping(patience=1)
    rounds = [evaluated(1, 1.0), record(2, 5.0), record(3, 5.0), evaluated(4, 1.0)]
    assert stops_at(stopping, rounds) == [4]


def test_nan_is_no_improvement():
    stopping = EarlyStopping("loss", patience=2)
    values = [float("nan"), 1.0, float("nan"), float("nan")]
    assert stops_at(stopping, [record(n, v) for n, v in enumerate(values, 1)]) == [4]
    assert stopping.best == 1.0


@pytest.mark.parametrize(
    ("metric", "mode", "values", "best"),
    [
        ("f1", None, [0.25, 0.5, 0.125], 0.5),
        ("f1", "min", [0.25, 0.5, 0.125], 0.125),
        ("val_loss", None, [0.25, 0.5, 0.125], 0.125),
        ("error", None, [0.25, 0.5, 0.125], 0.125),
        ("loss", "max", [0.25, 0.5, 0.125], 0.5),
    ],
)
def test_the_name_says_what_is_better_unless_told(metric, mode, values, best):
    stopping = EarlyStopping(metric, mode=mode)
    for number, value in enumerate(values, 1):
        assert not stopping(None, record(number, value, {metric: value}))
    assert stopping.best == best


def test_metrics_of_evaluations_may_be_tensors_and_arrays():
    stopping = EarlyStopping("f1", patience=1)
    rounds = [evaluated(1, f1=torch.tensor(0.5)), evaluated(2, f1=np.float32(0.5))]
    assert stops_at(stopping, rounds) == [2]


def test_a_number_that_never_comes_is_an_error():
    with pytest.raises(KeyError, match=r"round 2 has no number 'f1'.*evaluation/loss"):
        EarlyStopping("f1")(None, evaluated(2, 1.0))
    with pytest.raises(KeyError, match="evaluation_accuracy"):
        EarlyStopping("evaluation_accuracy")(None, evaluated(2, 1.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: EarlyStopping(""),
        lambda: EarlyStopping("loss", 0),
        lambda: EarlyStopping("loss", 1.5),
        lambda: EarlyStopping("loss", True),
        lambda: EarlyStopping("loss", 1, -0.1),
        lambda: EarlyStopping("loss", 1, float("nan")),
        lambda: EarlyStopping("loss", 1, mode="up"),
    ],
)
def test_values_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_a_run_ends_and_can_go_on(cluster):
    stopping = EarlyStopping("loss", patience=2, min_delta=1e9)
    running = aggregator(cluster, stopping)
    assert len(running.run(10)) == 3
    assert stopping.stopped_round == 3
    assert len(running.run(10)) == 5
