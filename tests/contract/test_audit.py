"""The audit log: what left a worker although it is private, and what was refused."""

import functools

import pytest
import torch
from torch import nn

import fedproc as fp
from fedproc.worker.audit import MOST_RECORDS, AuditLog
from tests.contract.things import explode, outcome


def test_public_objects_leave_no_trace(bob):
    p = bob.send(torch.ones(3))
    assert (p + 1).sum().item() == 6.0
    p.get()
    assert bob.audit() == ()


def test_refusals_say_what_was_asked_of_which_object(bob, alice):
    p = bob.send(torch.ones(3), private=True)
    for way in (p.get, p[0].item, lambda: p.move(alice), lambda: p.borrow().__enter__()):
        assert isinstance(outcome(way), fp.NotPermittedError)
    log = bob.audit()
    assert [record.way for record in log] == ["get", "Tensor.item", "move", "borrow"]
    assert {record.event for record in log} == {"refused"}
    assert [record.number for record in log] == [1, 2, 3, 4]
    assert (log[0].object, log[0].type, log[0].shape) == (p.id, "Tensor", (3,))
    assert (log[0].nbytes, log[0].to) == (0, "parent")
    assert log[0].time <= log[3].time
    assert alice.audit() == ()
    with pytest.raises(AttributeError):
        log[0].way = "changed"


def test_errors_of_users_code_are_not_refusals(bob):
    p = bob.send(torch.ones(3), private=True)
    assert isinstance(outcome(bob.run(explode, p).get), ValueError)
    assert bob.audit() == ()


def test_a_shape_that_tells_values_is_a_refusal(bob):
    p = bob.send(torch.tensor([0.0, 1.0]), private=True)
    assert isinstance(outcome(lambda: p.nonzero().shape), fp.NotPermittedError)
    assert bob.audit()[0].shape is None


def test_what_an_aggregator_takes_of_private_data_is_logged(cluster):
    x = torch.linspace(-1, 1, 120).reshape(60, 2)
    data = fp.federate((x, torch.arange(60) % 2), cluster, private=True)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    aggregator = fp.Aggregator(nn.Linear(2, 2), data, fp.LocalTraining(nn.CrossEntropyLoss(), sgd))
    aggregator.run_round()
    aggregator.evaluate((x, torch.arange(60) % 2))
    aggregator.evaluate((x, torch.arange(60) % 2))  # the rows it was given did not become private
    aggregator.evaluate_clients()
    data.summary()
    for worker in cluster:
        left = [(record.way, record.detail) for record in worker.audit()]
        assert left[0] == ("fold", "train")
        assert ("evaluation", "evaluate_clients") in left
        assert left[-1] == ("metric", "count")
        assert worker.audit()[0].nbytes >= 4 * (2 * 2 + 2)
        assert {record.event for record in worker.audit()} == {"left"}


def test_the_log_is_bounded_and_says_so():
    log = AuditLog()
    for _ in range(MOST_RECORDS + 5):
        log.refused("get", 1, None, "")
    records = log.records()
    assert len(records) == MOST_RECORDS
    assert records[0][0] == 6
