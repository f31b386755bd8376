"""Tags and search."""

import pytest
import torch

import fedproc as fp


def test_search_finds_objects_with_all_tags(bob, x):
    a = bob.send(x, tags=("a", "both"))
    b = bob.send(x, tags=("b", "both"))
    assert {p.id for p in bob.search("both")} == {a.id, b.id}
    assert [p.id for p in bob.search("a", "both")] == [a.id]
    assert list(bob.search("a", "b")) == []
    assert list(bob.search("unknown", "a")) == []


def test_a_string_is_one_tag(bob, x):
    p = bob.send(x, tags="word")
    assert bob.objects[p.id].tags == frozenset({"word"})
    assert list(bob.search("w")) == []
    assert len(list(bob.search("word"))) == 1


def test_search_without_tags_is_a_value_error(bob, cluster):
    with pytest.raises(ValueError, match="tag"):
        bob.search()
    with pytest.raises(ValueError, match="tag"):
        cluster.search()


def test_found_pointers_do_not_own(bob, x):
    p = bob.send(x, tags="a")
    (found,) = bob.search("a")
    assert found.worker is bob
    assert torch.equal(found.fetch(), x)
    del found
    assert len(bob.objects) == 1
    (found,) = bob.search("a")
    del p
    assert len(bob.objects) == 0
    with pytest.raises(fp.ObjectGoneError):
        found.fetch()


def test_getting_a_found_pointer_removes_the_object(bob, x):
    p = bob.send(x, tags="a")
    (found,) = bob.search("a")
    assert torch.equal(found.get(), x)
    with pytest.raises(fp.ObjectGoneError):
        p.get()
    assert list(bob.search("a")) == []


def test_a_found_pointer_is_of_the_right_kind(bob, x):
    held = [bob.send(x, tags="t"), bob.send(torch.nn.Linear(1, 1), tags="m")]
    assert isinstance(next(iter(bob.search("t"))), fp.TensorPointer)
    assert isinstance(next(iter(bob.search("m"))), fp.ModulePointer)
    assert next(iter(bob.search("t"))).shape == (3,)
    del held


def test_results_carry_no_tags(bob, x):
    p = bob.send(x, tags="a")
    q = p + 1
    assert set(q.tags) == set()
    assert len(list(bob.search("a"))) == 1


def test_cluster_search_maps_names_to_pointers(cluster, alice, bob, x):
    held = [bob.send(x, tags=("x", "train")), bob.send(x, tags="x"), alice.send(x, tags="x")]
    found = cluster.search("x")
    assert {name: len(list(pointers)) for name, pointers in found.items()} == {"alice": 1, "bob": 2}
    assert [p.id for p in cluster.search("x", "train")["bob"]] == [held[0].id]
    assert cluster.search("nothing") == {}


@pytest.mark.parametrize("labels", [{"tags": 3}, {"tags": ["a", 3]}, {"description": 3}])
def test_labels_are_texts(bob, x, labels):
    with pytest.raises(ValueError, match="tags and description are texts"):
        bob.send(x, **labels)
    assert len(bob.objects) == 0
