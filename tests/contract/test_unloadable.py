"""What pickles on one side and does not load on the other: both sides say so, nothing is lost."""

import asyncio

import pytest
import torch

import fedproc as fp


class NeedsTwo(Exception):
    """Pickles, and cannot be loaded: ``args`` are not what ``__init__`` takes."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class LooksAtIt:
    """Looks at what it holds when it is loaded."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __setstate__(self, state):
        state["tensor"].sum()
        vars(self).update(state)


def returned(_=None):
    return NeedsTwo(1, 2)


def text(error):
    return error.args[0]


CAUSE = "NeedsTwo.__init__() missing 1 required positional argument: 'b'"


async def awaited(pointer):
    return await pointer


READERS = {
    "get": ("get", lambda cluster, pointer: pointer.get()),
    "fetch": ("fetch", lambda cluster, pointer: pointer.fetch()),
    "gather": ("gather", lambda cluster, pointer: fp.gather([pointer])),
    "await": ("await", lambda cluster, pointer: asyncio.run(awaited(pointer))),
}


@pytest.mark.parametrize("name", READERS)
def test_a_value_that_does_not_load_here_stays_there(cluster, bob, name):
    what, read = READERS[name]
    pointer = bob.run(returned)
    for _ in range(2):
        with pytest.raises(fp.NotShippableError) as caught:
            read(cluster, pointer)
        assert str(caught.value) == (
            f"{what}: the value was pickled on worker 'bob' but cannot be loaded here "
            f"(TypeError: {CAUSE}). The object stays there: fetch plain parts of it with "
            "worker.run(function, pointer)."
        )
        assert type(caught.value.__cause__) is TypeError
        assert str(caught.value.__cause__) == CAUSE
    assert len(bob.objects) == 1
    assert bob.run(text, pointer).get() == "1 2"


def test_a_result_of_map_that_does_not_load_here(cluster):
    with pytest.raises(fp.NotShippableError, match=r"^map: the value was pickled on worker '"):
        cluster.map(returned, [1])


def test_the_memory_of_what_did_not_load_is_given_back(bob):
    pointer = bob.run(lambda: [torch.ones(1 << 18), returned()])
    with pytest.raises(fp.NotShippableError):
        pointer.fetch()
    bob.run(torch.zeros, 3).get()  # takes the release along
    used = bob.stats().arena_bytes
    for _ in range(20):
        with pytest.raises(fp.NotShippableError):
            pointer.fetch()
    bob.run(torch.zeros, 3).get()
    assert bob.stats().arena_bytes == used


@pytest.mark.parametrize("way", ["run", "send"])
def test_what_does_not_load_in_the_worker_says_so(bob, way):
    sent = bob.run(str, returned()) if way == "run" else bob.send(returned())
    with pytest.raises(TypeError) as caught:
        sent.get()
    error = caught.value
    assert isinstance(error, fp.RemoteError)
    assert str(error).partition("\n")[0] == (
        f"TypeError in worker 'bob': unpickling what was sent failed ({CAUSE}). What can be "
        "pickled cannot always be loaded again: send plain parts of it, or make it there with "
        "worker.run(function)."
    )
    assert f"TypeError: {CAUSE}" in error.remote_traceback
    assert "UnreadableError" not in str(error)
    assert bob.run(abs, -1).get() == 1


def test_what_does_not_load_at_the_end_of_a_move_says_so(cluster, bob, alice):
    pointer = bob.run(returned)
    with pytest.raises(fp.RemoteError, match="unpickling what was sent failed") as caught:
        pointer.move(alice)
    assert isinstance(caught.value, TypeError)
    assert caught.value.worker == "alice"
    assert bob.run(text, pointer).get() == "1 2"


def test_a_missing_object_is_the_first_cause(bob):
    bad = bob.send(torch.ones(3)).view(7)
    with pytest.raises(fp.RemoteError, match="shape") as caught:
        bob.run(str, LooksAtIt(bad)).get()
    assert "unpickling" not in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_a_worker_that_refuses_a_pickle_still_refuses_it(transport):
    with fp.Cluster(["bob"], transport=transport, functions=[text]) as cluster:
        with pytest.raises(fp.NotPermittedError, match="NeedsTwo") as caught:
            cluster["bob"].run(text, returned()).get()
        assert "unpickling" not in str(caught.value)
        refused = cluster["bob"].audit()
        assert [record.event for record in refused] == ["refused"]


# ---------------------------------------------------------------- await and StopIteration


class Stop(StopIteration):
    pass


def stops(kind):
    raise kind("at the end")


@pytest.mark.parametrize("kind", [StopIteration, Stop])
def test_a_stop_iteration_leaves_an_await_as_a_remote_error(bob, kind):
    bad = bob.run(stops, kind)
    with pytest.raises(fp.RemoteError) as caught:
        asyncio.run(awaited(bad))
    error = caught.value
    assert type(error) is fp.RemoteError
    assert str(error).startswith(f"{kind.__name__} in worker 'bob': at the end\n")
    assert error.worker == "bob"
    assert "test_unloadable.py" in error.issued_at
    assert f"{kind.__name__}: at the end" in error.remote_traceback
    with pytest.raises(kind) as caught:
        bad.get()
    assert str(caught.value) == str(error)


def test_a_stop_iteration_is_one_result_of_several(bob):
    async def main():
        bad, good = bob.run(stops, StopIteration), bob.run(abs, -1)
        return await asyncio.gather(bad, good, return_exceptions=True)

    error, value = asyncio.run(main())
    assert (type(error), value) == (fp.RemoteError, 1)


def test_a_stop_async_iteration_leaves_an_await_as_it_is(bob):
    bad = bob.run(stops, StopAsyncIteration)
    with pytest.raises(fp.RemoteError) as caught:
        asyncio.run(awaited(bad))
    assert isinstance(caught.value, StopAsyncIteration)
    assert str(caught.value).startswith("StopAsyncIteration in worker 'bob': at the end\n")
