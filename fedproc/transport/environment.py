"""What the environment of a new interpreter for workers says, in time for the libraries it loads.

A worker then takes over the environment of the parent (``worker.main``), so what it executes itself
sees nothing of this.
"""

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
    library = _aligned()
    if library is not None:
        # Who preloads a library of their own (an allocator, a sanitizer) has chosen, also by "".
        settings.setdefault("LD_PRELOAD", library)
    return settings


def _aligned() -> str | None:
    """Path of what keeps aligned chunks; None where it was not built or cannot be named."""
    spec = importlib.util.find_spec("fedproc.worker._aligned")
    path = None if spec is None else spec.origin
    # the loader of libraries splits the list at both and knows no way to quote them
    return None if path is None or " " in path or ":" in path else path
