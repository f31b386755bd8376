"""Scenarios PR: permissions. There are no credentials: a private value may be used, not taken."""

import pytest
import torch

import fedproc as fp
from tests.scenarios.toy import counts


def test_pr1_a_restricted_tensor_cannot_be_sent_on(bob, alice):
    p = bob.send(torch.tensor([5.5, 6.5]), private=True)
    for send in (lambda: p.send(alice), lambda: alice.send(p)):
        with pytest.raises(fp.NotPermittedError):
            send()
    assert counts(bob, alice) == (1, 0)


def test_pr2_a_refused_get_leaves_the_object_there(bob):
    p = bob.send(torch.tensor([5.5, 6.5]), private=True)
    for _ in range(2):
        with pytest.raises(fp.NotPermittedError):
            p.get()
    assert list(bob.objects) == [p.id]
    (p + 1).wait()
    assert bob.send(torch.tensor([5.5])).get().tolist() == [5.5]


def test_pr3_the_restriction_is_inherited_and_nothing_shows_a_value(bob, alice):
    p = bob.send(torch.tensor([918273.5, 1.0]), private=True)
    public = bob.send(torch.tensor([1.0, 1.0]))
    derived = [p.sum(), p + public, public + p, p.copy(), p[0]]
    for handle in [p, *derived]:
        with pytest.raises(fp.NotPermittedError):
            handle.fetch()
        with pytest.raises(fp.NotPermittedError):
            handle.move(alice)
        assert "918273" not in repr(handle)
        assert handle.worker is bob
    with pytest.raises(fp.NotPermittedError):
        float(p.sum())
    assert all(info.private for key, info in bob.objects.items() if key != public.id)
    assert "918273" not in repr(bob.objects)
    assert len(alice.objects) == 0
    assert public.get().tolist() == [1.0, 1.0]
