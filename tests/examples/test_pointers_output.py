"""The comments of examples/pointers.py are what it prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
POINTERS = ROOT / "examples" / "pointers.py"
ARROW = "# -> "
FEWEST_STEPS = 40


def test_the_comments_are_the_output(tmp_path):
    lines = POINTERS.read_text(encoding="utf-8").splitlines()
    shown = [line.removeprefix(ARROW) for line in lines if line.startswith(ARROW)]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(POINTERS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == shown
    assert len(shown) >= FEWEST_STEPS, "the ladder lost steps"
