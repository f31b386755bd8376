"""Every one of the fifty cases is tested, or it is said why not."""

import ast
import re
from pathlib import Path

from tests.faults.cases import ELSEWHERE, NOT_HERE, PARTS_NOT_HERE

ROOT = Path(__file__).resolve().parents[2]


def functions_in(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_case_is_shown_once():
    names = set().union(*(functions_in(path) for path in Path(__file__).parent.glob("test_*.py")))
    here = {int(match[1]) for name in names if (match := re.match(r"test_case_(\d\d)_", name))}
    assert sorted([*here, *ELSEWHERE, *NOT_HERE]) == list(range(1, 51))
    assert set(PARTS_NOT_HERE) <= here | set(ELSEWHERE)


def test_what_is_shown_elsewhere_is_there():
    for shown in ELSEWHERE.values():
        file, name = shown.split("::")
        assert name in functions_in(ROOT / file), shown
