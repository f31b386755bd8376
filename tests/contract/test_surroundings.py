"""What a worker starts with: directory, environment, path, seeds, threads, limits."""

import os
import random
import sys

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.contract.things import draws


def test_the_working_directory_is_the_parents(transport, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fp.Cluster(["bob"], transport=transport) as cluster:
        assert cluster["bob"].run(os.getcwd).get() == str(tmp_path)


def test_the_environment_is_the_parents(transport, monkeypatch):
    monkeypatch.setenv("FEDPROC_TEST_COLOUR", "blue")
    monkeypatch.delenv("FEDPROC_TEST_NOTHING", raising=False)
    with fp.Cluster(["bob"], transport=transport) as cluster:
        assert cluster["bob"].run(os.getenv, "FEDPROC_TEST_COLOUR").get() == "blue"
        assert cluster["bob"].run(os.getenv, "FEDPROC_TEST_NOTHING").get() is None


def test_the_import_path_is_the_parents(transport, tmp_path, monkeypatch):
    (tmp_path / "fedproc_test_module.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    import fedproc_test_module

    with fp.Cluster(["bob"], transport=transport) as cluster:
        assert cluster["bob"].run(fedproc_test_module.answer).get() == 42
    del sys.modules["fedproc_test_module"]


def _draw(transport, workers, **options):
    with fp.Cluster(workers, transport=transport, **options) as cluster:
        return {worker.name: worker.run(draws).get() for worker in cluster}


def test_streams_come_from_seed_and_worker_name(transport):
    first = _draw(transport, ["alice", "bob"], seed=5)
    assert _draw(transport, ["carol", "bob"], seed=5)["bob"] == first["bob"]
    other = _draw(transport, ["bob"], seed=6)["bob"]
    for mine, alices, others in zip(first["bob"], first["alice"], other, strict=True):
        assert len({mine, alices, others}) == 3


def test_streams_are_equal_on_both_transports():
    assert _draw("process", ["bob"]) == _draw("inline", ["bob"], seed=0)


def test_streams_go_on_from_command_to_command(bob):
    draws = [bob.run(torch.rand, 1).item() for _ in range(5)]
    assert len(set(draws)) == 5


def test_the_parents_streams_are_untouched(transport):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with fp.Cluster(["bob"], transport=transport) as cluster:
        bob = cluster["bob"]
        bob.run(draws).wait()
        bob.run(torch.manual_seed, 99).wait()
        bob.run(random.seed, 99).wait()
        bob.run(np.random.seed, 99).wait()
        torch.rand_like(bob.send(torch.ones(5))).wait()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert torch.equal(after[2], before[2])


def test_a_function_can_seed_its_worker(bob):
    def seeded():
        torch.manual_seed(3)
        return torch.rand(2)

    torch_state = torch.get_rng_state()
    expected = torch.rand(2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(bob.run(seeded).get(), expected)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_preload_imports_before_the_start(transport, tmp_path, monkeypatch):
    (tmp_path / "fedproc_test_preload.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with fp.Cluster(["bob"], transport=transport, preload=["fedproc_test_preload"]) as cluster:
        seen = cluster["bob"].run(lambda: "fedproc_test_preload" in sys.modules).get()
    sys.modules.pop("fedproc_test_preload", None)
    assert seen is True


def test_a_preload_that_fails_is_a_start_error(transport):
    with pytest.raises(fp.WorkerStartError, match="fedproc_no_such_module"):
        fp.Cluster(["bob"], transport=transport, preload=["fedproc_no_such_module"])


def test_a_preload_that_raises_is_a_start_error(transport, tmp_path, monkeypatch):
    (tmp_path / "fedproc_test_bad.py").write_text("raise ValueError('not today')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(fp.WorkerStartError, match="fedproc_test_bad"):
        fp.Cluster(["bob"], transport=transport, preload=["fedproc_test_bad"])


def test_a_start_that_takes_too_long_is_a_start_error(tmp_path, monkeypatch):
    (tmp_path / "fedproc_test_slow.py").write_text("import time\ntime.sleep(20)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(fp.WorkerStartError):
        fp.Cluster(["bob"], preload=["fedproc_test_slow"], start_timeout=0.3)


def test_threads_are_torch_threads():
    for threads in (1, 2):
        with fp.Cluster(["bob"], threads=threads) as cluster:
            assert cluster["bob"].run(torch.get_num_threads).get() == threads


def test_threads_default_to_a_share_of_the_cores():
    with fp.Cluster(["alice", "bob"]) as cluster:
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        assert cluster["bob"].run(torch.get_num_threads).get() == share


def test_a_memory_limit_is_an_arena_full_error(transport, x):
    with fp.Cluster(["bob"], transport=transport, memory_limit=1 << 20) as cluster:
        bob = cluster["bob"]
        other = bob.send(x)
        big = bob.run(torch.zeros, 1 << 20)
        with pytest.raises(fp.ArenaFullError) as caught:
            big.get()
        assert isinstance(caught.value, MemoryError)
        with pytest.raises(fp.ArenaFullError):
            bob.send(torch.zeros(1 << 20)).wait()
        assert torch.equal(other.get(), x)
        assert bob.run(torch.ones, 2).get().tolist() == [1.0, 1.0]


def test_a_memory_limit_counts_what_is_alive(transport):
    with fp.Cluster(["bob"], transport=transport, memory_limit=8 << 20) as cluster:
        bob = cluster["bob"]
        for n in range(20):
            assert bob.send(torch.full((1 << 18,), float(n)))[0].item() == n


def test_devices_are_dealt_in_turn():
    with fp.Cluster(3, transport="inline", devices=["cpu", "meta"]) as cluster:
        devices = [torch.device(worker.device).type for worker in cluster]
    assert devices == ["cpu", "meta", "cpu"]


def test_standard_output_and_error_are_the_parents(transport, capfd):
    with fp.Cluster(["bob"], transport=transport) as cluster:
        cluster["bob"].run(print, "said by bob").wait()
        cluster["bob"].run(lambda: print("complained by bob", file=sys.stderr)).wait()
    shown = capfd.readouterr()
    assert shown.out == "said by bob\n"
    assert shown.err == "complained by bob\n"


def test_devices_default_to_the_cpu(bob):
    assert torch.device(bob.device) == torch.device("cpu")
