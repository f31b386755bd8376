"""Users' functions are looked up in every call: their module may have been loaded anew."""

import sys

import pytest

import fedproc as fp

SOURCE = """
class Kept:
    @staticmethod
    def nested(number):
        return "old", number

def plain(number):
    return "old", number

def renew():
    global plain
    Kept.nested = staticmethod(lambda number: ("new", number))
    plain = Kept.nested
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "renewed_here.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import renewed_here

    yield renewed_here
    del sys.modules["renewed_here"]


def test_a_renewed_function_is_called(module):
    with fp.Cluster(["bob"]) as cluster:
        bob = cluster["bob"]
        for told in ("old", "old", "new"):
            if told == "new":
                bob.run(module.renew).get()
            assert bob.run(module.plain, 1).get() == (told, 1)
            assert bob.run(module.Kept.nested, 1).get() == (told, 1)
