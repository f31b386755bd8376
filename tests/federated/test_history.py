import csv
import io
import json
import sys

import pytest

from fedproc.events import ClientFinished, RoundFinished, RoundStarted
from fedproc.federated.history import Evaluation, History, RoundRecord
from fedproc.progress import ProgressBar


def record(number, **changes):
    facts = {
        "round": number,
        "clients": ("a", "b"),
        "failures": {"b": ValueError("two\nlines")},
        "loss": 1.0 / number,
        "metrics": {"steps": 3.0},
        "seconds": 0.5,
        "bytes_moved": 100,
        "message_bytes": 50,
        "evaluation": Evaluation(0.25, 0.75, 8),
        "accepted": ("a",),
        "examples": 4,
    }
    return RoundRecord(**facts | changes)


def test_a_history_is_a_sequence():
    history = History([record(1), record(2), record(3)])
    assert len(history) == 3
    assert history[-1].round == 3
    assert [r.round for r in history[1:]] == [2, 3]
    assert isinstance(history[:1], History)
    assert [r.loss for r in history][:2] == [1.0, 0.5]
    assert repr(history) == "<History: 3 rounds, last 3, loss 0.3333, accuracy 0.7500>"
    assert repr(History()) == "<History: no rounds>"


def test_json(tmp_path):
    history = History([record(1), record(2, evaluation=None, loss=None)])
    history.to_json(tmp_path / "h.json")
    found = json.loads((tmp_path / "h.json").read_text())
    assert found == history.to_dict()
    assert found["rounds"][0]["failures"] == {"b": "ValueError: two"}
    assert found["rounds"][0]["evaluation"]["accuracy"] == 0.75
    assert found["rounds"][1]["evaluation"] is None
    assert found["rounds"][1]["clients"] == ["a", "b"]


def test_csv(tmp_path):
    History([record(1), record(2, metrics={"f1": 0.5}, evaluation=None)]).to_csv(tmp_path / "h.csv")
    rows = list(csv.DictReader((tmp_path / "h.csv").read_text().splitlines()))
    assert [row["round"] for row in rows] == ["1", "2"]
    assert rows[0]["evaluation_accuracy"] == "0.75"
    assert rows[1]["evaluation_accuracy"] == ""
    assert (rows[0]["metric_steps"], rows[0]["metric_f1"]) == ("3.0", "")
    assert (rows[1]["metric_steps"], rows[1]["metric_f1"]) == ("", "0.5")


def test_csv_of_no_rounds_has_a_header(tmp_path):
    History().to_csv(tmp_path / "h.csv")
    assert (tmp_path / "h.csv").read_text().startswith("round,clients,")


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Lets matplotlib open its fonts, which stay open."""
    pytest.importorskip("matplotlib")
    History([record(1)]).plot(tmp_path_factory.mktemp("plots") / "first.png")


def test_plot(tmp_path, fonts):
    for number, records in enumerate(
        [[record(1), record(2)], [record(1, loss=None, evaluation=None)], [record(1, loss=None)]]
    ):
        path = tmp_path / f"{number}.png"
        History(records).plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rounds"):
        History().plot(tmp_path / "none.png")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fedproc.federated.plotting", raising=False)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'fedproc\[plot\]'"):
        History([record(1)]).plot(tmp_path / "h.png")


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        record(1).loss = 2.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_rounds_clients_loss_and_time_left():
    stream, seconds = Terminal(), iter(range(100))
    bar = ProgressBar(stream, lambda: float(next(seconds)))
    bar(RoundStarted(1, 2, 4))
    for client in "abcd":
        bar(ClientFinished(1, client, failed=client == "c"))
    bar(RoundFinished(1, 0.5, 0.875))
    bar(RoundStarted(2, 2, 4))
    bar.close()
    lines = [line.rstrip() for line in stream.getvalue().split("\r")]
    assert "round 1/2 [------------] 0/4" in lines
    assert any(line.startswith("round 1/2 [######------] 2/4") for line in lines)
    assert any("4/4 (1 failed)  loss 0.5000  accuracy 0.8750" in line for line in lines)
    assert stream.getvalue().endswith("\n")
    assert len({len(line) for line in stream.getvalue().strip("\r\n").split("\r")}) == 1


def test_without_a_terminal_every_round_is_a_plain_line():
    stream = io.StringIO()
    bar = ProgressBar(stream, lambda: 0.0)
    for number in (1, 2):
        bar(RoundStarted(number, 2, 1))
        bar(ClientFinished(number, "a", failed=False))
        bar(RoundFinished(number, 0.5, None))
    bar.close()
    assert stream.getvalue() == (
        "round 1/2 [############] 1/1  loss 0.5000  0 s\n"
        "round 2/2 [############] 1/1  loss 0.5000  0 s\n"
    )


def test_a_bar_without_events_writes_nothing():
    stream = io.StringIO()
    ProgressBar(stream).close()
    assert stream.getvalue() == ""


def test_the_bar_follows_a_run(capsys, transport):
    from fedproc.cluster.cluster import Cluster
    from fedproc.federated.aggregator import Aggregator
    from fedproc.federated.data import FederatedDataset
    from tests.federated.worlds import linear, shards

    with Cluster(1, transport=transport) as cluster:
        data = FederatedDataset(shards([3, 3]), cluster)
        aggregator = Aggregator(linear(), data, lambda *_: {})
        aggregator.run(2)
        assert capsys.readouterr().err == ""
        aggregator.run(2, progress=True)
    assert "round 4/4 [############] 2/2" in capsys.readouterr().err
