"""The trace of one round: its structure, and that it says what happened."""

import itertools
import json

import pytest

from fedproc.client.training import LocalTraining
from fedproc.cluster.cluster import Cluster
from fedproc.errors import QuorumError
from fedproc.federated.aggregator import Aggregator
from fedproc.federated.data import FederatedDataset
from tests.federated.worlds import bits, cross_entropy, linear, sgd, shards

LOCAL = LocalTraining(cross_entropy, sgd)


def rows_of(trace):
    """Row name -> its spans, in order of time."""
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return {
        name: sorted(
            (e for e in events if e["ph"] == "X" and e["tid"] == row), key=lambda e: e["ts"]
        )
        for row, name in names.items()
    }


def test_a_trace_says_who_trained_whom_and_when(tmp_path, transport):
    path = tmp_path / "trace.json"
    with Cluster(2, transport=transport) as cluster:
        data = FederatedDataset(shards([5, 6, 7, 8]), cluster)
        aggregator = Aggregator(linear(), data, LOCAL)
        record = aggregator.profile(path)
        homes = {client: data.worker_of(client).name for client in data.clients}
    assert list(aggregator.history) == [record]
    trace = json.loads(path.read_text())
    assert {e["ph"] for e in trace["traceEvents"]} == {"M", "X"}
    rows = rows_of(trace)
    assert list(rows) == ["parent", "worker-0", "worker-1"]
    found = {span["name"]: name for name in rows for span in rows[name] if span["cat"] == "train"}
    assert found == homes
    parent = [span["name"] for span in rows["parent"] if span["cat"] != "idle"]
    assert parent == ["fold a", "fold b", "fold c", "fold d", "strategy"]
    (first,) = (s for name in rows for s in rows[name] if s["name"] == "a")
    assert first["args"] == {"rows": 5, "steps": 1}


def test_every_row_is_filled_without_overlaps(tmp_path):
    path = tmp_path / "trace.json"
    with Cluster(2) as cluster:
        aggregator = Aggregator(linear(), FederatedDataset(shards([5] * 6), cluster), LOCAL)
        aggregator.run(1)
        aggregator.profile(path)
    for spans in rows_of(json.loads(path.read_text())).values():
        assert spans[0]["ts"] == 0
        for one, two in itertools.pairwise(spans):
            assert one["ts"] + one["dur"] == pytest.approx(two["ts"], abs=0.01)
        assert all(span["dur"] >= 0 for span in spans)


METADATA = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


def test_the_trace_keeps_the_rules_of_the_format(tmp_path):
    """Trace Event Format: what chrome://tracing and Perfetto need to show an event at all."""
    path = tmp_path / "trace.json"
    with Cluster(2) as cluster:
        aggregator = Aggregator(linear(), FederatedDataset(shards([5] * 6), cluster), LOCAL)
        aggregator.profile(path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    trace = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert trace.keys() == {"traceEvents", "displayTimeUnit"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named, spans = set(), {}
    for event in trace["traceEvents"]:
        assert {type(event["pid"]), type(event["tid"])} == {int}
        assert type(event["name"]) is str
        assert event["name"]
        if event["ph"] == "M":
            value = event["args"][METADATA[event["name"]]]
            assert type(value) is (int if event["name"] == "thread_sort_index" else str)
            named.add((event["name"], event["pid"], event["tid"]))
        else:
            assert event["ph"] == "X"  # a complete event: begin and length in microseconds
            assert type(event["cat"]) is str
            assert isinstance(event["args"], dict)
            assert event["ts"] >= 0 <= event["dur"]
            row = spans.setdefault((event["pid"], event["tid"]), [])
            row.append((round(event["ts"] * 1000), round(event["dur"] * 1000)))
    for pid, tid in spans:
        assert {("process_name", pid, 0), ("thread_name", pid, tid)} <= named
    for row in spans.values():
        # Perfetto counts in whole nanoseconds, and drops what overlaps without being nested
        for (began, lasted), (after, _) in itertools.pairwise(sorted(row)):
            assert began + lasted <= after


def test_failures_are_in_the_trace_and_a_failed_round_writes_none(tmp_path):
    def train(model, x, y, ctx):
        if ctx.client == "b" or ctx.round == 2:
            raise RuntimeError("broken")

    path = tmp_path / "trace.json"
    with Cluster(1, transport="inline") as cluster:
        aggregator = Aggregator(linear(), FederatedDataset(shards([5, 5]), cluster), train)
        aggregator.profile(path)
        written = path.read_text()
        with pytest.raises(QuorumError):
            aggregator.profile(path)
    assert path.read_text() == written
    (failed,) = (s for s in rows_of(json.loads(written))["parent"] if s["cat"] == "failure")
    assert failed["name"] == "failure b"
    assert "broken" in failed["args"]["error"]


def test_profiling_changes_no_bit(tmp_path):
    models = []
    for profiled in (True, False):
        with Cluster(2, transport="inline") as cluster:
            aggregator = Aggregator(linear(), FederatedDataset(shards([5, 9]), cluster), LOCAL)
            aggregator.profile(tmp_path / "t.json") if profiled else aggregator.run_round()
            models.append(bits(aggregator.model))
    assert models[0] == models[1]
