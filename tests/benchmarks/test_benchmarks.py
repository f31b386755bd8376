"""Every benchmark runs and prints numbers. How large they are is not tested."""

import importlib.util
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rounds, workloads
from benchmarks.peers import hosted

ROOT = Path(__file__).resolve().parents[2]
NUMBER = r"[\d,]+(?:\.\d+)?"
LINE = re.compile(rf"^(.+?) +({NUMBER}) +({NUMBER}) +({NUMBER})  (\S+) +(\d+)$", re.MULTILINE)
UNITS = {"s", "ms", "us", "MiB", "GB/s", "x", "x1e-6", "ids", "count"}
NOT_HERE = re.compile(r"^\w+: .*(\(extra: bench\)|nobody has written this peer)$")
SHA256 = re.compile(r"\b[0-9a-f]{64}$", re.MULTILINE)


def run(*arguments: str) -> str:
    """What it prints, if it succeeds and complains of nothing but peers that cannot run here."""
    return both(*arguments)[0]


def both(*arguments: str) -> tuple[str, list[str]]:
    """The same, and the lines that name those peers."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    told = done.stderr.splitlines()
    assert (done.returncode, [line for line in told if not NOT_HERE.match(line)]) == (0, [])
    return done.stdout, told


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("start", 7),
        ("overlap", 5),
        ("tensors", 12),
        ("average", 6),
        ("threads", 12),
        ("pointers", 9),
        ("soak", 18),
        ("detection", 6),
        ("privacy", 9),
    ],
)
def test_prints_a_table_of_numbers(name, rows):
    title, rule, *lines = run(f"benchmarks.{name}", "--quick").splitlines()
    assert title.split() == [name, "median", "quartiles", "unit", "runs"]
    assert set(rule) == {"-"}
    found = [LINE.match(line) for line in lines]
    assert len(found) == rows
    assert all(found), lines
    assert {match[5] for match in found} <= UNITS
    assert all(float(match[2].replace(",", "")) >= 0 for match in found)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "models", "rows"), [("exact", 1, 5), ("mcmahan", 2, 10)])
def test_prints_the_digests_of_equal_models_and_writes_rows(name, models, rows, tmp_path):
    written = tmp_path / "rows.json"
    printed = run(f"benchmarks.{name}", "--quick", "--json", str(written))
    digests = SHA256.findall(printed)
    assert len(digests) > len(set(digests)) == models
    found = json.loads(written.read_text(encoding="utf-8"))
    assert len(found) == rows
    assert len(LINE.findall(printed)) == rows
    assert [line["median"] for line in found if line["unit"] == "models"] == [1] * models


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_rounds_compares_with_the_plain_loop_and_names_the_peers_that_are_missing():
    printed, told = both("benchmarks.rounds", "--quick", "tiny")
    lines = printed.splitlines()
    found = [LINE.match(line) for line in lines[2:]]
    assert all(found), lines
    assert {match[5] for match in found} <= UNITS
    systems = [match[1].strip() for match in found]
    assert systems.count("/ plain loop") >= 5
    named = {line.partition(":")[0] for line in told}
    for peer in ("pool", "ray_actors", "flower", "blazefl"):
        assert (peer in systems) != (peer in named)
    assert "pool" in systems  # needs nothing


def test_a_peer_whose_packages_are_missing_is_named_with_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    found, missing = rounds.peers()
    assert found == {"pool": "torch"}
    assert missing["flower"] == "flwr, ray not installed (extra: bench)"
    assert missing["ray_actors"] == "ray not installed (extra: bench)"
    assert missing["blazefl"] == "blazefl, tqdm not installed (extra: bench)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package", "reason"),
    [
        ("pool", "no-such-package", r"^pool: no-such-package is not installed \(extra: bench\)$"),
        ("nobody", "torch", "^nobody: torch does not run here: ModuleNotFoundError"),
    ],
)
def test_a_peer_that_does_not_start_says_why(name, package, reason):
    (tiny, *_) = workloads.workloads(quick=True)
    with pytest.raises(hosted.MissingPeerError, match=reason):
        hosted.Hosted(tiny, name=name, package=package)


@pytest.mark.slow
def test_a_peer_that_ends_with_another_model_is_refused():
    (tiny, *_) = workloads.workloads(quick=True)
    pool, plain = hosted.Hosted(tiny, name="pool", package="torch"), workloads.Sequential(tiny)
    try:
        pool.play(2)
        plain.play(1)
        models = {"plain loop": plain.model(), "pool": pool.model()}
        with pytest.raises(AssertionError, match="tiny, pool: differs from the plain loop by"):
            rounds.check("tiny", dict(models))
        plain.play(1)
        rounds.check("tiny", {**models, "plain loop": plain.model()})
    finally:
        pool.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_all_of_them_write_json_and_print_it(tmp_path):
    out = tmp_path / "results.json"
    printed = run("benchmarks", "ops", "--quick", "--out", str(out))
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["quick"] is True
    assert {"time", "cpu", "cores", "memory_gib", "torch", "fedproc"} <= set(written["machine"])
    assert list(written["benchmarks"]) == ["ops"]
    rows = written["benchmarks"]["ops"]["rows"]
    assert all(0 < row["median"] < math.inf and row["low"] <= row["high"] for row in rows)
    assert [match[1].strip() for match in LINE.finditer(printed)] == [
        row["what"].strip() for row in rows
    ]


def test_a_name_that_does_not_exist_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 2
    assert "no benchmark is called ['nothing']" in done.stderr


def test_a_workload_is_pickled_without_its_rows():
    for workload in workloads.workloads(quick=False):
        assert workload.shards  # made and kept
        assert len(pickle.dumps(workload)) < 1000
