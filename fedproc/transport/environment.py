"""What the environment of a new interpreter for workers says, in time for the libraries it loads.

A worker then takes over the environment of the parent (``worker.main``), so what it executes itself
sees nothing of this.
"""

import ctypes
import importlib.util
import os

_SETTINGS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",  # large pages for large tensors: clearing small ones is slow
}
"""Set before torch is loaded: waiting threads sleep (spinning ones made 8 workers on 2 cores 13
times slower), and BLAS starts no thread at import."""


def environment() -> dict[str, str]:
    """The parent's environment with what workers need besides."""
    settings = {**os.environ, **_SETTINGS}
    # Who preloads a library of their own (an allocator, a sanitizer) has chosen, also by "".
    if "LD_PRELOAD" not in settings and (library := _aligned()) is not None:
        settings["LD_PRELOAD"] = library
    return settings


def _aligned() -> str | None:
    """Path of what keeps aligned chunks; None where it was not built or cannot be used."""
    spec = importlib.util.find_spec("fedproc.worker._aligned")
    path = None if spec is None else spec.origin
    # the loader of libraries splits the list at two of them, puts names for the third, and knows no
    # way to quote them
    if path is None or any(special in path for special in " :$") or not _allocates_by_libc():
        return None
    return path


def _allocates_by_libc() -> bool:
    """Whether memory of this interpreter is libc's own, and not of an allocator linked to it."""
    try:
        return all(_address(name) == _address(f"__libc_{name}") for name in ("malloc", "free"))
    except ValueError:  # a libc that has no such names
        return False


def _address(symbol: str) -> int:
    return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(None), symbol))
