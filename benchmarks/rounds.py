"""Rounds of federated averaging: fedproc, the plain sequential loop and other systems, in turns.

python -m benchmarks.rounds [--quick] [--json FILE] [WORKLOAD ...]

All play the same rounds: equal models, rows, seeds, cohorts and orders of rows. At the end of each
workload their models are compared: without ``vectorize`` fedproc's must be the same bits as the
plain loop's, all others' the same to 1e-5. In the plain loop and in workers torch has one thread.
"""

import argparse
import importlib
import importlib.util
import json
import pkgutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, Row, paired, ratio, row, seconds_of, table
from benchmarks.workloads import Fedproc, Sequential, Workload, workloads

MILLISECONDS = 1e3
TOLERANCE = 1e-5
EXACT = ("fedproc, 1 worker", "fedproc, 2 workers")

FIRST = """
import time
started = time.perf_counter()
import torch
torch.set_num_threads(1)
from benchmarks.workloads import Fedproc, Sequential, workloads
workload = workloads(quick={quick})[0]
system = {system}
system.play(1)
print(time.perf_counter() - started)
system.close()
"""


def peers() -> tuple[dict[str, Any], dict[str, str]]:
    """Other systems: the modules ``benchmarks.peers.rounds_…``, and why some cannot run here.

    Such a module has ``REQUIRES``, the packages it needs, and ``System``: ``System(workload)``
    starts it, ``play(rounds)`` plays the next rounds, ``model()`` returns the parameters as one
    vector in the order of ``workload.model()``, ``close()`` ends it.
    """
    folder, found, missing = ROOT / "benchmarks" / "peers", {}, {}
    for info in pkgutil.iter_modules([str(folder)]):
        if not info.name.startswith("rounds_"):
            continue
        module = importlib.import_module(f"benchmarks.peers.{info.name}")
        name = info.name.removeprefix("rounds_")
        lacking = [need for need in module.REQUIRES if importlib.util.find_spec(need) is None]
        if lacking:
            missing[name] = f"not installed: {', '.join(lacking)}"
        else:
            found[name] = module
    return found, missing


def systems() -> dict[str, Callable[[Workload], Any]]:
    """Everything that can play here; the plain loop first."""
    others, _ = peers()
    return {
        "plain loop": Sequential,
        "fedproc, 1 worker": partial(Fedproc, workers=1, vectorize=False),
        "fedproc, 2 workers": partial(Fedproc, workers=2, vectorize=False),
        "fedproc, 1 worker, vectorize": partial(Fedproc, workers=1, vectorize=True),
        "fedproc, 2 workers, vectorize": partial(Fedproc, workers=2, vectorize=True),
        **{name: module.System for name, module in others.items()},
    }


def measure(workload: Workload, runs: int) -> list[Row]:
    """Times every system on one workload, and compares what they end with."""
    with ExitStack() as stack:
        playing = {}
        for name, make in systems().items():
            playing[name] = make(workload)
            stack.callback(playing[name].close)
        turns = {
            name: partial(seconds_of, partial(system.play, workload.rounds))
            for name, system in playing.items()
        }
        samples = paired(runs, **turns)
        differences = check(
            workload.name, {name: system.model() for name, system in playing.items()}
        )
    plain = samples["plain loop"]
    rows = [row(f"{workload.name}: a round, plain loop", "ms", each(plain, workload.rounds))]
    for name in list(playing)[1:]:
        rows.append(row(f"  {name}", "ms", each(samples[name], workload.rounds)))
        rows.append(ratio("    / plain loop", samples[name], plain))
    clients = workload.each_round * workload.rounds
    alone = statistics.median(samples["fedproc, 1 worker"]) - statistics.median(plain)
    # both may be noise: what is left of a difference below zero is no overhead
    rows.append(row("  overhead of a client, 1 worker", "ms", [max(0.0, alone) / clients * 1e3]))
    worst = max(differences.values())
    rows.append(row("  largest difference of a parameter", "x1e-6", [worst], scale=1e6))
    return rows


def each(samples: list[float], rounds: int) -> list[float]:
    return [sample / rounds * MILLISECONDS for sample in samples]


def check(workload: str, models: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compares with the plain loop.

    Raises:
        AssertionError: A system ended with another model: its times mean nothing.
    """
    expected = models.pop("plain loop")
    found = {name: float((model - expected).abs().max()) for name, model in models.items()}
    for name, difference in found.items():
        if name in EXACT and not torch.equal(models[name], expected):
            raise AssertionError(
                f"{workload}, {name}: not the bits of the plain loop ({difference:.3g})"
            )
        if not difference <= TOLERANCE:
            raise AssertionError(
                f"{workload}, {name}: differs from the plain loop by {difference:.3g}"
            )
    return found


def first_result(runs: int, *, quick: bool) -> list[Row]:
    """A new process, from its first import to the end of round 1 of *tiny*."""
    found = paired(
        runs,
        warm_up=not quick,
        plain=partial(in_new_process, "Sequential(workload)", quick=quick),
        fedproc=partial(
            in_new_process, "Fedproc(workload, workers=2, vectorize=False)", quick=quick
        ),
    )
    apart = [b - a for a, b in zip(found["plain"], found["fedproc"], strict=True)]
    return [
        row("first result of a new process, tiny: plain loop", "s", found["plain"]),
        row("  fedproc, 2 workers", "s", found["fedproc"]),
        row("    - plain loop", "s", [max(0.0, seconds) for seconds in apart]),
    ]


def in_new_process(system: str, *, quick: bool) -> float:
    code = FIRST.format(quick=quick, system=system)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


def benchmark(quick: bool, names: list[str]) -> list[Row]:
    torch.set_num_threads(1)
    runs = 1 if quick else 5
    chosen = [w for w in workloads(quick=quick) if not names or w.name in names]
    rows = [line for workload in chosen for line in measure(workload, runs)]
    if not names or "first" in names:
        rows += first_result(runs, quick=quick)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounds")
    known = [*(workload.name for workload in workloads(quick=True)), "first"]
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help=f"of {known}; default: all")
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no workload is called {sorted(unknown)}; there are {known}")
    rows = benchmark(options.quick, options.names)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in rows]), encoding="utf-8")
    print(table("rounds", rows))
    _, missing = peers()
    for name, reason in missing.items():
        print(f"{name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
