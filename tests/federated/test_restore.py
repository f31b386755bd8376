"""A worker that is lost while it is given the rows of a lost one."""

import fedproc as fp
from fedproc.federated import data as data_module
from tests.federated.worlds import bits, cross_entropy, linear, sgd, shards

LOCAL = fp.LocalTraining(cross_entropy, sgd, batch_size=8)


def trained(rounds, before_last=lambda cluster: None):
    with fp.Cluster(2, restart=True) as cluster:
        data = fp.FederatedDataset(shards((8, 9, 10, 11)), cluster)
        aggregator = fp.Aggregator(linear(), data, LOCAL)
        aggregator.run(rounds - 1)
        before_last(cluster)
        aggregator.run(1)
        return bits(aggregator.model)


def test_the_round_goes_on_and_its_bits_are_the_same(monkeypatch):
    sent = data_module.hold
    killed = []

    def hold(worker, sources, **options):
        if len(killed) == 1:
            killed.append(worker.name)
            worker.kill()
        return sent(worker, sources, **options)

    def lose_one(cluster):
        killed.append(cluster.workers[0].name)
        cluster.workers[0].kill()
        monkeypatch.setattr(data_module, "hold", hold)

    assert trained(3, lose_one) == trained(3)
    assert len(killed) == 2
