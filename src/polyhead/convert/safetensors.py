"""Safetensors files, read and written one tensor at a time: a checkpoint need not fit in memory.

    8 bytes: n, the length of the header     n bytes: JSON, for every tensor its dtype, shape and
    offsets     the rest: the tensors' bytes, contiguous

Source: the format's specification, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from polyhead.errors import ConversionError, DependencyError, ModelError, install_command

__all__ = ["Reader", "TensorFile", "opened"]

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Reader = Callable[[str], Tensor]


@contextmanager
def opened(paths: list[Path]) -> Iterator[tuple[dict[str, Tensor], Reader, dict[str, str]]]:
    """Open safetensors files as one checkpoint.

    Yields:
        Every tensor by name, on the meta device; a reader of one tensor; and the metadata of the
        first file.

    Raises:
        ModelError: a file cannot be read, or two files have the same name.
        DependencyError: safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise DependencyError(
            f"reading safetensors needs safetensors: {install_command('hf')}"
        ) from error
    with ExitStack() as stack:
        file_of: dict[str, Any] = {}
        shapes: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except Exception as error:  # a file cut short raises SafetensorError, a plain Exception
                raise ModelError(
                    f"{path} cannot be read as safetensors ({error}); get the file again"
                ) from error
            metadata = metadata or dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in file_of:
                    raise ModelError(f"{path} holds {name}, as another file does; keep one")
                file_of[name] = file
                shapes[name] = _without_numbers(path, name, file.get_slice(name))
        yield shapes, lambda name: file_of[name].get_tensor(name), metadata


class TensorFile:
    """Writer of a safetensors file, with tensors in any order.

    Args:
        file: open for writing in binary.
        tensors: every tensor that will be written, by name; only dtypes and shapes are read.
        metadata: of the file.
    """

    def __init__(
        self, file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        self._file = file
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        # Wide dtypes first, so that every tensor is aligned to its element size.
        order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            tensor = tensors[name]
            begin, end = end, end + math.prod(tensor.shape) * tensor.element_size()
            self._offsets[name] = begin, end
            header[name] = {
                "dtype": _code(name, tensor.dtype),
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._start = 8 + len(text)
        self.size = end

    def write(self, name: str, tensor: Tensor) -> int:
        """Write a tensor at its offset and return the number of bytes."""
        begin, end = self._offsets.pop(name)
        self._file.seek(self._start + begin)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if end > begin:
            self._file.write(flat.view(torch.uint8).numpy().data)
        return end - begin


def _without_numbers(path: Path, name: str, described: Any) -> Tensor:
    code = described.get_dtype()
    if code not in _DTYPES:
        raise ModelError(
            f"{path}: {name} must be of a dtype that torch has, one of {', '.join(_DTYPES)}; got "
            f"{code}; dequantize the model first, and save that one"
        )
    return torch.empty(described.get_shape(), dtype=_DTYPES[code], device="meta")


def _code(name: str, dtype: torch.dtype) -> str:
    if dtype not in _CODES:
        raise ConversionError(
            f"{name} must be of a dtype that safetensors has, one of {', '.join(_CODES.values())}; "
            f"got {dtype}; write a .pt file"
        )
    return _CODES[dtype]
