#!/usr/bin/env python3
"""Print a command of README.md, so that what CI runs is what a newcomer reads.

The README marks a command by a comment on the line before its block::

    <!-- command: test -->
    ```sh
    the command
    ```

Usage: ``readme_command.py NAME``.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command(text: str, name: str) -> str:
    """The one line of the ``sh`` block that carries this name.

    Raises:
        LookupError: no block has this name, several have, or it is not one line.
    """
    mark = rf"^<!-- command: {re.escape(name)} -->\n```sh\n(.*?)^```$"
    blocks = re.findall(mark, text, re.MULTILINE | re.DOTALL)
    lines = [block.strip() for block in blocks]
    if len(lines) != 1 or not lines[0] or "\n" in lines[0]:
        raise LookupError(f"README.md must hold one one-line command {name!r}, found {lines}")
    return lines[0]


def main() -> None:
    """Print the command named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} NAME")
    try:
        print(command(README.read_text(encoding="utf-8"), sys.argv[1]))
    except LookupError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
