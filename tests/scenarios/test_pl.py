"""Scenarios PL: shipped functions. PL4 does not apply: nothing is traced."""

import torch

from tests.scenarios.toy import branch


def test_pl1_one_message_per_call(cluster, bob, x):
    factor = 3.0

    def scale(tensor):
        return tensor * factor + 1

    p = bob.send(x)
    spent, results = [], []
    for _ in range(2):
        before = cluster.messages
        results.append(bob.run(scale, p))
        spent.append(cluster.messages - before)
    assert spent == [1, 1]
    assert [r.get().tolist() for r in results] == [[4.0, 7.0]] * 2
    assert torch.equal(scale(x), torch.tensor([4.0, 7.0]))


def test_pl2_one_function_for_two_workers_with_local_data(cluster, bob, alice):
    held = [bob.send(torch.tensor([1.0])), alice.send(torch.tensor([-5.0]))]
    results = []
    for _ in range(2):
        before = cluster.messages
        results += [p.worker.run(lambda t: (t * 2).abs(), p) for p in held]
        assert cluster.messages - before == 2
    assert [r.item() for r in results] == [2.0, 10.0, 2.0, 10.0]


# trap: a PySyft plan took the recorded branch for every later input.
def test_pl3_a_branch_on_data_is_taken_each_time(bob):
    positive, negative = bob.send(torch.tensor([1.0, 2.0])), bob.send(torch.tensor([-1.0, -2.0]))
    for _ in range(2):
        assert bob.run(branch, positive).get().tolist() == [10.0, 20.0]
        assert bob.run(branch, negative).get().tolist() == [-11.0, -12.0]
