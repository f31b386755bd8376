"""Pointers on event loops: ``await pointer`` and ``async for`` over ``as_completed``."""

import asyncio
import sys
import threading
import time

import pytest
import torch

import fedproc as fp

if sys.version_info < (3, 11):
    pytest.skip("asyncio.timeout is of Python 3.11", allow_module_level=True)


def fail(message):
    raise ValueError(message)


def zero_(tensor):
    tensor.zero_()


def run(main):
    """Like ``asyncio.run``, but a loop that hangs is an error soon."""

    async def bounded():
        async with asyncio.timeout(20):
            return await main

    return asyncio.run(bounded())


async def opened(gate):
    """Let other tasks begin to wait, then open the gate: a blocked loop would never get here."""
    for _ in range(3):
        await asyncio.sleep(0)
    gate.open()


def test_await_fetches_a_copy(bob, x):
    pointer = bob.send(x)

    async def main():
        return await pointer, await pointer

    first, second = run(main())
    assert first.tolist() == second.tolist() == [1.0, 2.0, 3.0]
    first.zero_()
    assert pointer.get().tolist() == [1.0, 2.0, 3.0]


def test_the_loop_goes_on_meanwhile(bob, gate):
    slow = bob.run(gate.hold, 3)

    async def main():
        return await asyncio.gather(slow, opened(gate))

    assert run(main()) == [3, None]


def test_a_pointer_that_nobody_holds_can_be_awaited(bob):
    async def main():
        return await bob.run(abs, -4)

    assert run(main()) == 4
    assert len(bob.objects) == 0


def test_the_kind_of_a_pending_pointer_is_not_asked_for(bob):
    pointer = bob.run(torch.ones, 2)

    async def main():
        return await pointer

    assert run(main()).tolist() == [1.0, 1.0]
    assert type(pointer).__name__ == "PendingPointer"


def test_parts_and_attributes_can_be_awaited(bob):
    pointer = bob.send({"a": 1})
    model = bob.send(torch.nn.Linear(1, 1, bias=False))
    module = bob.run(torch.nn.init.ones_, model.weight)

    async def main():
        return await pointer["a"], await module, (await model.parameters()[0]).tolist()

    assert run(main()) == (1, torch.ones(1, 1), [[1.0]])


def test_a_chain_gives_the_value_of_its_data(alice, bob, x):
    chain = bob.send(x).send(alice)

    async def main():
        return await chain

    assert run(main()).tolist() == [1.0, 2.0, 3.0]
    assert chain.worker is alice


def test_errors_are_those_of_get(bob, x):
    bad, taken, private = bob.run(fail, "bad"), bob.send(x), bob.send(x, private=True)
    taken.get()

    async def main():
        with pytest.raises(ValueError, match="bad") as caught:
            await bad
        assert isinstance(caught.value, fp.RemoteError)
        assert "test_asyncio.py" in caught.value.issued_at
        with pytest.raises(fp.ObjectGoneError):
            await taken
        with pytest.raises(fp.NotPermittedError):
            await private

    run(main())


def test_a_timeout_loses_nothing(bob, gate, x):
    slow, tensor = bob.run(gate.hold, 3), bob.send(x)

    async def main():
        for pointer in (slow, tensor, slow):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pointer
        tensor.zero_()  # what a cancelled await has asked for does not hold it back
        gate.open()
        assert await slow == 3
        assert (await tensor).tolist() == [0.0, 0.0, 0.0]

    run(main())
    assert bob.link.inbox._answers == {}
    assert bob.stats().arena_bytes < 1 << 16


def test_many_at_once(cluster):
    async def main():
        pointers = [worker.run(abs, -n) for n in range(200) for worker in cluster]
        return await asyncio.gather(*pointers)

    assert run(main()) == [n for n in range(200) for _ in range(3)]


def test_large_values_at_once(cluster):
    async def main():
        pointers = [worker.run(torch.full, (50_000,), n) for n in range(5) for worker in cluster]
        return await asyncio.gather(*pointers)

    values = run(main())
    assert [int(value.sum()) for value in values] == [50_000 * n for n in range(5) for _ in "abc"]


def test_as_completed_in_order_of_completion(transport, gate):
    with fp.Cluster(["alice", "bob"], transport=transport) as cluster:

        async def main():
            slow, fast = cluster["bob"].run(gate.hold, 1), cluster["alice"].run(abs, -2)
            bad = cluster["alice"].run(fail, "bad")
            came = []
            async for pointer in fp.as_completed([slow, fast, bad]):
                came.append(pointer)
                if len(came) == 2:
                    gate.open()
            with pytest.raises(ValueError, match="bad"):
                await bad
            return [pointer.id for pointer in came] == [fast.id, bad.id, slow.id]

        assert run(main())


def test_as_completed_lets_other_tasks_run(bob, gate):
    slow = bob.run(gate.hold, 1)

    async def main():
        opener = asyncio.create_task(opened(gate))
        came = [pointer async for pointer in fp.as_completed([slow], timeout=15)]
        await opener
        return came

    (came,) = run(main())
    assert came is slow


def test_as_completed_has_a_timeout(bob, gate):
    slow = bob.run(gate.hold, 1)

    async def main():
        with pytest.raises(fp.CommandTimeoutError, match="'bob'"):
            async for _ in fp.as_completed([slow], timeout=0.05):
                pass
        gate.open()
        return [await pointer async for pointer in fp.as_completed([slow])]

    assert run(main()) == [1]


def test_as_completed_of_nothing_is_empty():
    async def main():
        return [pointer async for pointer in fp.as_completed([])]

    assert run(main()) == []


def test_a_worker_that_dies_fails_the_await(bob, alice, gate):
    slow, other = bob.run(gate.hold, 1), alice.run(abs, -1)

    async def main():
        waiting = asyncio.ensure_future(slow)
        await asyncio.sleep(0)
        bob.kill()
        with pytest.raises(fp.WorkerLostError, match="bob"):
            await waiting
        (lost,) = [p async for p in fp.as_completed([slow])]
        assert lost is slow
        return await other

    assert run(main()) == 1


def ended(worker):
    deadline = time.monotonic() + 20
    while worker.alive:
        assert time.monotonic() < deadline


def test_closing_the_cluster_fails_the_await(transport, gate):
    cluster = fp.Cluster(["bob"], transport=transport)
    bob = cluster["bob"]
    slow = bob.run(gate.hold, 1)

    async def main():
        waiting = asyncio.ensure_future(slow)
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(asyncio.to_thread(cluster.close))
        if transport == "inline":  # its worker ends between commands
            await asyncio.to_thread(ended, bob)
            gate.open()
        await closing
        with pytest.raises(fp.ClosedError):
            await waiting

    try:
        run(main())
    finally:
        cluster.close()


def test_two_loops_in_two_threads_beside_a_thread_that_waits(cluster, gate):
    alice, bob, carol = cluster
    results = {}

    def loop(name, worker):
        async def main():
            pointers = [worker.run(abs, -n) for n in range(50)]
            gathered = await asyncio.gather(*pointers)
            came = [await pointer async for pointer in fp.as_completed(pointers)]
            return gathered == list(range(50)) and sorted(came) == gathered

        results[name] = run(main())

    threads = [threading.Thread(target=loop, args=(w.name, w)) for w in (alice, bob)]
    slow = carol.run(gate.hold, 3)
    waiter = threading.Thread(target=slow.wait)  # it leads: it reads for the loops, too
    waiter.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.open()
    waiter.join()
    assert results == {"alice": True, "bob": True}


def test_a_task_does_not_wait_for_its_own_borrow(bob, x):
    pointer = bob.send(x)

    async def main():
        with pointer.borrow():
            held = bob.run(zero_, pointer)
            with pytest.raises(fp.FedprocError, match="for ever"):
                await held
            with pytest.raises(fp.FedprocError, match="for ever"):
                async for _ in fp.as_completed([held]):
                    pass
        return await held

    assert run(main()) is None


def test_a_task_may_wait_for_the_borrow_of_another_task(bob, x):
    pointer = bob.send(x)

    async def borrower(begun, end):
        with pointer.borrow() as tensor:
            begun.set()
            await end.wait()
            return tensor.tolist()

    async def main():
        begun, end = asyncio.Event(), asyncio.Event()
        borrowing = asyncio.create_task(borrower(begun, end))
        await begun.wait()
        waiting = asyncio.ensure_future(bob.run(zero_, pointer))
        await asyncio.sleep(0)
        end.set()
        return await borrowing, await waiting, (await pointer).tolist()

    assert run(main()) == ([1.0, 2.0, 3.0], None, [0.0, 0.0, 0.0])


def test_a_loop_that_is_gone_disturbs_nobody(bob, gate):
    slow = bob.run(gate.hold, 3)

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await slow

    run(main())
    gate.open()
    assert slow.get() == 3
    assert run(main_of(bob)) == 5


async def main_of(worker):
    return await worker.run(abs, -5)
