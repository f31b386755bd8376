"""Copying many bytes quickly, and new memory for them. Runs in parent and workers."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from fedproc.memory import helpers, pages
from fedproc.memory.spares import SPARES
from fedproc.memory.undisturbed import undisturbed

try:
    from fedproc.memory import _copy
except ImportError:  # not built
    _copy = None  # type: ignore[assignment]

COMPILED: Final = _copy is not None
"""Whether this installation has the copy past the caches."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SIDE_BY_SIDE_BYTES = 4 << 20
"""From here on a copy is worth threads, and new memory large pages."""
COPIERS = min(4, pages.usable_cores())
PIECE_BYTES = 2 << 20
"""Copied by one thread at a time: whoever begins first does more of them."""
PAST_CACHES_BYTES = 32 << 20
"""What is longer would not stay in the caches: it is written past them, where that was compiled."""


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes (uint8, 1-d, contiguous, as many, apart), side by side when they are many.

    One thread gets about half of a machine's bandwidth. Where torch has threads they do it: they
    are awake for milliseconds after whatever they did before, and keep others from these cores.
    """
    threads, is_long = torch.get_num_threads(), COMPILED and len(source) >= PAST_CACHES_BYTES
    if threads > 1 and is_long and _copy.HAS_THREADS:
        _past_caches(target, source, threads)
    elif threads > 1 or len(source) < SIDE_BY_SIDE_BYTES:
        target.copy_(source)
    else:
        work = _past_caches if is_long else torch.Tensor.copy_
        pieces = zip(
            torch.split(target, PIECE_BYTES), torch.split(source, PIECE_BYTES), strict=True
        )
        side_by_side(work, list(pieces), COPIERS)


def _past_caches(target: torch.Tensor, source: torch.Tensor, threads: int = 1) -> None:
    _copy.copy(target.data_ptr(), source.data_ptr(), len(source), threads)


def side_by_side(
    work: Callable[..., object], each: Sequence[tuple[Any, ...]], threads: int
) -> None:
    """Call ``work(*arguments)`` for each of some arguments, in this thread and some others.

    They are dealt out in order, to whichever thread is ready. After Ctrl-C no more are dealt out,
    and no thread is still at work when it is raised: whoever catches it may use the memory again.

    Raises:
        Exception: the first error, once all were called.
    """
    inference = torch.is_inference_mode_enabled()  # of this thread; others would start without
    errors: list[BaseException] = []
    left = iter(each)

    def run() -> None:
        with torch.inference_mode(inference):
            for arguments in left:
                try:
                    work(*arguments)
                except BaseException as error:  # noqa: BLE001 - raised in the caller
                    errors.append(error)

    helping: list[helpers.Helper] = []
    try:
        with undisturbed(), contextlib.suppress(RuntimeError):  # no thread to be had
            for _ in range(min(threads, len(each)) - 1):
                helping.append(helpers.take())
                helping[-1].start(run)
        run()
    finally:
        with undisturbed():
            for _ in left:  # none, but after Ctrl-C
                pass
            for helper in helping:
                helper.wait()
            helpers.give_back(helping)
    if errors:
        raise errors[0]


def fresh(nbytes: int) -> torch.Tensor:
    """Private memory nobody else holds (uint8, 1-d, uninitialised), used before where it is large.

    The kernel clears new memory page by page, which costs far more than the copy into it.
    """
    if nbytes >= SIDE_BY_SIDE_BYTES:
        return SPARES.take(nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")  # whatever the user's default is


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same elements, bit by bit; NaN is NaN. Of sparse ones values."""
    if one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout is not torch.strided or one.is_quantized:
        return torch.equal(one.to_dense(), other.to_dense())
    word = _WORDS.get(one.element_size(), torch.int64)  # by bytes it takes five times as long
    flat = (t.detach().contiguous().reshape(-1).view(word) for t in (one, other))
    return torch.equal(*flat)
