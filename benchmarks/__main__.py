"""Runs the benchmarks, each in a process of its own; writes JSON and prints all tables at the end.

python -m benchmarks [--quick] [--out FILE] [start] [overlap] [ops] [tensors]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, Row, machine, table

NAMES = ("start", "overlap", "ops", "tensors")
RESULTS = Path(__file__).parent / "results"


def run(name: str, quick: bool, folder: Path) -> list[dict[str, object]]:
    """The rows of one benchmark."""
    written = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(written)]
    quickly = ["--quick"] if quick else []
    subprocess.run([*command, *quickly], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return json.loads(written.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {NAMES}; default: all")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/TIME")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark is called {sorted(unknown)}; there are {NAMES}")
    stamp = machine()
    out = options.out or RESULTS / f"{str(stamp['time']).replace(':', '')}.json"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or NAMES:
            print(f"{name} ...", flush=True)
            found[name] = run(name, options.quick, Path(folder))
    result = {"machine": stamp, "quick": options.quick, "benchmarks": found}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print()
    for fact, value in stamp.items():
        print(f"{fact:12s} {value}")
    for name, rows in found.items():
        print(f"\n{table(name, [Row(**line) for line in rows])}")
    print(f"\nWritten to {out}.")


if __name__ == "__main__":
    main()
