"""Calling convention of an arbitrary attention module, inferred from its signature.

    x style       forward(x, ...)                       most code of courses and repositories
    qkv style     forward(query, key, value, ...)       in any order, the later ones optional or not
    transformers  forward(hidden_states, ...)           layers of Hugging Face models

A call returns the output, or a tuple, list, dict or dataclass whose first tensor is the output;
weights are the last tensor that ends in (tokens, tokens).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.call import AuxRequest
from polyhead.check.probe.invocation import FORMS, Calling, MaskArgument
from polyhead.check.probe.transformers import (
    calling_of_transformers,
    filled,
    is_of_transformers,
    needs_rotary,
)
from polyhead.errors import ArgumentError

__all__ = [
    "cache_flag",
    "causal_argument",
    "find_calling",
    "from_function",
    "mask_names",
    "no_call",
    "other_ways",
]

_MASK_NAMES = (
    "key_padding_mask",
    "src_key_padding_mask",
    "padding_mask",
    "pad_mask",
    "attn_mask",
    "attention_mask",
    "src_mask",
    "mask",
)
_MASK = re.compile(r"mask|padding|valid_len", re.I)
# Masks of heads, of another sequence, of queries; switches and numeric options of a mask.
_NO_MASK = re.compile(
    r"head_?mask|encoder|cross|memory|context|image|full_text|query|q_mask|expert|router"
    r"|^(is|use|return|need|with|no)_|_(type|value|prob|ratio|token|id|idx|fn|mod)$",
    re.I,
)
_WEIGHT_NAMES = (
    "need_weights",
    "return_weights",
    "return_attention",
    "return_attn",
    "return_attn_weights",
    "return_attention_weights",
    "return_attention_scores",
    "output_attentions",
)
_CACHE = re.compile(
    r"cache|past|prev(ious)?_(kv|key|state)|^(kv|layer|decoder)_state|memory_kv", re.I
)
_NO_CACHE = re.compile(
    r"^(use|return|is|with|no|update)_|_?(position|len|length|size|dtype|idx|index|id|mask)s?$",
    re.I,
)
# Arguments that are often required but accept None.
_MAY_BE_NONE = ("alibi", "head_mask", "position_ids", "position_bias")
# Size mismatch errors, after the number of tokens and features.
_OF_SIZES = re.compile(
    r"(Runtime|Value|Assertion|Index|Shape)Error: .*"
    r"\b(shapes?|sizes?|dim(ension)?s?|broadcast\w*|view|reshape|divisible)\b",
    re.I,
)
_OF_CALL = ("mask", "cache")
_ROLE = re.compile(r"_?(x_?|in_?)?(q|k|v|kv|query|key|value|queries|keys|values)(_?in|_?input)?")


def from_function(call: Callable[..., Any]) -> Calling:
    """Return the calling convention of a user's `call(module, x)`, which may also take `mask` and
    `cache`.

    Raises:
        ArgumentError: it needs another argument.
    """
    parameters = dict(list(inspect.signature(call).parameters.items())[2:])
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind < parameter.VAR_KEYWORD
        if needed and parameter.kind is not parameter.VAR_POSITIONAL and name not in _OF_CALL:
            raise ArgumentError(
                "call",
                "must take (module, x), and may take mask and cache",
                f"a function that also needs {name}",
                f"give {name} a value inside call",
            )
    mask = MaskArgument("mask", "full", "attend", "given") if "mask" in parameters else None
    cache = "cache" in parameters
    return Calling(
        "yours",
        lambda module, x, keywords: call(module, x, **keywords),
        mask=mask,
        always={name: None for name in _OF_CALL if name in parameters},
        cache="functional" if cache else None,
        cache_name="cache" if cache else "",
    )


def find_calling(module: nn.Module) -> Calling:
    """Return the calling convention of this module; mask and cache are tried out later.

    Raises:
        ArgumentError: its signature is unknown.
    """
    parameters = _parameters(module)
    if is_of_transformers(module) or needs_rotary(parameters):
        return calling_of_transformers(module, parameters)
    inputs = _inputs(module, parameters)
    common: dict[str, Any] = {"weights": _weight_keywords(parameters)}
    common |= _cache(module, parameters)
    always = dict.fromkeys(n for n in _needed(parameters) if _may_be_none(n, parameters[n]))
    if len(inputs) > 1:
        common["batch_first"] = bool(getattr(module, "batch_first", True))
        if "need_weights" in parameters:
            always["need_weights"] = False
            common["weights"] = {"need_weights": True}
            if "average_attn_weights" in parameters:
                common["weights"] |= {"average_attn_weights": False}
    style = ", ".join(map(str, inputs)) if len(inputs) > 1 else "x"
    return Calling(style, _runner(inputs), always=always, **common)


def mask_names(module: nn.Module) -> list[str]:
    """Arguments of the module's forward named like masks, the usual ones first."""
    parameters = _parameters(module)
    named = [name for name in parameters if _is_mask(name, parameters[name])]
    return sorted(named, key=lambda n: _MASK_NAMES.index(n) if n in _MASK_NAMES else len(named))


def causal_argument(module: nn.Module) -> str | None:
    """Argument of the module's forward that makes it causal, with default False."""
    parameters = _parameters(module)
    names = [n for n in ("use_causal_mask", "causal") if n in parameters]
    return next((n for n in names if parameters[n].default is False), None)


def other_ways(module: nn.Module, calling: Calling) -> Iterator[Calling]:
    """Yield other ways to call it: with optional arguments filled in, and with an all-True mask, in
    each form, if a mask is required.
    """
    yield from filled(module, calling)
    for way in (calling, *filled(module, calling)):
        for name in (n for n in mask_names(module) if n in calling.always):
            always = {n: v for n, v in calling.always.items() if n != name}
            for form in FORMS:
                for meaning in ("attend", "ignore", "add"):
                    mask = MaskArgument(name, form, meaning, "it must be given")
                    shows_all = lambda T: torch.ones(T, T, dtype=torch.bool)  # noqa: E731
                    yield replace(way, always=always, mask=mask, supplies=shows_all)


def no_call(errors: list[str]) -> ArgumentError:
    """Return the error for a module whose calls all failed.

    Args:
        errors: error of each call, "7 tokens of 48: RuntimeError: ...".
    """
    got = "; ".join(errors[:2]) or "a module without parameters"
    if all(_OF_SIZES.search(error) for error in errors):
        return ArgumentError(
            "d_in",
            "must be given: no size found in the module works",
            got,
            "pass d_in=, or in Python call=lambda module, x: ... if its signature differs",
        )
    return ArgumentError(
        "forward",
        "must return an output for tokens of some size, and raised for each one tried",
        got,
        "call it in python to see where it raises; pass, in Python, call=lambda module, x: ... "
        "if its signature differs",
    )


def _may_be_none(name: str, parameter: inspect.Parameter) -> bool:
    return name in _MAY_BE_NONE or _is_mask(name, parameter) or is_cache(name, parameter)


def cache_flag(module: nn.Module) -> str | None:
    """Name of the switch of a cache that the module keeps itself."""
    parameters = _parameters(module)
    named = [n for n in parameters if re.fullmatch(r"(use_)?(kv_)?cache", n)]
    return next((n for n in named if isinstance(parameters[n].default, bool)), None)


def is_cache(name: str, parameter: inspect.Parameter) -> bool:
    """True if an argument is a cache by its name."""
    flag = isinstance(parameter.default, (bool, int, float, str))
    return bool(_CACHE.search(name)) and not _NO_CACHE.search(name) and not flag


def _is_mask(name: str, parameter: inspect.Parameter) -> bool:
    flag = isinstance(parameter.default, (bool, int, float, str))
    return bool(_MASK.search(name)) and not _NO_MASK.search(name) and not flag


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


def _needed(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind not in kinds]


def _inputs(module: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> list[str | None]:
    """Arguments that are x, by name; None for one without a name (*args)."""
    needed = [n for n in _needed(parameters) if not _may_be_none(n, parameters[n])]
    roles = [name for name in parameters if _ROLE.fullmatch(name.lower())]
    if not needed:
        some = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        needed = [n for n in some if not _may_be_none(n, parameters[n])][:1]
        if needed and needed[0] not in roles:
            return [*needed]
        if not needed and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
            return [None]
    if not needed:
        raise _unknown(module, "takes no input")
    if needed[0] in roles and set(needed) <= set(roles):
        return [*roles]
    # Such as (Q, K, V) and (q_states, k_states, v_states).
    if [name.lstrip("_")[0].lower() for name in needed] == ["q", "k", "v"]:
        return [*needed]
    if len(needed) > 1:
        raise _unknown(module, f"also needs {', '.join(needed[1:])}")
    return [*needed]


def _runner(inputs: list[str | None]) -> Callable[[nn.Module, Tensor, dict[str, Any]], Any]:
    def run(module: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
        if inputs == [None]:
            return module(x, **keywords)
        return module(**dict.fromkeys(inputs, x), **keywords)  # type: ignore[arg-type]

    return run


def _unknown(module: nn.Module, what: str) -> ArgumentError:
    return ArgumentError(
        "call",
        "must be given for a module that does not support module(x) or module(q, k, v)",
        f"{type(module).__name__}.forward, which {what}",
        "pass, in Python, call=lambda module, x: ..., or name a class with such a forward(x)",
    )


def _weight_keywords(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any] | None:
    if "return_aux" in parameters:
        return {"return_aux": AuxRequest(weights=True)}
    return next(({name: True} for name in _WEIGHT_NAMES if name in parameters), None)


def _cache(module: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    if hasattr(module, "make_cache") and "cache" in parameters:
        return {"cache": "polyhead", "cache_name": "cache"}
    flag = cache_flag(module)
    if flag is not None and hasattr(module, "reset_cache"):
        return {"cache": "stateful", "cache_name": flag}
    for name in parameters:
        if is_cache(name, parameters[name]):
            options = {} if flag is None else {flag: True}
            return {"cache": "functional", "cache_name": name, "cache_options": options}
    return {}
