"""What clients keep, as JSON and named tensors: the part of a checkpoint that users decide.

Runs in the parent. Tensors, arrays, numbers, strings, None, lists and dicts come back exactly as
they were; anything else is refused, because only pickle could bring it back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedproc.errors import with_article

if TYPE_CHECKING:
    from collections.abc import Mapping

_PLAIN = (type(None), bool, int, str)


def encode(value: object, where: str, tensors: dict[str, Tensor]) -> Any:
    """Turns a value into data for JSON.

    Args:
        value: What to encode.
        where: Its place, for names of tensors and for errors.
        tensors: Receives the tensors of the value by name.

    Raises:
        TypeError: A value of another kind, or a dict whose keys are not strings or integers.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        # hexadecimal is exact for every float, and JSON has no name for NaN
        return {"float": value.hex() if math.isfinite(value) else repr(value)}
    if type(value) is complex:
        return {"complex": repr(value)}
    if isinstance(value, dict):
        return {
            "dict": [[_key(k, where), encode(v, f"{where}.{k}", tensors)] for k, v in value.items()]
        }
    if type(value) is list:
        return {"list": [encode(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _encode_array(value, where, tensors)
    raise TypeError(
        f"{where} is {with_article(type(value).__name__)}; only tensors, arrays, numbers, strings, "
        "None, lists and dicts can be saved"
    )


def decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Turns what :func:`encode` made back into the value.

    Raises:
        ValueError: No such data.
    """
    if type(data) in _PLAIN:
        return data
    ((kind, content),) = data.items()
    if kind == "float":
        return float.fromhex(content) if "0x" in content else float(content)
    if kind == "complex":
        return complex(content)
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    if kind == "list":
        return [decode(item, tensors) for item in content]
    return _decode_array(kind, content, tensors)


def _encode_array(
    value: Tensor | np.ndarray[Any, Any] | np.generic, where: str, tensors: dict[str, Tensor]
) -> Any:
    name = f"{len(tensors)}:{where}"
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise TypeError(f"{where} is a sparse or quantised tensor, which cannot be saved")
        raw = value.detach().cpu().contiguous()
        facts = [name, str(raw.dtype).removeprefix("torch."), list(raw.shape)]
        tensors[name] = raw.reshape(-1).view(torch.uint8)
        if isinstance(value, nn.Parameter):
            return {"parameter": [*facts, value.requires_grad]}
        return {"tensor": [*facts, value.requires_grad]}
    array = np.asarray(value)
    if array.dtype.hasobject or array.dtype.names is not None:
        raise TypeError(f"{where} is an array of {array.dtype}, which cannot be saved")
    tensors[name] = torch.frombuffer(bytearray(array.tobytes()) or bytearray(1), dtype=torch.uint8)[
        : array.nbytes
    ]
    kind = "array" if isinstance(value, np.ndarray) else "scalar"
    return {kind: [name, array.dtype.str, list(array.shape)]}


def _decode_array(kind: str, content: list[Any], tensors: Mapping[str, Tensor]) -> Any:
    raw = tensors[content[0]]
    if kind in ("array", "scalar"):
        array = np.frombuffer(raw.numpy().tobytes(), dtype=content[1]).reshape(content[2]).copy()
        return array if kind == "array" else array[()]
    tensor = raw.clone().view(getattr(torch, content[1])).reshape(content[2])
    if kind == "parameter":
        return nn.Parameter(tensor, requires_grad=content[3])
    if kind == "tensor":
        return tensor.requires_grad_(content[3])
    raise ValueError(f"unknown kind {kind!r}")


def _key(key: object, where: str) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[return-value]
    raise TypeError(f"{where} has the key {key!r}; only strings and integers can be saved as keys")
