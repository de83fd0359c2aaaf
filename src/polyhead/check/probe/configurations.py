"""Configuration objects for constructors, with guessed sizes.

The class comes from the constructor's annotation, or else from its module. If there is neither, a
stand-in has the usual names for sizes, as attributes and as keys.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from polyhead.check.probe.vocabulary import (
    DROPOUT,
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    LENGTH,
    WIDTH,
    WIDTH_OUT,
    WINDOW,
)
from polyhead.errors import ArgumentError

__all__ = [
    "GUESSES",
    "SIZES_OF_TRANSFORMERS",
    "Config",
    "configurations",
    "fill_parameters",
    "is_configuration",
]

# Sizes for omitted constructor arguments. Sizes that could be swapped differ.
GUESSES: dict[str, Any] = {
    name: value
    for names, value in (
        (WIDTH + WIDTH_OUT, 48),
        (HEADS, 4),
        (KV_HEADS, 2),
        ((*LENGTH, "max_position_embeddings"), 64),
        (DROPOUT, 0.1),
        (HEAD_SIZE, 12),
        (WINDOW, 4),
        (("bias", "qkv_bias", "attention_bias"), True),
        (("layer_idx", "layer_id", "layer_index", "layer_number"), 0),
    )
    for name in names
}
# For transformers' configurations: a half and a quarter of a head (rotary parts) are even.
SIZES_OF_TRANSFORMERS: dict[str, int] = {
    name: value
    for names, value in (
        (WIDTH, 64),
        ((*HEADS, "encoder_attention_heads", "decoder_attention_heads"), 4),
        (KV_HEADS, 2),
        ((*HEAD_SIZE, "d_kv", "kv_channels"), 16),
        ((*WINDOW, "attention_chunk_size", "local_radius", "global_block_size"), 4),
        (("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "local_attention"), 8),
        (("v_head_dim",), 12),
        (("kv_lora_rank",), 20),
        (("q_lora_rank",), 24),
        (("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    )
    for name in names
}
_PARAMETER = re.compile(r"(.*_)?(config|configuration|cfg|conf|args|hparams)")
_CLASS = re.compile(r"(Config|Configuration|Cfg|Args|Arguments|HParams|Hyperparameters)$")


class Config(types.SimpleNamespace):
    """Stand-in for a configuration object or dict, with the usual names for sizes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**(GUESSES | given))

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __contains__(self, name: str) -> bool:
        return name in vars(self)

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self).get(name, default)


def is_configuration(name: str) -> bool:
    """True if a parameter of this name is a configuration."""
    return _PARAMETER.fullmatch(name) is not None


def configurations(
    found: Any, parameter: inspect.Parameter, given: Mapping[str, Any]
) -> Iterator[tuple[Any, str]]:
    """Yield configurations for one parameter of a constructor, the likeliest first, with
    descriptions.

    Args:
        found: the class or function that takes one.
        parameter: its parameter.
        given: values of the configuration that the user gave, by name.

    Raises:
        ArgumentError: transformers' configuration has no such name.
    """
    kinds = _kinds(found, parameter)
    for kind in kinds:
        if _is_transformers(kind):
            yield from _of_transformers(kind, given)
        else:
            yield from _of_a_class(kind, given)
    if not any(_is_transformers(kind) for kind in kinds):
        yield Config(**given), "an object with the usual names for sizes"


def fill_parameters(module: Any, config: Any) -> None:
    """Initialize the parameters of a layer of transformers that its constructor leaves to its
    model.

    They are NaN: see `polyhead.check.probe.target.build`.
    """
    parts = [p for p in module.modules() if any(t.isnan().any() for t in p.parameters(False))]
    files = [kind.__module__ for kind in type(module).__mro__]
    models = [
        k for f in files for k in vars(sys.modules[f]).values() if hasattr(k, "_init_weights")
    ]
    # Not the base class of all models, which has no rule for this layer.
    own = next((k for k in models if k.__module__ in files), None)
    if not parts or own is None:
        return
    model = own.__new__(own)  # its constructor would build the whole model
    model.config = config
    for part in parts:
        model._init_weights(part)


def _kinds(found: Any, parameter: inspect.Parameter) -> list[type]:
    """Candidate classes of a configuration."""
    annotation = parameter.annotation
    bases = getattr(found, "__mro__", (found,))
    files = [sys.modules.get(getattr(base, "__module__", "")) for base in reversed(bases)]
    source: dict[str, Any] = {}
    for file in files:
        if file is not None and not file.__name__.startswith(("torch.", "builtins")):
            source |= vars(file)
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, source)
        except Exception:  # of unknown code: names for type checkers only
            annotation = parameter.empty
    named = [annotation, *typing.get_args(annotation)]
    kinds = [k for k in named if isinstance(k, type) and _CLASS.search(k.__name__)]
    kinds = [k for k in kinds if not _is_base(k)]
    if not kinds:
        own = [getattr(value, "config_class", None) for value in source.values()]
        own += [v for k, v in source.items() if isinstance(v, type) and _CLASS.search(v.__name__)]
        kinds = [k for k in own if isinstance(k, type) and not _is_base(k)]
    return list(dict.fromkeys(kinds))


def _is_base(kind: type) -> bool:
    return kind.__name__.lower() == "pretrainedconfig"


def _is_transformers(kind: type) -> bool:
    return hasattr(kind, "attribute_map") and hasattr(kind, "to_dict")


def _of_transformers(kind: Any, given: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Configurations of one class, and of those nested in it: with sizes; also with sizes that
    default to None; and with the defaults.
    """
    try:
        default = kind()
    except Exception:  # of unknown code
        return
    inside = [type(part) for part in vars(default).values() if _is_transformers(type(part))]
    for name in given:
        if not any(_has(part, name) for part in (default, *(k() for k in inside))):
            raise ArgumentError(
                f"config.{name}",
                f"must be an attribute of {kind.__name__}",
                name,
                f"see {kind.__name__} for its names",
            )
    parameters = inspect.signature(kind).parameters
    known = {n: value for n, value in SIZES_OF_TRANSFORMERS.items() if n in parameters}
    values = {name: vars(default).get(name, 0) for name in known}
    sizes = {n: v for n, v in known.items() if type(values[n]) is int or n in KV_HEADS}
    unset = {name: value for name, value in known.items() if values[name] is None}
    heads, kv_heads = (next((n for n in names if n in sizes), None) for names in (HEADS, KV_HEADS))
    if heads and kv_heads and parameters[kv_heads].default == parameters[heads].default:
        sizes[kv_heads] = sizes[heads]  # no grouped-query attention
    for chosen in (sizes, sizes | unset, {}):
        with contextlib.suppress(Exception):  # inconsistent sizes
            yield _made(kind, chosen, given)
    for part in inside:
        yield from _of_transformers(part, given)


def _made(kind: Any, sizes: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Any, str]:
    values = {"_attn_implementation": "eager", **given}  # returns weights
    fields = {**sizes, **{name: v for name, v in values.items() if not name.startswith("_")}}
    config = kind(**fields)
    for name in values.keys() - fields.keys():
        setattr(config, name, values[name])
    return config, _words(kind, fields)


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # of unknown code: one value per layer
        return True


def _of_a_class(kind: Any, given: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Configuration of a custom class, if every required value can be guessed."""
    values = dict(given)
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        needed = parameter.default is parameter.empty
        if name in GUESSES and (needed or type(parameter.default) is int):
            values[name] = GUESSES[name]
        elif needed:
            return
    for chosen in (values, dict(given)):
        with contextlib.suppress(Exception):  # of unknown code
            yield kind(**chosen), _words(kind, chosen)


def _words(kind: Any, values: Mapping[str, Any]) -> str:
    return f"{kind.__name__}({', '.join(f'{n}={v}' for n, v in values.items())})"
