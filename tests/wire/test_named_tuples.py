"""Named tuples of ``__main__`` and nested ones travel by value."""

import pickle
import subprocess
import sys
from typing import NamedTuple

from fedproc.wire.code import dumps

_MAKE = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(1))"


def test_a_named_tuple_travels_by_value():
    class Point(NamedTuple):
        x: int
        y: int = 2

    data = dumps(Point)
    assert pickle.loads(data) is Point
    run = subprocess.run([sys.executable, "-c", _MAKE], input=data, capture_output=True, check=True)
    assert run.stdout.decode().strip() == "Point(x=1, y=2)"
