"""The README tells the truth: its code runs and prints what it shows, its commands exist.

A ```` ```python ```` block is run; the ```` ```text ```` block that follows it is its exact output.
All blocks of a document run in order in one script, so a later one may use names of an earlier one.
"""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIVIDER = "--- next block ---"


def snippets(text: str) -> list[tuple[str, str]]:
    """Each python block with the output shown below it, empty if none is shown."""
    blocks = BLOCK.findall(text)
    following = [*blocks[1:], ("", "")]
    return [
        (code, shown if kind == "text" else "")
        for (language, code), (kind, shown) in zip(blocks, following, strict=True)
        if language == "python"
    ]


def run_in_order(codes: list[str], folder: Path) -> list[str]:
    """What each block prints, run as one script without a main guard."""
    script = folder / "snippets.py"
    script.write_text(f"print({DIVIDER!r})\n".join(codes), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split(f"{DIVIDER}\n")


def test_snippets_of_the_readme_print_what_they_show(tmp_path):
    found = snippets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found, "the README must show code"
    printed = run_in_order([code for code, _ in found], tmp_path)
    assert printed == [shown for _, shown in found]


def test_snippets_are_taken_with_their_output():
    text = "```python\na\n```\n\nprints\n\n```text\n1\n```\n\n```python\nb\n```\n\n```sh\nls\n```\n"
    assert snippets(text) == [("a\n", "1\n"), ("b\n", "")]


def readme_command(name: str) -> str:
    script = [sys.executable, str(ROOT / ".ci" / "readme_command.py"), name]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("name", "runs"), [("main", "examples/digits.py"), ("test", "-m pytest -q")]
)
def test_commands_need_nothing_but_python(name, runs):
    make, install, run = readme_command(name).split(" && ")
    assert make == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install -q -c constraints.txt -e ")
    assert run == f".venv/bin/python {runs}"


@pytest.mark.parametrize("name", ["main", "test"])
def test_commands_name_extras_that_exist(name):
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = re.findall(r'"\.\[([\w,]+)\]"', readme_command(name))
    assert len(extras) == 1
    assert set(extras[0].split(",")) <= set(config["options.extras_require"])


def test_an_unknown_command_is_refused():
    with pytest.raises(subprocess.CalledProcessError):
        readme_command("nothing")
