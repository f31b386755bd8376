"""Examples run to their end, silently on stderr, and write only where they were started.

Those the README names first; CI runs every file of examples/ as its own step.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ["bob_and_alice.py", "digits.py", "pointers.py"]
SLOW = {"digits.py"}
SLOW_S = 240
QUICK_S = 50


def timed(name: str):
    marks = [pytest.mark.slow, pytest.mark.timeout(SLOW_S + 10)] if name in SLOW else []
    return pytest.param(name, SLOW_S if name in SLOW else QUICK_S, marks=marks, id=name)


@pytest.mark.parametrize(("name", "seconds"), [timed(name) for name in EXAMPLES])
def test_example_runs(name, seconds, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout, "an example shows something"


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_that_draws_says_where(script):
    text = script.read_text(encoding="utf-8")
    draws = "savefig(" in text or ".plot(path)" in text
    assert draws == ("{path}." in text)
