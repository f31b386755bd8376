"""What tests of flat calls in a worker are given."""

import pytest

from tests.worker.pair import made


@pytest.fixture
def pair(monkeypatch):
    yield from made(monkeypatch)
