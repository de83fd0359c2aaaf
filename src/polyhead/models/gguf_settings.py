"""Checks of a GGUF file's metadata: the kind of file, and settings without effect.

The names of keys are those of llama.cpp's gguf-py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from polyhead.errors import ModelError

__all__ = ["FROM_TRANSFORMERS", "check_supported"]

# Pre-tokenizers that split text as SmolLM does: each digit, then GPT-2's byte-level rule.
_PRE_TOKENIZERS = ("smollm",)
# Factors without effect as 1; llama.cpp reads an unset one as 0.
_FACTORS = (
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scale_linear",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
# Other settings that a rope without scaling may have.
_OF_SCALING = (
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
_UNSET = (0, "", "none", None)

# GGUF files that are not a model: their metadata, their kind, the remedy.
_NO_MODELS = (
    (
        {"general.type": "adapter"},
        "an adapter, whose weights are added to those of another model",
        "merge it into its base model (llama-export-lora) and pass the merged file",
    ),
    (
        {"general.type": "mmproj", "general.architecture": "clip"},
        "the projector of images or sounds, without a language model",
        "pass the GGUF file of the language model that it belongs to",
    ),
    (
        {"general.type": "imatrix"},
        "statistics for quantizing, without weights",
        "pass the GGUF file of the model that they were computed for",
    ),
    (
        {"general.architecture": "controlvector"},
        "a control vector, which is added to the states of another model",
        "pass the GGUF file of that model",
    ),
)
FROM_TRANSFORMERS = (
    "if transformers reads such a file (AutoModelForCausalLM.from_pretrained(folder, "
    "gguf_file=...)), pass the folder that it saves; else the folder of the model that the file "
    "was made from"
)


def check_supported(path: str, metadata: Mapping[str, Any], read: Iterable[str]) -> None:
    """Raise unless the loader reads, or may ignore, all settings of a file.

    Args:
        path: of the file.
        metadata: all of it, by key.
        read: the settings of the model that are read, without "llama.".

    Raises:
        ModelError: it is not a model, of another kind, or has a setting that is not read.
    """
    for signs, what, remedy in _NO_MODELS:
        if any(metadata.get(key) == value for key, value in signs.items()):
            raise ModelError(f"{path} must be a language model; got {what}; {remedy}")
    if (parts := metadata.get("split.count", 0)) not in (0, 1):
        raise ModelError(
            f"{path} must be a whole model; got one of {parts} parts; join them first "
            "(llama-gguf-split --merge)"
        )
    wanted = {
        "general.architecture": ("llama",),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": _PRE_TOKENIZERS,
    }
    for key, supported in wanted.items():
        if (got := metadata.get(key)) not in supported:
            raise ModelError(
                f"{path}: {key} must be {' or '.join(map(repr, supported))}; got {got!r}; "
                f"{FROM_TRANSFORMERS}"
            )
    known = {f"llama.{key}" for key in read}
    extra = [key for key in metadata if key.startswith("llama.") and key not in known]
    ignored = {key: metadata[key] for key in extra if not _is_neutral(key, metadata)}
    for what in ("bos_token", "eos_token", "space_prefix"):
        if metadata.get(key := f"tokenizer.ggml.add_{what}") not in _UNSET:
            ignored[key] = metadata[key]
    if ignored:
        raise ModelError(
            f"{path}: no setting may be left out, and this loader does not support {ignored}; "
            f"{FROM_TRANSFORMERS}"
        )


def _is_neutral(key: str, metadata: Mapping[str, Any]) -> bool:
    """True if a setting of the model that this loader does not read has no effect."""
    name, value = key.removeprefix("llama."), metadata[key]
    if name in _FACTORS:
        return value in (0, 1)
    if name == "attention.causal":
        return value is True
    if name == "rope.scaling.type":
        return value in ("", "none") or (value == "linear" and not _is_scaled(metadata))
    if name in _OF_SCALING:
        kind = metadata.get("llama.rope.scaling.type", "none")
        return kind in ("", "none", "linear") and not _is_scaled(metadata)
    if name == "attention.sliding_window":
        context = metadata.get("llama.context_length")
        return value == 0 or (isinstance(context, int) and value >= context)
    if name == "attention.scale":
        size = metadata.get("llama.attention.key_length")
        return value == 0 or (
            isinstance(size, int) and math.isclose(value, size**-0.5, rel_tol=1e-6)
        )
    return value in _UNSET


def _is_scaled(metadata: Mapping[str, Any]) -> bool:
    factors = (metadata.get(f"llama.{name}", 1) for name in _FACTORS if name.startswith("rope."))
    return any(factor not in (0, 1) for factor in factors)
