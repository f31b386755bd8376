"""Operations that may give a tensor another size. Runs in the worker.

A tensor in the arena has a storage of fixed size. torch sets the new shape before it finds that the
storage cannot grow, and leaves a tensor that reaches past its block. So a tensor that is to be
resized gets a storage of its own first, and after any failure the old shapes are put back.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch

from fedproc.worker.host import Host

_NO_ROOM: Final = "Trying to resize storage that is not resizable"
_REMEDY: Final = (
    "A tensor that was sent or moved keeps its size in its worker: resize a copy of it "
    "(pointer.copy()), or let out= have the shape of the result."
)


@contextlib.contextmanager
def reshaping(host: Host, name: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Run an operation that may write into the tensors the host has noted as used."""
    tensors = [e.value for e in host.used if isinstance(e.value, torch.Tensor)]
    if name.startswith("Tensor.resize"):
        _free_storage(tensors[0])
    out = kwargs.get("out")
    for target in out if isinstance(out, (tuple, list)) else [out]:
        if isinstance(target, torch.Tensor) and target.numel() == 0:
            _free_storage(target)
    shapes = [(t, t.size(), t.stride(), t.storage_offset()) for t in tensors if _is_plain(t)]
    try:
        yield
    except BaseException as error:
        for tensor, size, stride, offset in shapes:
            if tensor.size() != size and _reach(tensor) > tensor.untyped_storage().nbytes():
                with torch.no_grad():
                    tensor.set_(tensor.untyped_storage(), offset, size, stride)
        if type(error) is RuntimeError and error.args == (_NO_ROOM,):
            error.args = (f"{_NO_ROOM}. {_REMEDY}",)
        raise


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _free_storage(tensor: torch.Tensor) -> None:
    """Out of the arena, into a storage that can grow."""
    if _is_plain(tensor) and not tensor.untyped_storage().resizable():
        tensor.data = tensor.detach().clone()


def _reach(tensor: torch.Tensor) -> int:
    """Bytes of its storage that the tensor uses, counted from the start."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((size - 1) * step for size, step in steps)
    return (last + 1) * tensor.element_size()
