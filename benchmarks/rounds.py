"""Rounds of federated averaging: fedproc, the plain sequential loop and other systems, in turns.

python -m benchmarks.rounds [--quick] [--runs N] [--json FILE] [WORKLOAD ...]

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
from benchmarks.peers.hosted import Hosted, MissingPeerError
from benchmarks.workloads import Fedproc, Sequential, Workload, workloads

MILLISECONDS = 1e3
TOLERANCE = 1e-5
EXACT = ("fedproc, 1 worker", "fedproc, 2 workers")
RIVALS = ("fedproc, 2 workers", "fedproc, 2 workers, vectorize")  # what a peer is compared with

FIRST = """
import time
started = time.perf_counter()
import torch
torch.set_num_threads(1)
from {module} import {cls}
from benchmarks.workloads import workloads
workload = workloads(quick={quick})[0]
system = {cls}(workload{arguments})
system.play(1)
took = time.perf_counter() - started
system.close()
print(took)
"""


def peers() -> tuple[dict[str, str], dict[str, str]]:
    """Other systems, by name: the package that each comes from, and why some cannot run here.

    They are the modules ``benchmarks.peers.rounds_…``. Such a module can be imported without what
    it ``REQUIRES``, and has ``System``: ``System(workload)`` starts it, ``play(rounds)`` plays the
    next rounds, ``model()`` returns the parameters as one vector in the order of
    ``workload.model()``, ``close()`` ends it.
    """
    folder, found, missing = ROOT / "benchmarks" / "peers", {}, {}
    for info in pkgutil.iter_modules([str(folder)]):
        if not info.name.startswith("rounds_"):
            continue
        module = importlib.import_module(f"benchmarks.peers.{info.name}")
        name = info.name.removeprefix("rounds_")
        lacking = [need for need in module.REQUIRES if importlib.util.find_spec(need) is None]
        if lacking:
            missing[name] = f"{', '.join(lacking)} not installed (extra: bench)"
        else:
            found[name] = (*module.REQUIRES, "torch")[0]
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
        **{name: partial(Hosted, name=name, package=package) for name, package in others.items()},
    }


def measure(workload: Workload, runs: int) -> list[Row]:
    """Times every system on one workload, and compares what they end with."""
    with ExitStack() as stack:
        playing = {}
        for name, make in systems().items():
            try:
                playing[name] = make(workload)
            except MissingPeerError as missing:
                print(missing, file=sys.stderr)
                continue
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
        if not name.startswith("fedproc"):
            rows += [ratio(f"    / {rival}", samples[name], samples[rival]) for rival in RIVALS]
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
    starts = {
        "plain loop": partial(in_new_process, "benchmarks.workloads", "Sequential", quick=quick),
        "fedproc, 2 workers": partial(
            in_new_process,
            "benchmarks.workloads",
            "Fedproc",
            ", workers=2, vectorize=False",
            quick=quick,
        ),
    }
    for name in peers()[0]:
        module = f"benchmarks.peers.rounds_{name}"
        starts[name] = partial(in_new_process, module, "System", quick=quick)
    found = paired(runs, warm_up=not quick, **starts)
    plain, ours = found.pop("plain loop"), found["fedproc, 2 workers"]
    rows = [row("first result of a new process, tiny: plain loop", "s", plain)]
    for name, samples in found.items():
        apart = [b - a for a, b in zip(plain, samples, strict=True)]
        rows.append(row(f"  {name}", "s", samples))
        rows.append(row("    - plain loop", "s", [max(0.0, seconds) for seconds in apart]))
        if samples is not ours:
            rows.append(ratio("    / fedproc, 2 workers", samples, ours))
    return rows


def in_new_process(module: str, cls: str, arguments: str = "", *, quick: bool) -> float:
    code = FIRST.format(quick=quick, module=module, cls=cls, arguments=arguments)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout.splitlines()[-1])


def benchmark(quick: bool, names: list[str], runs: int) -> list[Row]:
    torch.set_num_threads(1)
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
    parser.add_argument("--runs", type=int, help="samples of each; default: 5, of a quick run 1")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no workload is called {sorted(unknown)}; there are {known}")
    runs = options.runs or (1 if options.quick else 5)
    rows = benchmark(options.quick, options.names, runs)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) for line in rows]), encoding="utf-8")
    print(table("rounds", rows))
    _, missing = peers()
    for name, reason in missing.items():
        print(f"{name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
