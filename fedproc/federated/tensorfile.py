"""One file of named tensors and a JSON document, in the layout of safetensors.

Runs in the parent. Eight bytes with the length of the header, the header (JSON: dtype, shape and
place of every tensor), then the raw little-endian bytes. There is no pickle in it, so loading a
file runs no code. A checksum covers the document, the index and the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from fedproc.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH: Final = struct.Struct("<Q")
_MAGIC: Final = "fedproc-1"


def write(
    path: str | os.PathLike[str], document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file; it appears as a whole or not at all, also after a crash.

    Args:
        path: The file; an older one of that name is replaced. A link to it stays a link.
        document: Anything JSON can hold.
        tensors: Name -> dense CPU tensor of a dtype that safetensors knows.

    Raises:
        TypeError: A dtype without a name in the format.
        OSError: The file cannot be written; an older one is still there, and so is what is no
            regular file: a folder, pipe or device.
    """
    target = _target(path)
    flat = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    index = _index(flat)
    text = json.dumps(document)
    metadata = {"format": _MAGIC, "document": text, "checksum": ""}
    metadata["checksum"] = _checksum(text, index, (_bytes(tensor) for tensor in flat.values()))
    header = json.dumps({"__metadata__": metadata, **index}).encode()
    header += b" " * (-len(header) % 8)
    # One name for the unfinished file: what a kill leaves behind is overwritten by the next save.
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_LENGTH.pack(len(header)))
            file.write(header)
            for tensor in flat.values():
                file.write(_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    _sync_directory(target.parent)


def _target(path: str | os.PathLike[str]) -> Path:
    """Returns where the file is to be, behind all links."""
    target = Path(os.path.realpath(path))
    folder = target.parent
    if not folder.exists():
        why = "the folder to save in does not exist; create it first"
        raise FileNotFoundError(errno.ENOENT, why, str(folder))
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "a file, and no folder to save in", str(folder))
    if target.is_dir():
        why = "a folder, and no file to save to; name a file in it"
        raise IsADirectoryError(errno.EISDIR, why, str(path))
    if target.is_symlink() or (target.exists() and not target.is_file()):
        # a file in its place would cut off whoever reads from it
        why = "no regular file but a pipe, a device or the like; name another file"
        raise shutil.SpecialFileError(errno.EINVAL, why, str(path))
    return target


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a file back.

    Returns:
        The document, and the tensors by name.

    Raises:
        CheckpointError: The file is truncated, altered, or of another kind.
        OSError: The file cannot be read.
    """
    raw = Path(path).read_bytes()
    try:
        (length,) = _LENGTH.unpack_from(raw)
        header = json.loads(raw[_LENGTH.size : _LENGTH.size + length].decode())
        metadata = header.pop("__metadata__")
        if metadata["format"] != _MAGIC:
            raise CheckpointError(f"{path} is not a checkpoint of this version of fedproc")
        data = memoryview(raw)[_LENGTH.size + length :]
        if metadata["checksum"] != _checksum(metadata["document"], header, [data]):
            raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
        tensors = {name: _tensor(entry, data) for name, entry in header.items()}
        return json.loads(metadata["document"]), tensors
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint of fedproc: {error}"
        ) from error


def _index(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    index, end = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} of {tensor.dtype} cannot be saved")
        start, end = end, end + tensor.numel() * tensor.itemsize
        index[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return index


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.reshape(-1)
    # memoryview cannot cast what has no elements
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _tensor(entry: Mapping[str, Any], data: memoryview) -> Tensor:
    start, stop = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    if start == stop:
        return torch.empty(entry["shape"], dtype=dtype, device="cpu")
    # a bytearray of its own: torch may write to it, and it is aligned for every dtype
    return torch.frombuffer(bytearray(data[start:stop]), dtype=dtype).reshape(entry["shape"])


def _checksum(document: str, index: Mapping[str, Any], parts: Iterable[memoryview]) -> str:
    digest = blake2b(document.encode(), digest_size=32)
    digest.update(json.dumps(index).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    """Makes the new name survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
