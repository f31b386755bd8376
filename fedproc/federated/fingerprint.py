"""Whether what workers were told is still what they would be told. Runs in the parent.

A trainer is sent once. A user may change what was sent: halve the rate in a callback, write to the
class weights of the loss. Workers that get their trainer later, or in the place of a lost one,
would then train otherwise than the others, and the result would depend on how many there are.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from fedproc.wire.codec import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

# Reading more than this in every round would cost more than it is worth.
_MOST_BYTES: Final = 1 << 20


def fingerprint(
    thing: object, registered: Callable[[], Mapping[Any, bytes] | None] = lambda: None
) -> bytes | None:
    """Hashes what of ``thing`` would travel now: numbers, tensors, code with its globals.

    Of tensors above 1 MiB only writes by torch are noticed, not those to ``tensor.data``.

    Args:
        thing: The object.
        registered: See :class:`fedproc.wire.codec.Encoder`.

    Returns:
        16 bytes; None if it cannot be pickled, which sending it tells better.
    """
    seen: list[bytes] = []

    def note(tensor: Tensor) -> int:
        facts = tensor.shape, tensor.dtype, tensor.requires_grad
        seen.append(repr((*facts, *_content(tensor))).encode())
        return len(seen)

    encoder = Encoder({Tensor: note, nn.Parameter: note}, registered=registered)
    try:
        body = encoder.encode(thing)
    except Exception:  # noqa: BLE001 - the round sends it, and raises with a cause
        return None
    return blake2b(b"".join([body, *encoder.definitions, *seen]), digest_size=16).digest()


def _content(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided or tensor.numel() * tensor.element_size() > _MOST_BYTES:
        return id(tensor), tensor._version
    with torch.no_grad():
        return (tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),)
