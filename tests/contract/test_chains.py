"""Pointers to pointers: send, get, remote_get, move, and operations on chains."""

import pytest
import torch

import fedproc as fp


@pytest.fixture
def p(bob, x):
    return bob.send(x)


@pytest.fixture
def chain(p, alice):
    return p.send(alice)


def _counts(*workers):
    return tuple(len(worker.objects) for worker in workers)


def test_a_chain_is_held_by_alice_while_bob_keeps_the_data(p, chain, alice, bob):
    assert chain.worker is alice
    assert chain.id in alice.objects
    assert p.id in bob.objects
    assert _counts(bob, alice) == (1, 1)


def test_worker_send_of_a_pointer_makes_a_chain_too(p, alice, bob):
    chain = alice.send(p)
    assert chain.worker is alice
    assert chain.get().id == p.id


def test_get_gives_the_first_pointer_back(p, chain, alice, bob, x):
    back = chain.get()
    assert back.id == p.id
    assert back.worker is bob
    assert _counts(bob, alice) == (1, 0)
    assert torch.equal(back.get(), x)
    assert _counts(bob, alice) == (0, 0)


def test_a_chain_after_get_is_gone(chain):
    chain.get()
    with pytest.raises(fp.ObjectGoneError):
        chain.get()
    with pytest.raises(fp.ObjectGoneError):
        chain + 1


def test_the_pointer_got_back_owns_its_object(bob, alice, x):
    chain = bob.send(x).send(alice)
    back = chain.get()
    assert _counts(bob, alice) == (1, 0)
    del back
    assert _counts(bob, alice) == (0, 0)


def test_dropping_the_chain_frees_both_ends(bob, alice, x):
    chain = bob.send(x).send(alice)
    assert _counts(bob, alice) == (1, 1)
    del chain
    assert _counts(bob, alice) == (0, 0)


def test_p_stays_usable_after_it_was_sent(p, chain, alice, bob, x):
    assert torch.equal((p + 1).get(), x + 1)
    del p
    assert torch.equal(chain.fetch(), x)


def test_data_lives_while_p_lives(bob, alice, x):
    p = bob.send(x)
    chain = p.send(alice)
    del chain
    assert _counts(bob, alice) == (1, 0)
    assert torch.equal(p.get(), x)


def test_operations_run_where_the_data_is(chain, bob, alice, x):
    y = chain + chain
    assert y.worker is bob
    assert _counts(bob, alice) == (2, 1)
    assert torch.equal(y.get(), 2 * x)
    for result in (chain.abs(), torch.neg(chain), 2 * chain, chain[0]):
        assert result.worker is bob
    assert torch.neg(chain).get().tolist() == [-1.0, -2.0, -3.0]


def test_a_chain_mixes_with_pointers_of_the_datas_worker(p, chain, alice, x):
    assert torch.equal((chain + p).get(), 2 * x)
    assert torch.equal(torch.add(p, chain).get(), 2 * x)
    q = alice.send(x)
    with pytest.raises(fp.PlacementError):
        chain + q


def test_a_chain_is_an_argument_where_its_data_is(chain, bob, alice):
    assert bob.run(torch.sum, chain).get().item() == 6.0
    with pytest.raises(fp.PlacementError):
        alice.run(torch.sum, chain)


def test_in_place_on_a_chain_changes_the_data(p, chain):
    assert chain.add_(1) is chain
    assert p.get().tolist() == [2.0, 3.0, 4.0]


def test_reading_a_chain_reads_the_data(bob, alice):
    chain = bob.send(torch.tensor([5], dtype=torch.int16)).send(alice)
    assert chain.fetch().tolist() == [5]
    assert chain.item() == 5
    assert chain.tolist() == [5]
    assert chain.shape == (1,)
    assert chain.dtype is torch.int16
    with chain.borrow() as t:
        assert t.tolist() == [5]
    assert _counts(bob, alice) == (1, 1)


def test_copying_a_chain_copies_the_data(chain, bob, alice, x):
    copied = chain.copy()
    assert copied.worker is bob
    assert _counts(bob, alice) == (2, 1)
    chain.zero_()
    assert torch.equal(copied.get(), x)


def test_remote_get_pulls_the_data(bob, alice, x):
    chain = bob.send(x).send(alice)
    slot = chain.id
    chain.remote_get()
    assert _counts(bob, alice) == (0, 1)
    assert chain.id == slot
    assert slot in alice.objects
    assert alice.objects[slot].type == "torch.Tensor"
    assert chain.worker is alice
    assert torch.equal(chain.get(), x)
    assert _counts(bob, alice) == (0, 0)


def test_after_remote_get_the_chain_is_a_plain_pointer(bob, alice, x):
    chain = bob.send(x).send(alice)
    chain.remote_get()
    y = chain + alice.send(x)
    assert y.worker is alice
    with pytest.raises(fp.PlacementError):
        chain.remote_get()


def test_remote_get_of_a_plain_pointer_is_refused(p, x):
    with pytest.raises(fp.PlacementError):
        p.remote_get()
    assert torch.equal(p.get(), x)


def test_move_of_a_chain_moves_the_data(bob, alice, carol, x):
    chain = bob.send(x).send(alice)
    assert chain.move(carol) is chain
    assert chain.worker is carol
    assert _counts(bob, alice, carol) == (0, 0, 1)
    with pytest.raises(fp.PlacementError):
        chain.remote_get()
    assert torch.equal(chain.get(), x)
    assert _counts(bob, alice, carol) == (0, 0, 0)


def test_chains_of_chains_go_one_step_per_get(bob, alice, carol, x):
    deep = bob.send(x).send(alice).send(carol)
    assert deep.worker is carol
    assert _counts(bob, alice, carol) == (1, 1, 1)
    assert torch.equal((deep * 2).get(), 2 * x)
    middle = deep.get()
    assert middle.worker is alice
    assert _counts(bob, alice, carol) == (1, 1, 0)
    first = middle.get()
    assert first.worker is bob
    assert _counts(bob, alice, carol) == (1, 0, 0)
    assert torch.equal(first.get(), x)


def test_getting_the_data_ends_the_chain(p, chain, x):
    assert torch.equal(p.get(), x)
    with pytest.raises(fp.ObjectGoneError):
        chain.fetch()


def test_chains_of_modules_and_objects(bob, alice):
    module = bob.send(torch.nn.Linear(2, 1)).send(alice)
    out = module(bob.send(torch.ones(3, 2)))
    assert (out.worker, tuple(out.shape)) == (bob, (3, 1))
    numbers = bob.send([1, 2]).send(alice)
    assert numbers.get().get() == [1, 2]


def test_a_chain_is_listed_as_a_pointer_to_its_object(p, chain, alice):
    (row,) = alice.objects.values()
    assert row.type == "fedproc.Pointer"
    assert row.description == f"<pointer to object {p.id} on bob>"


@pytest.mark.parametrize("options", [{"private": True}, {"tags": "a"}, {"description": "b"}])
def test_a_chain_takes_no_labels_of_its_own(p, alice, options):
    with pytest.raises(ValueError, match="makes a chain: no object is sent"):
        alice.send(p, **options)
    assert len(alice.objects) == 0


@pytest.mark.parametrize("way", ["move", "send"])
def test_a_name_is_no_worker(p, way):
    with pytest.raises(TypeError, match=f"{way}: needs a worker, got 'alice'"):
        getattr(p, way)("alice")
    assert p.fetch().tolist() == [1.0, 2.0, 3.0]
