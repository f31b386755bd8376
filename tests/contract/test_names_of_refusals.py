import pytest
import torch

import fedproc as fp

ASKED = {
    "bool": lambda p: bool(p),
    "in": lambda p: 1.0 in p,
    "Tensor.item": lambda p: float(p),
    "Tensor.tolist": lambda p: p.tolist(),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_refusal_names_what_was_asked_as_it_is_written(bob, name):
    p = bob.send(torch.ones(1), private=True)
    with pytest.raises(fp.NotPermittedError) as caught:
        ASKED[name](p)
    assert str(caught.value).startswith(f"{name}: object {p.id} on worker 'bob' is private: ")
    assert bob.audit()[-1].way == name


def test_a_refused_attribute_is_named(bob):
    p = bob.send(torch.ones(3), private=True)
    with pytest.raises(fp.NotPermittedError) as caught:
        p[p > 0].shape  # noqa: B018
    assert str(caught.value).startswith("shape: object ")
