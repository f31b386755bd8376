# ruff: noqa: NPY002 - the global stream is the subject
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedproc.client.seeding import (
    derive_seed,
    generator_for,
    preserved_streams,
    seed_streams,
    torch_threads,
)

CPU = torch.device("cpu")


def draws():
    return random.random(), np.random.random(), torch.rand(1).item()


def test_seeds_are_what_they_always_were():
    assert derive_seed(0, 1, "client-000", "streams") == 0x4725D1BFF463A9CD
    assert derive_seed("a", "b") != derive_seed("ab") != derive_seed("a,b")
    assert derive_seed(1, 12) != derive_seed(11, 2)
    assert derive_seed(1) != derive_seed("1")


@given(st.lists(st.integers() | st.text(), max_size=4))
def test_seeds_fit_every_generator(parts):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    with preserved_streams(CPU):
        seed_streams(seed, CPU)
        first = draws()
        seed_streams(seed, CPU)
        assert draws() == first


def test_the_streams_of_the_process_are_given_back_also_after_an_error():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)

    def fail():
        with preserved_streams(CPU):
            seed_streams(5, CPU)
            draws()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draws() == expected


def test_generators_are_their_own():
    one, two = (torch.rand(4, generator=generator_for("x", n)).tolist() for n in (1, 2))
    assert one != two
    assert one == torch.rand(4, generator=generator_for("x", 1)).tolist()


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before
