"""The code of a page of docs runs, in order, as one script, and prints what it shows.

A ```` ```text ```` block is the exact output of the python block before it; others print nothing.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIVIDER = "--- next block ---"


@pytest.mark.parametrize(("page", "fewest"), [("federated.md", 10), ("privacy.md", 2)])
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_block_runs_and_prints_what_it_shows(page, fewest, tmp_path):
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    following = [*blocks[1:], ("", "")]
    shown = [
        (code, text if kind == "text" else "")
        for (language, code), (kind, text) in zip(blocks, following, strict=True)
        if language == "python"
    ]
    assert len(shown) >= fewest
    script = tmp_path / "page.py"
    divider = f"print({DIVIDER!r})\n"
    script.write_text(divider.join(code for code, _ in shown), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split(f"{DIVIDER}\n") == [text for _, text in shown]
