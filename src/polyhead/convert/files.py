"""Checkpoint file conversion: attention in another layout, one layer at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from polyhead.convert import safetensors
from polyhead.convert.layout import Sizes
from polyhead.convert.state_dict import Move, add, check_masks, dropped, plan, source_of
from polyhead.errors import ArgumentError, ModelError

__all__ = ["FileReport", "convert_file"]

# Checkpoints in a folder, the first one found: one file, or shards listed by their index.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = tuple(f"{name}.index.json" for name in _WHOLE)
_PICKLED = {".pt", ".pth", ".bin", ".ckpt"}
_WRITTEN = (".safetensors", ".pt", ".pth", ".bin")
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.\w+")


@dataclass(frozen=True)
class FileReport:
    """Summary of a file conversion.

    Attributes:
        source: the layout of the input.
        layers: number of attention layers that were converted.
        unchanged: number of tensors that were copied unchanged.
        bytes: size of the output.
        dropped: names of buffers that are left out, as newer code computes them.
    """

    source: str
    layers: int
    unchanged: int
    bytes: int
    dropped: tuple[str, ...] = ()


@torch.no_grad()
def convert_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    source: str | None = None,
    target: str,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    nope_head_dim: int | None = None,
    value_head_dim: int | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str, float], None] = lambda step, done: None,
) -> FileReport:
    """Write a checkpoint with its attention in another layout: `state_dict` for files.

    It is written next to `output` under another name and renamed when complete, so that an error
    or an interruption keeps the old file. Safetensors are read and written layer by layer.

    Args:
        path: a .safetensors file; a .pt, .pth, .bin or .ckpt file of tensors by name (read without
            running code); or a folder with model.safetensors or pytorch_model.bin, or with their
            shards and index.
        output: a .safetensors file, or a .pt, .pth or .bin file.
        source: as in `state_dict`; None: by the family that the config names.
        target, num_heads, num_kv_heads, nope_head_dim, value_head_dim: as in `state_dict`.
        config: the model's; None: config.json in the folder or next to the file, if it exists.
        overwrite: True to replace an existing output.
        progress: called with a line and the fraction done, before a tensor or layer is written.

    Raises:
        ArgumentError: the output exists, its folder does not, or its suffix is not supported.
        ModelError: the checkpoint cannot be read.
        ConversionError: as in `state_dict`.
        DependencyError: safetensors is not installed.
    """
    path, output = Path(path), Path(output)
    _check_output(output, overwrite)
    sizes = Sizes(num_heads, num_kv_heads, nope_head_dim, value_head_dim)
    with _checkpoint(path) as (shapes, read, metadata):
        config = _config_of(path) if config is None else config
        source = source_of(shapes, config) if source is None else source
        moves = plan(shapes, source, target, sizes, config)
        check_masks(moves, read)
        # A dry run on the meta device: nothing is written if a layer does not fit.
        outputs: dict[str, Tensor] = {}
        out = dropped(shapes, moves)
        moving = out.union(*(move.inputs for move in moves))
        unchanged = [name for name in shapes if name not in moving]
        add(outputs, {name: shapes[name] for name in unchanged})
        for move in moves:
            add(outputs, move.outputs(shapes))
        pieces = _pieces(moves, unchanged, read)
        with _replacing(output, overwrite) as file:
            if output.suffix in _PICKLED:
                done: dict[str, Tensor] = {}
                for step, piece in pieces:
                    progress(step, len(done) / len(outputs))
                    done |= piece
                torch.save({name: done[name] for name in outputs}, file)
            else:
                tensor_file = safetensors.TensorFile(file, outputs, metadata)
                written = 0
                for step, piece in pieces:
                    progress(step, written / max(tensor_file.size, 1))
                    for name, tensor in piece.items():
                        written += tensor_file.write(name, tensor)
    size = output.stat().st_size
    return FileReport(source, len(moves), len(unchanged), size, tuple(sorted(out)))


def _pieces(
    moves: list[Move], unchanged: list[str], read: safetensors.Reader
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the output, one layer or one other tensor at a time."""
    for move in moves:
        yield (
            f"converting {move.prefix.removesuffix('.')}",
            move.outputs({name: read(name) for name in move.inputs}),
        )
    for name in unchanged:
        yield f"copying {name}", {name: read(name)}


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix not in _WRITTEN:
        raise ArgumentError(
            "output", "must end in .safetensors, .pt, .pth or .bin", str(output), "rename it"
        )
    if not output.parent.is_dir():
        raise ArgumentError("output", "must be in a folder that exists", str(output), "make it")
    if output.exists() and not output.is_file() and not output.is_dir():
        raise ArgumentError("output", "must be a file", f"the device {output}", "name a new file")
    if output.is_dir() or (output.exists() and not overwrite):
        raise ArgumentError(
            "output",
            "must not exist yet",
            str(output),
            "choose another name, or pass overwrite=True",
        )


@contextmanager
def _replacing(output: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """Open a temporary file that is renamed to the output when complete, and removed on error."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_output(output, overwrite)  # minutes later
        partial.replace(output)
    except OSError as error:
        raise ModelError(
            f"{output} cannot be written ({error}); free or change its disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _checkpoint(
    path: Path,
) -> Iterator[tuple[Mapping[str, Tensor], safetensors.Reader, dict[str, str]]]:
    """Yield every tensor by name on the meta device, a reader of one, and the metadata."""
    files = _files(path)
    if not any(_is_pickled(file) for file in files):
        with safetensors.opened(files) as opened:
            yield opened
        return
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _unpickled(file).items():
            if name in tensors:
                raise ModelError(f"{file} holds {name}, as another file does; keep one")
            tensors[name] = tensor
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    yield shapes, tensors.__getitem__, {"format": "pt"}


def _is_pickled(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return False
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}); check its permissions") from error
    if head == b"GGUF":
        raise ModelError(
            f"{path} must be safetensors or tensors that torch saved; got a GGUF file; convert the "
            "checkpoint that it was made from"
        )
    return path.suffix in _PICKLED or head[:2] == b"PK"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        _check_no_shard(path)
        return [path]
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or folder; check the path")
    for whole, index in zip(_WHOLE, _INDEX, strict=True):
        if (path / index).is_file():
            return [path / shard for shard in _shards(path / index)]
        if (path / whole).is_file():
            return [path / whole]
    raise ModelError(
        f"{path} must hold {' or '.join(_WHOLE)}, or one of their shards' indexes, {_INDEX[0]} or "
        f"{_INDEX[1]}; it holds none of them; pass the file itself if it has another name"
    )


def _shards(index: Path) -> list[str]:
    weight_map = _json(index).get("weight_map")
    shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing or not shards:
        what = missing[0] if missing else "every shard's name"
        raise ModelError(f"{index} names shards; {what} is missing; get the rest")
    return shards


def _check_no_shard(path: Path) -> None:
    """Raise if a file is one shard of several: it has some of the layers only."""
    match = _SHARD.fullmatch(path.name)
    indexes = [path.with_name(name) for name in _INDEX if path.with_name(name).is_file()]
    if (match and int(match[2]) > 1) or any(
        path.name in (shards := _shards(index)) and len(shards) > 1 for index in indexes
    ):
        raise ModelError(
            f"{path} must be a whole checkpoint; got one shard of several; pass their folder, with "
            "the index in it"
        )


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        # Legacy files cannot be mapped; neither kind runs code when read.
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises from UnpicklingError to RuntimeError
        raise ModelError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}); save its state_dict "
            "by itself, or as safetensors"
        ) from error
    odd = (
        [
            name
            for name, value in tensors.items()
            if not isinstance(value, Tensor) or not isinstance(name, str)
        ]
        if isinstance(tensors, Mapping)
        else [type(tensors).__name__]
    )
    if odd:
        raise ModelError(
            f"{path} must hold tensors by name and nothing else; got {odd[0]}; save the model's "
            f"state_dict by itself{_inside(tensors)}"
        )
    for name, tensor in tensors.items():
        _check_plain(path, name, tensor)
    return dict(tensors)


def _inside(content: object) -> str:
    """Return code that extracts the state_dict from a trainer's checkpoint."""
    entries = content.items() if isinstance(content, Mapping) else ()
    for name, value in entries:
        is_state = isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values())
        if is_state and not str(name).startswith("optim"):
            return f": torch.save(torch.load(path)[{name!r}], another)"
    return ""


def _check_plain(path: Path, name: str, tensor: Tensor) -> None:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized:
        got = (
            "one on the meta device"
            if tensor.is_meta
            else f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}"
        )
        raise ModelError(
            f"{path}: {name} must be a dense tensor with values; got {got}; load the whole model, "
            "dequantized and gathered, and save its state_dict"
        )


def _config_of(path: Path) -> dict[str, Any] | None:
    config = (path if path.is_dir() else path.parent) / "config.json"
    return _json(config) if config.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} must hold a JSON object; got {type(content).__name__}; get it again"
        )
    return content
