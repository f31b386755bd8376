"""Runs the benchmarks, each in a process of its own; writes JSON and prints all tables at the end.

python -m benchmarks [--quick] [--out FILE] [NAME ...]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.measure import ROOT, Row, machine, table

NAMES = (
    "start", "overlap", "ops", "tensors", "average", "detection", "rounds", "threads", "exact",
    "mcmahan", "clients", "privacy",
)  # fmt: skip
LONG = ("soak", "pointers")  # minutes each: only when named
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one benchmark found, and how much of the machine's CPU time others used meanwhile."""

    others: float
    rows: list[Row]


def run(name: str, quick: bool, folder: Path) -> Finding:
    written = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(written)]
    quickly = ["--quick"] if quick else []
    busy, total, own = cpu_seconds()
    subprocess.run([*command, *quickly], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    busy_after, total_after, own_after = cpu_seconds()
    others = (busy_after - busy - (own_after - own)) / (total_after - total)
    rows = [Row(**line) for line in json.loads(written.read_text(encoding="utf-8"))]
    return Finding(round(max(0.0, others), 2), rows)


def cpu_seconds() -> tuple[float, float, float]:
    """CPU seconds of the machine, busy and in all, and those of benchmarks that have ended."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(times[:8]) - idle, sum(times[:8]), own.ru_utime + own.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    which = f"of {NAMES}, the default, and {LONG}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=which)
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/TIME")
    options = parser.parse_args()
    if unknown := set(options.names) - {*NAMES, *LONG}:
        parser.error(f"no benchmark is called {sorted(unknown)}; there are {NAMES + LONG}")
    stamp = machine()
    out = options.out or RESULTS / f"{str(stamp['time']).replace(':', '')}.json"
    found: dict[str, Finding] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or NAMES:
            print(f"{name} ...", flush=True)
            found[name] = run(name, options.quick, Path(folder))
    findings = {name: asdict(finding) for name, finding in found.items()}
    result = {"machine": stamp, "quick": options.quick, "benchmarks": findings}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print()
    for fact, value in stamp.items():
        print(f"{fact:12s} {value}")
    for name, finding in found.items():
        print(f"\n{table(name, finding.rows)}")
        print(f"Others used {finding.others:.0%} of the machine's CPU time meanwhile.")
    print(f"\nWritten to {out}.")


if __name__ == "__main__":
    main()
