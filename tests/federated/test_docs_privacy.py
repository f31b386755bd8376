"""The code of docs/privacy.md runs, in order, as one script, without a word."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_block_runs(tmp_path):
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=110
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
