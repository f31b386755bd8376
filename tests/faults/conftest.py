"""Fixtures of the tests of faults, beyond those of all tests."""

import pytest


@pytest.fixture
def fault(monkeypatch):
    """Sets the faults of the clusters started from now on; none again with ``None``."""

    def set_fault(rules):
        if rules is None:
            monkeypatch.delenv("FEDPROC_FAULT")
        else:
            monkeypatch.setenv("FEDPROC_FAULT", rules)

    return set_fault
