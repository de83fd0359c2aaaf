"""Checkpoint files with their attention in another layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from polyhead.convert import safetensors
from polyhead.convert.layout import Sizes
from polyhead.convert.state_dict import Move, add, plan, source_of
from polyhead.errors import ArgumentError, ModelError

__all__ = ["FileReport", "convert_file"]

_INDEX = "model.safetensors.index.json"
_PICKLED = {".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class FileReport:
    """What was written: from which layout, attention layers moved, tensors that passed as they
    were, bytes."""

    source: str
    layers: int
    unchanged: int
    bytes: int


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

    It is written beside `output` under another name and renamed when it is whole, so that an error
    or an interruption leaves what was there. Safetensors are read and written layer by layer.

    Args:
        path: a .safetensors file; a folder with model.safetensors or with shards and their index;
            or a .pt, .pth or .bin file of tensors by name (read without running code).
        output: a .safetensors file, or a .pt, .pth or .bin file.
        source: as in `state_dict`; None: by the family that the config names.
        target, num_heads, num_kv_heads, nope_head_dim, value_head_dim: as in `state_dict`.
        config: the model's; None: config.json in the folder or beside the file, if there is one.
        overwrite: whether an output that exists is replaced.
        progress: called with a line and the share done, before a tensor or layer is written.

    Raises:
        ArgumentError: the output exists, has no folder, or is of no kind that can be written.
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
        # Rehearsed without numbers: nothing is written if a layer does not fit.
        outputs: dict[str, Tensor] = {}
        moving = {name for move in moves for name in move.inputs}
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
    return FileReport(source, len(moves), len(unchanged), output.stat().st_size)


def _pieces(
    moves: list[Move], unchanged: list[str], read: safetensors.Reader
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What is written, one layer or one other tensor at a time."""
    for move in moves:
        yield (
            f"moving {move.prefix.removesuffix('.')}",
            move.outputs({name: read(name) for name in move.inputs}),
        )
    for name in unchanged:
        yield f"copying {name}", {name: read(name)}


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix not in {".safetensors", *_PICKLED}:
        raise ArgumentError(
            "output", "must end in .safetensors, .pt, .pth or .bin", str(output), "rename it"
        )
    if not output.parent.is_dir():
        raise ArgumentError("output", "must be in a folder that exists", str(output), "make it")
    if output.is_dir() or (output.exists() and not overwrite):
        raise ArgumentError(
            "output",
            "must not exist yet",
            str(output),
            "choose another name, or pass overwrite=True (--force)",
        )


@contextmanager
def _replacing(output: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """A file that takes the output's name when it is whole, and is gone if it never is."""
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
    """Every tensor by name without its numbers, what reads one, and the metadata."""
    if path.suffix in _PICKLED and path.is_file():
        tensors = _unpickled(path)
        shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
        yield shapes, tensors.__getitem__, {"format": "pt"}
        return
    with safetensors.opened(_files(path)) as opened:
        yield opened


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or folder; check the path")
    if (path / _INDEX).is_file():
        shards = sorted(set(_json(path / _INDEX).get("weight_map", {}).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing or not shards:
            what = missing[0] if missing else "every shard's name"
            raise ModelError(f"{path / _INDEX} names shards; {what} is missing; get the rest")
        return [path / shard for shard in shards]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    raise ModelError(
        f"{path} must hold model.safetensors or {_INDEX}; it holds neither; give the file itself"
    )


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        # Legacy files cannot be mapped; both are read without running what they hold.
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises from UnpicklingError to RuntimeError
        raise ModelError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}); save its state_dict "
            "by itself, or as safetensors"
        ) from error
    odd = (
        [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        if isinstance(tensors, dict)
        else [type(tensors).__name__]
    )
    if odd:
        raise ModelError(
            f"{path} must hold tensors by name and nothing else; got {odd[0]}; save the model's "
            "state_dict by itself"
        )
    return dict(tensors)


def _config_of(path: Path) -> dict[str, Any] | None:
    config = (path if path.is_dir() else path.parent) / "config.json"
    return _json(config) if config.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); get it anew") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} must hold a JSON object; got {type(content).__name__}; get it anew"
        )
    return content
