"""What an arena gets from the system: a file without a name, mappings, and how much may be touched.

Runs in parent and workers. Without memfd (not Linux) the file lies, unlinked, in /dev/shm or the
temporary directory, and its pages are reserved before they are handed out: a write that finds a
tmpfs full would kill the process.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SCATTERED = "What is free lies in smaller pieces: free more, or raise memory_limit."
FULL_FILE = (
    "There is no memfd here, so it is a file in /dev/shm, which is full: enlarge that "
    "(`docker run --shm-size`), or free objects (drop their pointers)."
)
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_RESERVED_PART = 20  # one part in so many of all memory is left to others
_MFD_NOEXEC_SEAL = 0x8  # Linux 6.3; these have no names in Python's modules, or only in new ones
_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40


def create_file(name: str) -> tuple[int, int, bool]:
    """A writable and a read-only descriptor, and whether its pages must be reserved."""
    try:
        writable = _memfd(f"fedproc-{name}"[:60])  # the kernel takes 249 bytes
    except (AttributeError, OSError):  # not Linux, or forbidden in this sandbox
        folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
        writable, path = tempfile.mkstemp(prefix="fedproc-", dir=folder)
        try:
            readable = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            Path(path).unlink()
        return writable, readable, hasattr(os, "posix_fallocate")
    try:
        return writable, os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC), False
    except OSError:  # no /proc
        return writable, os.dup(writable), False


def _memfd(label: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(label, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(label, flags)


def seal(writable: int, shared: int) -> None:
    """Nobody can shrink or grow the file, and readers cannot write it.

    The read-only descriptor does the second. F_SEAL_FUTURE_WRITE would too, but under it the
    kernel refuses even the owner's MADV_REMOVE, so it is for a descriptor that can write only.
    """
    with suppress(AttributeError, OSError):
        fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        if fcntl.fcntl(shared, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)


def closer(owner: object, *fds: int) -> "weakref.finalize[..., object]":
    """Closes the descriptors once: when called, or when ``owner`` dies."""
    finalizer = weakref.finalize(owner, _close_all, fds)
    finalizer.atexit = False
    return finalizer


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


_mmap = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    use_errno=True,
)(("mmap", ctypes.CDLL(None)))


_madvise = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(
    ("madvise", ctypes.CDLL(None))
)


def map_private(fd: int, nbytes: int, offset: int) -> mmap.mmap:
    """Map a part of a file, copy on write, without the descriptor that ``mmap.mmap`` would keep.

    An anonymous mapping holds the place and unmaps it when it dies; the file is laid over it.
    """
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    place = mmap.mmap(-1, nbytes, flags | mmap.MAP_ANONYMOUS, _READ_WRITE)
    address = address_of(place)
    if _mmap(address, nbytes, _READ_WRITE, flags | _MAP_FIXED, fd, offset) != address:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map shared memory: {os.strerror(code)}")
    return place


def usable_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores or 1)


def prefer_large(address: int, nbytes: int) -> None:
    """Ask for huge pages where they are left to programs (``madvise``); a hint, never an error."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _madvise(start, address + nbytes - start, mmap.MADV_HUGEPAGE)


def size_text(nbytes: int) -> str:
    """The size as errors show it."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 2**20 else f"{nbytes:,} bytes"


def number_at(fd: int, offset: int) -> int:
    """The number of 8 bytes that another process keeps there; 0 if the file is shorter."""
    return int.from_bytes(os.pread(fd, 8, offset), sys.byteorder)


def address_of(mapping: mmap.mmap) -> int:
    """Where in this process's memory a mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def machine_room_bytes() -> int:
    """Bytes this process may still touch: of the machine's memory and of its cgroups' limits."""
    memory = psutil.virtual_memory()
    room = memory.available - memory.total // _RESERVED_PART
    return min((room, *_cgroup_rooms(memory.total)))


def oom_kills(counters: Path = Path("/proc/vmstat")) -> int | None:
    """How many processes the kernel has killed for lack of memory since the machine started.

    Those killed by the limit of a control group are among them. None where it does not tell.
    """
    with suppress(OSError, ValueError):
        for line in counters.read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _cgroup_rooms(
    most_bytes: int,
    membership: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
) -> Iterator[int]:
    """Bytes left in each cgroup (version 1 or 2) of this process with a limit below ``most``."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # not mounted here, or "max"
                limit = int((folder / names[0]).read_text())
                if limit < most_bytes:  # version 1 writes no limit as 2**63 less a page
                    used = int((folder / names[1]).read_text())
                    stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                    yield limit - limit // _RESERVED_PART - used + int(stat.get(names[2], 0))
            if folder == top:
                break
