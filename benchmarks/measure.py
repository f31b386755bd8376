"""How everything here is measured: paired runs, medians, and a stamp of the machine.

Runs in the parent. What is compared is run in turns in one process, so that a busy moment of the
machine hits both sides; a ratio is that of the medians.
"""

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fedproc.client.compiled import COMPILED
from fedproc.memory.pages import usable_cores

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: the median of ``runs`` samples, and their quartiles."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    runs: int


def row(what: str, unit: str, samples: list[float], *, scale: float = 1.0) -> Row:
    """The median of samples; ``scale`` turns them into ``unit``."""
    scaled = [sample * scale for sample in samples]
    low, high = quartiles(scaled)
    return Row(what, unit, statistics.median(scaled), low, high, len(scaled))


def ratio(what: str, above: list[float], below: list[float]) -> Row:
    """The ratio of two medians; the quartiles are those of the ratios of the pairs."""
    low, high = quartiles([a / b for a, b in zip(above, below, strict=True)])
    return Row(
        what, "x", statistics.median(above) / statistics.median(below), low, high, len(above)
    )


def quartiles(samples: list[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def seconds_of(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def paired(
    runs: int, *, warm_up: bool = True, **actions: Callable[[], float]
) -> dict[str, list[float]]:
    """``runs`` samples of each action, taken in turns.

    Args:
        runs: samples of each.
        warm_up: do each once before, without counting it.
        actions: each does its work once and tells the seconds that count.
    """
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values() if warm_up else ():
        action()
    for run in range(runs):
        names = list(actions) if run % 2 == 0 else list(reversed(actions))
        for name in names:
            samples[name].append(actions[name]())
    return samples


def plain_python() -> float:
    """Seconds of a loop that nothing of ours is in: how quick a core is at this moment.

    On a shared machine that swings by a factor of two, and with it everything in microseconds.
    """

    def turns() -> None:
        total = 0
        for number in range(10_000):
            total += number * number % 7

    return seconds_of(turns)


def machine() -> dict[str, object]:
    """What the numbers were taken on and with."""
    return {
        "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "fedproc": importlib.metadata.version("fedproc"),
        "compiled_sums": COMPILED,
        "commit": commit(),
    }


def cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def commit() -> str | None:
    """The commit of the checkout, marked if it was changed; None outside one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def table(title: str, rows: list[Row]) -> str:
    """Rows as text, columns aligned."""
    width = max(len(line.what) for line in rows)
    head = f"{title:{width}s} {'median':>10s} {'quartiles':>21s}  unit   runs"
    lines = [
        f"{line.what:{width}s} {number(line.median):>10s} "
        f"{number(line.low):>10s} {number(line.high):>10s}  {line.unit:6s} {line.runs}"
        for line in rows
    ]
    return "\n".join([head, "-" * len(head), *lines])


def number(value: float) -> str:
    """Three digits that count, more only before the point."""
    digits = next((n for n, limit in enumerate((100, 10, 1)) if abs(value) >= limit), 3)
    return f"{value:,.{digits}f}"


def main(name: str, benchmark: Callable[[bool], list[Row]]) -> None:
    """Run one benchmark from the command line: print its table, write its rows if asked to."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    rows = benchmark(options.quick)
    if options.json is not None:
        rows_as_text = json.dumps([asdict(line) for line in rows])
        options.json.write_text(rows_as_text, encoding="utf-8")
    print(table(name, rows))
