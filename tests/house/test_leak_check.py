"""The check that wraps every test does find what a test leaves behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAKY = """
import os, subprocess, sys, threading, time
from pathlib import Path

import tests.conftest

tests.conftest.DEADLINE_S = 0.6
kept = []

def test_process():
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

def test_orphan():
    child = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", child], check=True)

def test_thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True, name="sleeper").start()

def test_descriptor():
    kept.append(os.pipe())

def test_mapping():
    import mmap
    descriptor = os.memfd_create("fedproc-left")
    os.ftruncate(descriptor, 4096)
    kept.append(mmap.mmap(descriptor, 4096))
    os.close(descriptor)

def test_shared_file():
    Path(f"/dev/shm/fedproc-left-{os.getpid()}").touch()

def test_late_release_is_fine():
    threading.Thread(target=time.sleep, args=(0.3,)).start()

def test_cycle_is_fine():
    class Cycle: pass
    cycle = Cycle()
    cycle.me, cycle.descriptor = cycle, open(os.devnull)

def test_failure_is_reported_once():
    kept.append(os.pipe())
    assert False
"""
FOUND = {
    "test_process": "- process: ",
    "test_orphan": "- process: ",
    "test_thread": "- thread: sleeper",
    "test_descriptor": "- descriptor: pipe:",
    "test_mapping": "- mapping: /memfd:fedproc-left",
    "test_shared_file": "- shared memory: /dev/shm/fedproc-left",
}


@pytest.mark.slow
def test_leaks_are_found_and_named(tmp_path):
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-p", "no:cacheprovider"]
    quiet = ["-W", "ignore::pytest.PytestUnraisableExceptionWarning"]
    command = [sys.executable, "-m", "pytest", *options, *quiet, str(tmp_path)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    finally:
        for path in Path("/dev/shm").glob("fedproc-left-*"):
            path.unlink()
    sections = done.stdout.split("ERROR at teardown of ")[1:]
    reported = {section.split()[0]: section for section in sections}
    assert sorted(reported) == sorted(FOUND), done.stdout + done.stderr
    assert all(FOUND[name] in reported[name] for name in FOUND)
    assert "1 failed, 8 passed, 6 errors" in done.stdout
