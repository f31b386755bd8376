"""However a program is started, its workers start too; standard error stays empty."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

import fedproc as fp

ROOT = str(Path(fp.__file__).resolve().parent.parent)

SCRIPT = """
import threading
import torch
from torch import nn
import fedproc as fp


class Point:
    def __init__(self, x):
        self.x = x


class Mistake(Exception):
    def __init__(self, code, *, reason):
        super().__init__(reason)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return helper(self.fc(x))


def helper(t):
    return t * rate


def fail(point):
    raise Mistake(7, reason="on purpose")


def closure(k):
    def inner(t):
        return t + k
    return inner


def show(*words):
    print(*words, flush=True)


cluster = fp.Cluster(["alice", "bob"])
alice, bob = cluster
p = bob.send(torch.tensor([1.0, 2.0]))
show("lambda", bob.run(lambda t: t + 1, p).get().tolist())
show("closure", bob.run(closure(5), p).get().tolist())
rate = 2
first = bob.run(helper, p)
rate = 3
second = bob.run(helper, p)
show("globals", first.get().tolist(), second.get().tolist())
point = bob.run(Point, 3).get()
show("instance", isinstance(point, Point), point.x)
show("sent", type(bob.send(point).get()) is Point)
try:
    bob.run(fail, point).get()
except Mistake as error:
    show("exception", isinstance(error, fp.RemoteError), error.issued_at)
local = Net()
net = bob.send(local)
out = net(p)
same = torch.equal(out.get(), local(torch.tensor([1.0, 2.0])).detach())
show("module", same, type(net.get()) is Net)
results = []
thread = threading.Thread(target=lambda: results.append(alice.run(closure(1), 1).get()))
thread.start()
thread.join()
show("thread", results)
bob.run(print, "printed by bob").wait()
alice.run(lambda: print("written by alice", end="")).wait()
show("pids", alice.pid, bob.pid)
held = bob.send(torch.ones(3))
with fp.Cluster(1) as closed:
    also_held = closed.workers[0].send(torch.ones(3))
"""


def _run(arguments, text="", cwd=None):
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=50,
        cwd=cwd,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def _check(output, file):
    lines = output.splitlines()
    assert "lambda [2.0, 3.0]" in lines
    assert "closure [6.0, 7.0]" in lines
    assert "globals [2.0, 4.0] [3.0, 6.0]" in lines
    assert "instance True 3" in lines
    assert "sent True" in lines
    (exception,) = re.findall(r"exception True (.*)", output)
    assert file in exception
    assert exception.endswith(" in <module>")
    assert "module True True" in lines
    assert "thread [2]" in lines
    assert "printed by bob" in output
    assert "written by alice" in output
    (pids,) = re.findall(r"pids (\d+) (\d+)", output)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids)


def test_a_script_without_a_guard_that_never_closes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    _check(_run([str(script)], cwd=tmp_path), "script.py:")


def test_code_on_the_command_line(tmp_path):
    _check(_run(["-c", SCRIPT], cwd=tmp_path), "<string>:")


def test_code_on_standard_input(tmp_path):
    _check(_run(["-"], text=SCRIPT, cwd=tmp_path), "<stdin>:")


CELLS = [
    "import torch\nimport fedproc as fp",
    "cluster = fp.Cluster(['alice', 'bob'])\nalice, bob = cluster",
    "class Point:\n    def __init__(self, x):\n        self.x = x",
    "class Mistake(Exception):\n    pass",
    "rate = 2\ndef scale(t):\n    return t * rate\np = bob.send(torch.tensor([1.0, 2.0]))",
    "print(bob.run(scale, p).get().tolist())",
    "rate = 3",
    "print(bob.run(scale, p).get().tolist(), bob.run(lambda t: t - rate, p).get().tolist())",
    "point = bob.run(Point, 3).get()\nprint(isinstance(point, Point), point.x)",
    "def scale(t):\n    raise Mistake('redefined')",
    "try:\n    bob.run(scale, p).get()\nexcept Mistake as error:\n"
    "    print(isinstance(error, fp.RemoteError), 'redefined' in str(error))",
    "print('bob' in repr(p), len(bob.objects))\np",
    "held = [p]\ncluster.close()",
]

DRIVER = """
import json, sys
import nbformat
from nbclient import NotebookClient

cells = [nbformat.v4.new_code_cell(text) for text in json.load(sys.stdin)]
book = nbformat.v4.new_notebook(cells=cells)
quiet = ["--IPKernelApp.log_level=40"]
NotebookClient(book, timeout=40, kernel_name="python3", extra_arguments=quiet).execute()
outputs = [output for cell in book.cells for output in cell.outputs]
print(json.dumps([[o.get("name", o.output_type), o.get("text", "")] for o in outputs]))
"""


def test_a_notebook(tmp_path):
    outputs = json.loads(_run(["-c", DRIVER], text=json.dumps(CELLS), cwd=tmp_path))
    texts = [text.strip() for name, text in outputs if name == "stdout"]
    assert texts == [
        "[2.0, 4.0]",
        "[3.0, 6.0] [-2.0, -1.0]",
        "True 3",
        "True True",
        "True 1",
    ]
    assert {name for name, _ in outputs} == {"stdout", "execute_result"}
