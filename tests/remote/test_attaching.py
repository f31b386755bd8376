"""Mapping the memory of other workers: from several threads at once."""

import os
import threading

import fedproc as fp
from fedproc.memory import lending
from fedproc.remote.moving import attach


def files():
    """Which file is mapped under which name; runs in a worker."""
    return {name: os.fstat(mapped.fd).st_ino for name, mapped in lending._home.mapped.items()}


def test_threads_that_attach_two_workers_at_once_do_not_swap_them():
    with fp.Cluster(3) as cluster:
        target, *sources = (worker.link for worker in cluster.workers)
        real = {link.arena_name: os.fstat(link.mapped.fd).st_ino for link in sources}
        for _ in range(100):
            target.attached.clear()
            barrier = threading.Barrier(2)

            def work(source, barrier=barrier):
                barrier.wait()
                attach(source, target)

            threads = [threading.Thread(target=work, args=(source,)) for source in sources]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            mapped = cluster.workers[0].run(files).get()
            assert {name: mapped[name] for name in real} == real
