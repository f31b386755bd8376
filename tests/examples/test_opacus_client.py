"""examples/opacus_client.py says what is missing when Opacus is not installed; CI runs it whole."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "opacus_client.py"


def test_without_opacus_it_says_so_and_ends_well():
    code = f"import runpy, sys; sys.modules['opacus'] = None; runpy.run_path({str(EXAMPLE)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "skipped: Opacus is not installed; pip install 'fedproc[opacus]'\n"
