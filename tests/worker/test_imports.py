"""The boundary: what a worker process has imported, and how it was started."""

import os
import subprocess
import sys

import fedproc as fp


def _modules():
    import sys

    return [name for name in sys.modules if name.startswith("fedproc")]


def test_a_worker_imports_nothing_of_the_parents_side():
    with fp.Cluster(["bob"]) as cluster:
        loaded = cluster["bob"].run(_modules).get()
    parents = ("fedproc.remote", "fedproc.cluster", "fedproc.federated")
    assert [name for name in loaded if name.startswith(parents)] == []
    assert "fedproc.worker.loop" in loaded


def _output(code: str, **environment: str) -> str:
    """What a new interpreter prints; it must not complain."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_workers_can_be_executed_instead_of_forked():
    code = (
        "import fedproc as fp, torch\n"
        "with fp.Cluster(['bob']) as c:\n"
        "    p = c['bob'].send(torch.ones(3))\n"
        "    print((p + 1).get().tolist(), c['bob'].run(lambda: 5).get())\n"
    )
    assert _output(code, FEDPROC_START="exec") == "[2.0, 2.0, 2.0] 5\n"


def test_torch_is_imported_here_while_the_zygote_imports_it():
    code = (
        "import sys, fedproc as fp\n"
        "from fedproc.transport.zygote import Zygote\n"
        "launch = Zygote._launch\n"
        "def told(zygote):\n"
        "    launch(zygote)\n"
        "    print('torch' in sys.modules)\n"
        "Zygote._launch = told\n"
        "with fp.Cluster(['bob']) as c:\n"
        "    print('torch' in sys.modules, c['bob'].run(lambda: 5).get())\n"
    )
    assert _output(code) == "False\nTrue 5\n"


def test_sync_raises_where_the_call_was_made():
    code = (
        "import fedproc as fp\n"
        "with fp.Cluster(['bob']) as c:\n"
        "    try:\n"
        "        c['bob'].run(lambda: 1 / 0)\n"
        "    except ZeroDivisionError:\n"
        "        print('here')\n"
    )
    assert _output(code, FEDPROC_SYNC="1") == "here\n"
