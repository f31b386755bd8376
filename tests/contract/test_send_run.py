"""send and run: what goes in, what is seen there, what the result is."""

import math
import time

import numpy as np
import pytest
import torch

import fedproc as fp
from tests.contract.things import Counter, Net, divide


def test_send_returns_a_tensor_pointer(bob, x):
    p = bob.send(x)
    assert isinstance(p, fp.TensorPointer)
    assert p.worker is bob
    assert torch.equal(p.get(), x)


def test_send_leaves_the_local_tensor_alone(bob):
    local = torch.tensor([1.0, 2.0])
    p = bob.send(local)
    local.add_(5)
    assert p.get().tolist() == [1.0, 2.0]
    assert local.tolist() == [6.0, 7.0]


def test_every_send_makes_a_new_object(bob, x):
    p, q = bob.send(x), bob.send(x)
    assert p.id != q.id
    assert len(bob.objects) == 2
    p.add_(1)
    assert torch.equal(q.get(), x)


def test_send_takes_tags_and_description(bob, x):
    p = bob.send(x, tags=("a", "b"), description="two tags")
    assert set(p.tags) == {"a", "b"}
    assert p.description == "two tags"


OBJECTS = [
    3,
    "text",
    None,
    2.5,
    [1, "two", 3.0],
    {"a": (1, 2)},
    {1, 2},
    b"bytes",
    1 + 2j,
    slice(1, 2),
    torch.float16,
    torch.Size([2, 3]),
]


def test_any_picklable_object_makes_the_round_trip(bob):
    for thing in OBJECTS:
        back = bob.send(thing).get()
        assert back == thing
        assert type(back) is type(thing)


def test_arrays_and_functions_make_the_round_trip(bob):
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    back = bob.send(array).get()
    assert back.dtype == np.int16
    assert np.array_equal(back, array)
    assert bob.send(lambda n: n + 1).get()(1) == 2


def test_containers_of_tensors_make_the_round_trip(bob, x):
    back = bob.send({"x": x, "pair": (x + 1, 2)}).get()
    assert torch.equal(back["x"], x)
    assert torch.equal(back["pair"][0], x + 1)


def test_kinds_of_pointers(bob, x):
    assert isinstance(bob.send(Net(2, 1)), fp.ModulePointer)
    assert isinstance(bob.send({"a": 1}), fp.ObjectPointer)
    assert isinstance(bob.run(torch.ones, 2), fp.TensorPointer)
    assert isinstance(bob.run(Net, 2, 1), fp.ModulePointer)
    assert isinstance(bob.run(dict), fp.ObjectPointer)
    assert not isinstance(bob.run(dict), fp.TensorPointer)


def test_run_makes_the_tensor_there(bob):
    p = bob.run(torch.ones, 3)
    assert p.worker is bob
    assert p.get().tolist() == [1.0, 1.0, 1.0]
    assert len(bob.objects) == 0


def test_run_takes_keywords(bob):
    assert bob.run(divide, 6, b=3).get() == 2
    assert bob.run(torch.ones, 2, dtype=torch.int8).get().dtype is torch.int8


def test_run_keeps_fn_free_as_a_keyword(bob):
    assert bob.run(lambda fn: fn + 1, fn=3).get() == 4


def test_run_swallows_private(bob):
    def keywords(**kwargs):
        return sorted(kwargs)

    assert bob.run(keywords, a=1, private=False).get() == ["a"]


def test_pointers_become_the_workers_objects(bob, x):
    p, c = bob.send(x), bob.send(Counter(4))

    def look(tensor, counter, *, more):
        return type(tensor).__name__, counter.total, float(more.sum())

    assert bob.run(look, p, c, more=p).get() == ("Tensor", 4, 6.0)


def test_nested_pointers_become_objects_too(bob, x):
    p = bob.send(x)

    def look(tree):
        return float(tree["list"][0].sum() + tree["tuple"][0]["deep"][0])

    assert bob.run(look, {"list": [p], "tuple": ({"deep": p},)}).get() == 7.0


def test_lambdas_and_closures_work(bob):
    offset = 10

    def outer(k):
        def inner(n):
            return n * k + offset

        return inner

    assert bob.run(lambda n: n + offset, 1).get() == 11
    assert bob.run(outer(3), 2).get() == 16


def test_local_tensors_are_copied_in(bob, x):
    captured = torch.tensor([10.0])
    p = bob.run(lambda t: t.add_(captured), x)
    assert p.get().tolist() == [11.0, 12.0, 13.0]
    assert x.tolist() == [1.0, 2.0, 3.0]


def test_state_is_what_objects_hold(bob):
    c = bob.send(Counter())
    for _ in range(3):
        bob.run(Counter.add, c, 2).wait()
    assert c.total.get() == 6


def test_captured_variables_are_those_at_submission(bob, gate):
    held = bob.run(gate.hold)
    factor = 2

    def scale(n):
        return n * factor

    first = bob.run(scale, 10)
    factor = 3
    second = bob.run(scale, 10)
    gate.open()
    assert [first.get(), second.get()] == [20, 30]
    del held


RATE = 1


def test_globals_are_those_at_submission(bob, gate):
    global RATE
    held = bob.run(gate.hold)

    def rate():
        return RATE

    RATE = 2
    first = bob.run(rate)
    RATE = 3
    second = bob.run(rate)
    gate.open()
    assert [first.get(), second.get()] == [2, 3]
    del held


def test_arguments_are_those_at_submission(bob, gate):
    held = bob.run(gate.hold)
    numbers, tensor = [1, 2], torch.zeros(2)
    total = bob.run(sum, numbers)
    copied = bob.run(torch.add, tensor, 1)
    sent = bob.send(tensor)
    numbers.append(100)
    tensor.add_(5)
    gate.open()
    assert total.get() == 3
    assert copied.get().tolist() == [1.0, 1.0]
    assert sent.get().tolist() == [0.0, 0.0]
    del held


def test_submitting_never_waits(bob, x, gate):
    held = bob.run(gate.hold)
    start = time.monotonic()
    p = bob.send(x)
    q = (p + 1) * 2
    r = bob.run(torch.add, q, p)
    s = torch.stack([p, q])
    assert time.monotonic() - start < 0.5
    assert not r.done()
    gate.open()
    assert r.get().tolist() == [5.0, 8.0, 11.0]
    assert s.get().tolist() == [[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]]
    del held


def test_results_of_unknown_kind_can_be_used_without_waiting(bob, gate):
    r = bob.run(gate.hold, torch.ones(2))
    used = [r + 1, 2 * r, torch.add(r, 1), bob.run(torch.sum, r), -r, r[0]]
    assert not r.done()
    gate.open()
    assert [u.get().tolist() for u in used] == [
        [2.0, 2.0],
        [2.0, 2.0],
        [2.0, 2.0],
        2.0,
        [-1.0, -1.0],
        1.0,
    ]


def test_attribute_names_wait_for_the_kind(bob):
    r = bob.run(torch.ones, 2)
    with pytest.raises(AttributeError):
        r.frobnicate  # noqa: B018


def test_order_is_the_order_of_submission(bob):
    p = bob.send(torch.tensor(1.0))
    p.add_(1)
    p.mul_(10)
    q = p + 0
    p.zero_()
    assert q.item() == 20.0
    assert p.item() == 0.0


def test_pointers_work_from_any_thread(cluster, bob, alice):
    import threading

    results = {}

    def work(name, worker):
        p = worker.run(torch.zeros, 1)
        for _ in range(20):
            p = p + 1
        results[name] = p.item()

    threads = [
        threading.Thread(target=work, args=(n, (bob, alice)[n % 2]), daemon=True) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert results == {0: 20.0, 1: 20.0, 2: 20.0, 3: 20.0}


def test_one_thread_may_use_what_another_waits_for(bob, gate):
    import threading

    r = bob.run(gate.hold, 7)
    got = []
    waiter = threading.Thread(target=lambda: got.append(r.fetch()), daemon=True)
    waiter.start()
    q = bob.run(math.sqrt, 4.0)
    gate.open()
    waiter.join(timeout=10)
    assert got == [7]
    assert q.get() == 2.0


def test_code_that_names_a_module_of_its_own_class_is_sent(bob):
    def seed_everything():
        torch.backends.cudnn.benchmark = False
        return torch.backends.cudnn.__name__, torch.backends.mkldnn.__name__

    assert bob.run(seed_everything).get() == ("torch.backends.cudnn", "torch.backends.mkldnn")
