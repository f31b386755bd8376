"""What tests of federated learning share."""

import pytest

from fedproc.client.seeding import torch_threads


@pytest.fixture
def one_thread():
    """The oracle trains as clients do."""
    with torch_threads(1):
        yield
