"""The parent, or the process that workers are forked from, dies: cases 14 to 21."""

import json
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import torch

import fedproc as fp
from fedproc.transport.process import zygote_pid
from tests.faults.things import ROOT, ended, eventually

pytestmark = pytest.mark.faults

PREAMBLE = """
import json, os, subprocess, sys, threading, time
import torch
import fedproc as fp
from fedproc.transport.process import zygote_pid

def say(cluster, *more):
    pids = [worker.pid for worker in cluster] + [zygote_pid(), *more]
    print(json.dumps([os.getpid(), *pids]), flush=True)
"""
BUSY = """
import ctypes
cluster = fp.Cluster(["idle", "kernel", "gil", "loop", "write", "stopped", "family"])
idle, kernel, gil, loop, write, stopped, family = cluster

def torch_kernel():
    a = torch.ones(3000, 3000)
    while True:
        a = (a @ a).clamp(max=1)

def in_c_with_the_gil():
    ctypes.PyDLL(None).sleep(1000)

def python_loop():
    while True:
        pass

def blocked_write():
    r, w = os.pipe()
    while True:
        os.write(w, bytes(65536))

def stop():
    os.kill(os.getpid(), 19)

def with_child():
    return subprocess.Popen(["sleep", "100"]).pid

held = [kernel.run(torch_kernel), gil.run(in_c_with_the_gil), loop.run(python_loop),
        write.run(blocked_write), stopped.run(stop)]
"""
BYSTANDER = """
bystander = os.fork()
if bystander == 0:
    time.sleep(100)
    os._exit(0)
"""
WAITING = "say(cluster, {more})\ntime.sleep(100)\n"


def launch(code):
    """Starts a parent."""
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(code):
    """Runs a parent until it has told its process ids: (it, its processes)."""
    parent = launch(code)
    return parent, json.loads(parent.stdout.readline())


def finish(parent, pids, spared=()):
    """The parent's (standard error, exit code), when all its processes have ended."""
    _, complaints = parent.communicate(timeout=20)
    eventually(lambda: all(ended(pid) for pid in pids if pid not in spared))
    return complaints, parent.returncode


def test_case_14_parent_killed_whatever_its_workers_do():
    """Case 15 too: a process that the user has forked lives on, and holds copies of everything."""
    child = "family.run(with_child).get()"
    parent, pids = start(BUSY + BYSTANDER + WAITING.format(more=f"{child}, bystander"))
    bystander = pids[-1]
    parent.kill()
    parent.stdout.close()
    parent.stderr.close()
    parent.wait()
    eventually(lambda: all(ended(pid) for pid in pids[:-1]))
    assert not ended(bystander), "else it proves nothing"
    os.kill(bystander, signal.SIGKILL)
    eventually(lambda: ended(bystander))


def test_case_16_the_zygote_is_killed():
    with fp.Cluster(["alice", "bob"], restart=True) as cluster:
        alice, bob = cluster
        p = alice.send(torch.ones(2))
        p.wait()
        old = zygote_pid()
        os.kill(old, signal.SIGKILL)
        eventually(lambda: ended(old))
        assert (p + 1).get().tolist() == [2.0, 2.0], "workers serve on"
        bob.kill()
        with pytest.raises(fp.WorkerLostError) as caught:
            bob.run(abs, -1)
        assert caught.value.exitcode == -9, "nobody could tell how it ended; it was killed"
        assert cluster["bob"].run(abs, -3).get() == 3, "from a new zygote"
        assert zygote_pid() not in {None, old}
        assert alice.run(abs, -4).get() == 4


def test_case_17_zygote_and_parent_are_killed_together():
    code = "cluster = fp.Cluster(2)\nworker = cluster.workers[0]\n"
    code += "worker.run(lambda: [None for _ in iter(int, 1)])\n"
    parent, pids = start(code + WAITING.format(more=""))
    for pid in (pids[-1], parent.pid):
        os.kill(pid, signal.SIGKILL)
    assert finish(parent, pids) == ("", -9)


ENDS = {
    "os._exit": ("os._exit(3)", 3, ""),
    "exception": ("raise RuntimeError('on purpose')", 1, "RuntimeError: on purpose"),
    "sys.exit in a thread": (
        "t = threading.Thread(target=sys.exit)\nt.start()\nt.join()\nsys.exit(5)",
        5,
        "",
    ),
    "SIGTERM with a handler": (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(100)",
        7,
        "",
    ),
}


def test_case_18_the_parent_ends_without_close():
    """The last way is case 24: a handler of SIGTERM. All at once, since each takes a while."""
    busy = "cluster = fp.Cluster(2)\ncluster.workers[1].run(time.sleep, 100)\n"
    busy += "child = cluster.workers[0].run(lambda: subprocess.Popen(['sleep', '100']).pid).get()\n"
    ends = ENDS.values()
    parents = [launch(f"{busy}say(cluster, child)\n{last}\n") for last, _, _ in ends]
    for parent, (_, code, complaint) in zip(parents, ends, strict=True):
        printed, found = finish(parent, json.loads(parent.stdout.readline()))
        assert found == code
        assert complaint in printed
        assert "fedproc" not in printed
        assert printed.count("Traceback") == (1 if complaint else 0), "the workers print nothing"


def test_case_19_preloads_that_misbehave(tmp_path, monkeypatch, capfd):
    """One that raises, and one that is not there: see tests/contract/test_surroundings.py."""
    (tmp_path / "fedproc_test_threads.py").write_text(
        "import threading, time\n"
        "print('no end of line', end='')\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with fp.Cluster(["a", "b"], preload=["fedproc_test_threads"]) as cluster:
        assert [worker.run(abs, -1).get() for worker in cluster] == [1, 1]
        parents = {psutil.Process(worker.pid).ppid() for worker in cluster}
        assert parents == {os.getpid()}, "a process with threads must not fork: they are executed"
    printed = capfd.readouterr().out
    assert printed.count("no end of line") == 3, "once by each process that imports it"
    (tmp_path / "fedproc_test_prints.py").write_text("print('no end of line', end='')\n")
    with fp.Cluster(["a", "b"], preload=["fedproc_test_prints"]) as cluster:
        cluster.run(print, "by a worker")
        cluster.wait()
    printed = capfd.readouterr().out
    assert printed.count("no end of line") == 1, "workers are forked with nothing left to print"
    assert printed.count("by a worker") == 2


def test_case_20_a_cluster_outlives_the_thread_that_started_it(transport):
    made = []
    thread = threading.Thread(target=lambda: made.append(fp.Cluster(2, transport=transport)))
    thread.start()
    thread.join()
    with made[0] as cluster:
        assert [worker.run(abs, -1).get() for worker in cluster] == [1, 1]
