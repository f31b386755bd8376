"""Aligned memory in front of libc: chunks come again, never twice at once, and only in workers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import fedproc as fp
from fedproc.transport.environment import environment

SPEC = importlib.util.find_spec("fedproc.worker._aligned")
LIBRARY = "" if SPEC is None else str(SPEC.origin)
needs_it = pytest.mark.skipif(SPEC is None, reason="built without a C compiler, or not for glibc")
can_be_named = pytest.mark.skipif(
    any(special in LIBRARY for special in " :$"),
    reason="LD_PRELOAD cannot name where fedproc is installed",
)
no_choice = pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="somebody chose a library")

START = """
import ctypes, errno, os, random, threading
from concurrent.futures import ThreadPoolExecutor

libc = ctypes.CDLL(None, use_errno=True)
for name in ("malloc", "calloc", "realloc"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc_usable_size.restype = ctypes.c_size_t

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefg"] + [
        ("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)
    ]

libc.mallinfo2.restype = Info

def used():
    return libc.mallinfo2().uordblks

def pointer(at):
    return ctypes.c_void_p(at)

def ask(alignment, size):
    chunk = ctypes.c_void_p(77)
    status = libc.posix_memalign(
        ctypes.byref(chunk), ctypes.c_size_t(alignment), ctypes.c_size_t(size)
    )
    return status, chunk.value

def aligned(size):
    status, chunk = ask(64, size)
    assert status == 0 and chunk % 64 == 0
    return chunk

def free(chunk):
    libc.free(pointer(chunk))

def bytes_of(chunk):
    return libc.malloc_usable_size(pointer(chunk)) + 8

def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):  # its destructors may still run
        os.sched_yield()
"""


def _output(code: str, **variables: str) -> str:
    """What a new interpreter prints; it must not complain."""
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def _with_it(code: str) -> str:
    return _output(START + code, LD_PRELOAD=LIBRARY).strip()


# ---------------------------------------------------------------- what callers get


@needs_it
@pytest.mark.parametrize("size", [9, 24, 100, 1000, 4096, 50_000, 65_536])
def test_what_is_freed_is_handed_out_again_and_to_nobody_else(size: int) -> None:
    # what libc had been given back, malloc would take
    code = f"""
first = [aligned({size}) for _ in range(20)]
for chunk in first:
    free(chunk)
others = [libc.malloc({size}) for _ in range(20)]
again = [aligned({size}) for _ in range(20)]
print(sorted(again) == sorted(first), set(others) & set(first))
free(first[5])
print(aligned({size}) == first[5])
"""
    assert _with_it(code) == "True set()\nTrue"


@needs_it
def test_every_result_is_aligned_and_as_large_as_asked() -> None:
    code = """
live = set()
for turn in range(3):
    for power in range(3, 17):
        for size in (0, 1, 8, 9, 24, 25, 63, 64, 65, 1000, 65_535, 65_592, 65_593, 200_000):
            status, chunk = ask(2**power, size)
            assert status == 0 and chunk % 2**power == 0 and chunk not in live
            assert bytes_of(chunk) - 8 >= size
            ctypes.memset(chunk, 0xFF, size)
            live.add(chunk)
    for chunk in live:
        free(chunk)
    live.clear()
print("good")
"""
    assert _with_it(code) == "good"


@needs_it
@pytest.mark.parametrize("seed", range(4))
def test_live_chunks_are_apart_and_keep_their_contents(seed: int) -> None:
    code = f"""
random.seed({seed})
threads = [ThreadPoolExecutor(1) for _ in range(3)]
live = {{}}

def somewhere(function, *arguments):
    return random.choice(threads).submit(function, *arguments).result()

def word(fill, size):
    return bytes([fill]) * size

def add(chunk, size):
    fill = random.randrange(256)
    assert chunk and chunk not in live
    ctypes.memset(chunk, fill, size)
    live[chunk] = (size, fill)

def take():
    chunk = random.choice(list(live))
    size, fill = live.pop(chunk)
    assert ctypes.string_at(chunk, size) == word(fill, size)
    return chunk, size, fill

sizes = (0, 1, 24, 56, 100, 120, 1000, 2040, 65_536, 65_600)
for step in range(4000):
    kind = random.randrange(8)
    size = random.choice(sizes) or random.randrange(3000)
    if kind < 3:
        add(somewhere(aligned, size), size)
    elif kind == 3:
        add(somewhere(libc.malloc, size), size)
    elif kind == 4:
        chunk = somewhere(libc.calloc, 1, size)
        assert ctypes.string_at(chunk, size) == word(0, size)
        add(chunk, size)
    elif live and kind == 5:
        chunk, old, fill = take()
        least = min(old, size)
        chunk = somewhere(libc.realloc, pointer(chunk), size + 1)
        assert ctypes.string_at(chunk, least) == word(fill, least)
        add(chunk, size + 1)
    elif live:
        somewhere(free, take()[0])
    if len(live) > 150:
        for _ in range(100):
            somewhere(free, take()[0])
    if step % 100 == 0:
        end = 0
        for chunk in sorted(live):
            assert chunk >= end
            end = chunk + live[chunk][0]
while live:
    free(take()[0])
print("good")
"""
    assert _with_it(code) == "good"


@needs_it
def test_an_alignment_that_is_none_changes_nothing() -> None:
    code = """
ctypes.set_errno(5)
wrong = (0, 1, 2, 3, 4, 7, 12, 24, 48, 63, 65, 96, 2**63 + 64, 2**64 - 1)
print({ask(alignment, 64) for alignment in wrong} == {(errno.EINVAL, 77)}, ctypes.get_errno())
"""
    assert _with_it(code) == "True 5"


@needs_it
def test_what_cannot_be_had_changes_nothing() -> None:
    code = """
ctypes.set_errno(5)
sizes = (2**62, 2**63 - 1, 2**64 - 64, 2**64 - 1)
print({ask(alignment, size) for alignment in (8, 64, 4096) for size in sizes}, ctypes.get_errno())
"""
    assert _with_it(code) == "{(12, 77)} 5"


@needs_it
def test_nothing_is_a_size_too_and_nothing_can_be_freed() -> None:
    code = """
ctypes.set_errno(5)
chunks = [aligned(0) for _ in range(100)]
for chunk in chunks:
    free(chunk)
libc.free(None)
print(len(set(chunks)), ctypes.get_errno())
"""
    assert _with_it(code) == "100 5"


# ---------------------------------------------------------------- what is kept


@needs_it
def test_a_thread_keeps_4_mib_at_most() -> None:
    code = """
count = 1024
chunks = [aligned(65_536) for _ in range(count)]
sizes = [bytes_of(chunk) for chunk in chunks]
most, live, before = 0, sum(sizes), used()
given_out = before - live
for i in range(count):
    free(chunks[i])
    live -= sizes[i]
    most = max(most, used() - given_out - live)
print(most)
"""
    # the interpreter's own memory changes a little
    most = int(_with_it(code))
    assert 4 * 2**20 - 2 * 65_600 < most < 4 * 2**20 + 16_384


@needs_it
def test_chunks_that_malloc_gave_are_not_kept_from_it() -> None:
    code = """
free(aligned(64))  # this thread keeps some
before = used()
for size in (120, 1016, 4088):
    for _ in range(1000):
        chunk = libc.malloc(ctypes.c_size_t(size))
        free(chunk)
print(used() - before)
"""
    assert int(_with_it(code)) < 8192


@needs_it
def test_what_a_thread_keeps_no_other_thread_is_given() -> None:
    code = """
chunk = aligned(3000)
free(chunk)
others = []
in_a_thread(lambda: others.extend(aligned(3000) for _ in range(50)))
print(chunk in others, aligned(3000) == chunk)
"""
    assert _with_it(code) == "False True"


@needs_it
def test_large_chunks_are_given_back_at_once() -> None:
    code = """
free(aligned(64))
before = used()
chunk = aligned(66_000)
size = used() - before
free(chunk)
print(size > 66_000, used() - before < 1000)
"""
    assert _with_it(code) == "True True"


THREADS = """
def use():
    chunks = [aligned(4096) for _ in range(10)]
    for chunk in chunks:
        free(chunk)
    at_end()

for _ in range(20):
    in_a_thread(use)
before = used()
for _ in range(200):
    in_a_thread(use)
print(used() - before < 20_000)  # less than one thread has kept
"""


@needs_it
def test_a_thread_that_ends_gives_back_what_it_kept() -> None:
    assert _with_it("def at_end(): pass\n" + THREADS) == "True"


@needs_it
def test_what_is_freed_after_a_thread_has_given_back_is_not_kept() -> None:
    code = """
key = ctypes.c_uint()
destructor = ctypes.cast(libc.free, ctypes.c_void_p)
assert libc.pthread_key_create(ctypes.byref(key), destructor) == 0

def at_end():
    assert libc.pthread_setspecific(key, pointer(aligned(20_000))) == 0
"""
    assert _with_it(code + THREADS) == "True"


@needs_it
def test_a_forked_process_goes_on_with_what_its_thread_kept() -> None:
    code = """
stop = threading.Event()

def work():
    while not stop.is_set():
        free(aligned(random.randrange(5000)))

def fork():
    kept, held = aligned(3000), aligned(3000)
    ctypes.memset(held, 1, 3000)
    free(kept)
    pid = os.fork()
    if pid == 0:
        good = aligned(3000) == kept and ctypes.string_at(held, 3000) == bytes([1]) * 3000
        for chunk in [kept, held, *(aligned(size) for size in range(5000))]:
            free(chunk)
        os._exit(0 if good else 1)
    results.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

results = []
thread = threading.Thread(target=work)
thread.start()
fork()
in_a_thread(fork)
stop.set()
thread.join()
print(results)
"""
    assert _with_it(code) == "[0, 0]"


# ---------------------------------------------------------------- who has it


def _mapped() -> set[str]:
    """Which of two libraries the calling process has in front of libc."""
    maps = Path("/proc/self/maps").read_text()
    return {name for name in ("_aligned", "theirs") if f"/{name}." in maps}


def _executed() -> str:
    code = "print('_aligned' in open('/proc/self/maps').read())"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


@needs_it
@can_be_named
@no_choice
@pytest.mark.parametrize("start", ["fork", "exec"])
def test_workers_have_it_but_neither_the_parent_nor_what_they_execute(monkeypatch, start) -> None:
    monkeypatch.setenv("FEDPROC_START", start)
    with fp.Cluster(1) as cluster:
        bob = cluster.workers[0]
        assert bob.run(_mapped).get() == {"_aligned"}
        assert bob.run(os.environ.get, "LD_PRELOAD").get() is None
        assert bob.run(_executed).get() == "False"
    assert _mapped() == set()


WHO = """
import os
import fedproc as fp

def mapped():
    maps = open("/proc/self/maps").read()
    return [name for name in ("_aligned", "theirs") if f"/{name}." in maps]

with fp.Cluster(1) as cluster:
    bob = cluster.workers[0]
    print(mapped(), bob.run(mapped).get(), repr(bob.run(os.environ.get, "LD_PRELOAD").get()))
"""


@needs_it
def test_the_library_of_a_user_is_loaded_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.so"
    shutil.copy(LIBRARY, theirs)
    assert _output(WHO, LD_PRELOAD=str(theirs)) == f"['theirs'] ['theirs'] {str(theirs)!r}\n"


@needs_it
def test_an_empty_list_of_a_user_switches_it_off() -> None:
    assert _output(WHO, LD_PRELOAD="") == "[] [] ''\n"


def _built_at(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = None if path is None else ModuleSpec("_aligned", None, origin=path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/lib/_aligned.so", "/usr/lib/_aligned.so"),
        ("/home/a user/_aligned.so", None),
        ("/mnt/c:/_aligned.so", None),
        ("/home/$LIB/_aligned.so", None),
        (None, None),
    ],
)
def test_only_a_path_that_can_be_named_is(monkeypatch, path, expected) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    _built_at(path, monkeypatch)
    assert environment().get("LD_PRELOAD") == expected


@pytest.mark.parametrize("name", ["malloc", "free"])
def test_it_does_not_come_in_front_of_another_allocator(monkeypatch, name: str) -> None:
    _built_at("/usr/lib/_aligned.so", monkeypatch)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr("fedproc.transport.environment._address", {name: 1}.get)
    assert "LD_PRELOAD" not in environment()


@needs_it
@can_be_named
@no_choice
@pytest.mark.parametrize("start", ["fork", "exec"])
def test_a_preloaded_module_does_not_pass_it_on(monkeypatch, tmp_path: Path, start: str) -> None:
    code = """
import os, subprocess, sys
look = [sys.executable, "-c", "print('_aligned' in open('/proc/self/maps').read())"]
SEEN = os.environ.get("LD_PRELOAD"), subprocess.check_output(look, text=True)
"""
    (tmp_path / "looks_around.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FEDPROC_START", start)
    with fp.Cluster(1, preload=["looks_around"]) as cluster:
        assert cluster.workers[0].run(_seen).get() == (None, "False\n")


def _seen() -> object:
    return sys.modules["looks_around"].SEEN


@pytest.mark.parametrize("theirs", ["", "/usr/lib/theirs.so"])
def test_what_a_user_has_chosen_stays(monkeypatch, theirs: str) -> None:
    monkeypatch.setenv("LD_PRELOAD", theirs)
    _built_at("/usr/lib/_aligned.so", monkeypatch)
    assert environment()["LD_PRELOAD"] == theirs
