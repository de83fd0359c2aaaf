"""Claims of a module, read from its attributes, source and behavior.

Every fact comes with its origin, which the report prints: a wrong guess is visible, and can be
overridden by the argument of the same name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polyhead.check.law import first_line
from polyhead.check.probe.invocation import Calling
from polyhead.check.probe.sight import band, fitting
from polyhead.check.probe.signature import causal_argument, no_call, other_ways
from polyhead.check.probe.transformers import (
    causal_by_its_model,
    is_of_transformers,
    scale_of_its_class,
)
from polyhead.check.probe.vocabulary import HEAD_COUNT, HEADS, LENGTH, WIDTH, WINDOW
from polyhead.check.subject import Claims, Subject, copied

__all__ = ["band", "claim_causal", "is_polyheads", "read_claims"]

# Excludes property, properly and composition.
_POSITIONS = re.compile(
    r"(?-i:(?<![dpP])rope|Rope|RoPE|(?<!P)ROPE|(?<![msr])position|Position|POSITION)"
    r"|rotary|alibi|freqs|inv_freq|pos_|relative|slopes|rotate_?half|\b(cos|sin)\b",
    re.I,
)
_FEATURES = {
    "sinks": re.compile(r"sink|s_aux|add_zero_attn|^bias_k$|null_k", re.I),
    "softcap": re.compile(r"soft_?cap", re.I),
    "scores or weights that are not plain": re.compile(
        r"\b(normalize|sigmoid|entmax|sparsemax|elu|relu|layer_norm|rms_norm|\w*gate)\b", re.I
    ),
}
_CAUSAL_SOURCE = re.compile(r"\b(tril|triu)\b|is_causal\s*=\s*True")


def read_claims(
    module: nn.Module, calling: Calling, given: dict[str, Any]
) -> tuple[Claims, Calling]:
    """Read every claim except causality from names, and try out the calling convention.

    Args:
        module: the module under check.
        calling: how to call it.
        given: claims of the user; None if not given.

    Raises:
        ArgumentError: no call succeeds.
    """
    how = {name: "given" for name, value in given.items() if value is not None}

    def fact(name: str, found: tuple[Any, str] | None) -> Any:
        if given.get(name) is not None:
            return given[name]
        if found is None:
            return None
        how[name] = found[1]
        return found[0]

    max_tokens = fact("max_tokens", _length(module) or _square_buffer(module))
    window = fact("window", _integer(module, WINDOW))
    if window and "attribute window" in how.get("window", ""):
        how["window"] += f"; {window} or {window + 1} tokens accepted: pass window= to be strict"
    positions = fact("positions", _named(module, _POSITIONS))
    features = frozenset(name for name, words in _FEATURES.items() if _named(module, words))
    claims = Claims(
        d_in=0,
        causal=False,
        window=window,
        positions=None if positions in ("none", "") else positions,
        num_heads=fact("num_heads", _heads(module)),
        max_tokens=max_tokens,
        scale=fact("scale", _scale(module)),
        features=features,
        how=how,
    )
    claims.d_in, claims.how["d_in"], calling = _find_call(module, calling, claims, given["d_in"])
    return claims, calling


def claim_causal(subject: Subject, causal: bool | None) -> None:
    """Decide whether the module must be causal.

    Behavior alone would accept an inverted mask. It decides only clear cases: a token attends to
    itself and all earlier tokens only; or to every token, with no sign of a causal mask.
    """
    _claim_causal(subject, causal)
    claim_window(subject)


def _claim_causal(subject: Subject, causal: bool | None) -> None:
    claims, module = subject.claims, subject.module
    argument = causal_argument(module)
    if causal is not None:
        claims.causal, claims.how["causal"] = causal, "given"
        if causal and argument:
            always = {**subject.calling.always, argument: True}
            subject.calling = replace(subject.calling, always=always)
            claims.how["causal"] += f"; the check passes {argument}=True"
            subject.forget()
        return
    if argument:
        claims.causal, claims.how["causal"] = False, f"{argument}=False"
        return
    attribute = next(
        (n for n in ("is_causal", "causal") if isinstance(getattr(module, n, None), bool)), None
    )
    # Modules like nn.MultiheadAttention take is_causal in the call.
    if attribute is not None:
        claims.causal = getattr(module, attribute)
        claims.how["causal"] = f"attribute {attribute}"
        return
    if subject.calling.style == "transformers" and causal_by_its_model(module):
        claims.causal, claims.how["causal"] = True, "its model creates causal masks"
        return
    sees = subject.sees
    future = sees & ~band(sees.shape[0], True, None)
    if not future.any():
        claims.causal, claims.how["causal"] = True, "no token attends to a later one"
    elif word := _speaks_of_causality(module):
        claims.causal, claims.how["causal"] = True, f"its source contains {word}"
    elif torch.equal(sees, sees.T):
        claims.causal, claims.how["causal"] = False, "tokens attend to each other in both "
        "directions"
    else:
        claims.causal = True
        claims.how["causal"] = "tokens attend to some others only; pass causal=False if intended"


def claim_window(subject: Subject) -> None:
    """Find the window, or another sparse attention pattern, of a module that declares none, from
    its behavior on sequences of several lengths.
    """
    claims = subject.claims
    if claims.window is not None:
        return
    with suppress(Exception):  # of unknown code, with other numbers of tokens and rows
        seen = {subject.T: subject.sees.cpu()}
        for T in (subject.T + 6, 67):
            T = min(T, claims.max_tokens or T)
            if T > subject.T and T not in seen and subject.takes(T):
                seen[T] = subject.sees_in(T).cpu()
        if len(seen) > 1 and (pattern := fitting(seen, claims.causal)):
            lengths = ", ".join(map(str, seen))
            claims.window = pattern.window
            claims.how["window"] = f"observed in sequences of {lengths} tokens"
            if pattern.window is None:
                claims.pattern = pattern
            elif (tokens := claims.lengths()[0]) != claims.tokens and subject.takes(tokens):
                claims.tokens = tokens
                subject.forget()


# Reading names


def _places(module: nn.Module) -> Iterator[Any]:
    yield module
    for name in ("config", "cfg", "args"):
        if hasattr(module, name):
            yield getattr(module, name)


def _integer(module: nn.Module, names: tuple[str, ...]) -> tuple[int, str] | None:
    """Positive integer attribute of the module, or else of its configuration.

    None in the module counts as a value: in models that mix layers, the configuration's window is
    not that of every layer.
    """
    for place in _places(module):
        for name in names:
            value = getattr(place, name, 0)
            if value is None:
                return None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value, f"attribute {name}"
    return None


def _heads(module: nn.Module) -> tuple[int, str] | None:
    if found := _integer(module, HEADS):
        return found
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and "head" in name and len(child):
            return len(child), f"length of {name}"
    named = [name for name in vars(module) if HEAD_COUNT.fullmatch(name)]
    return _integer(module, tuple(named))


def _length(module: nn.Module) -> tuple[int, str] | None:
    """Maximum length of the module, or of one of its heads."""
    return next((found for part in module.modules() if (found := _integer(part, LENGTH))), None)


def _square_buffer(module: nn.Module) -> tuple[int, str] | None:
    for name, buffer in module.named_buffers():
        if buffer.ndim >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1:
            return buffer.shape[-1], f"buffer {name}"
    return None


def _scale(module: nn.Module) -> tuple[float, str] | None:
    """Scale of polyhead's modules and transformers' layers. An attribute of other code is not
    trusted: it may be the mistake.
    """
    if is_of_transformers(module):
        return scale_of_its_class(module)
    name = "scale" if is_polyheads(module) else "scaling"
    value = getattr(module, name, None)
    return (value, f"attribute {name}") if isinstance(value, float) else None


def _named(module: nn.Module, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Attribute, submodule, parameter or buffer whose name matches."""
    names = [
        name for name, value in vars(module).items() if value is not None and value is not False
    ]
    names += [name for name, _ in module.named_modules() if name]
    names += [name for name, _ in module.named_parameters()]
    names += [name for name, _ in module.named_buffers()]
    names += [name for name in inspect.signature(module.forward).parameters if "embed" in name]
    for name in names:
        if pattern.search(name.rsplit(".", 1)[-1]) and not name.startswith("_"):
            return name, f"it has {name}"
    if not is_polyheads(module):
        for source in _sources(module):
            if match := pattern.search(source):
                return match[0], f"its source contains {match[0]}"
    return None


def _sources(module: nn.Module) -> Iterator[str]:
    """Source of the module's and its parts' classes, without comments, docstrings and torch."""
    kinds = dict.fromkeys(kind for part in module.modules() for kind in type(part).__mro__)
    for kind in kinds:
        if not kind.__module__.startswith(("builtins", "torch.", "transformers.")):
            try:
                source = inspect.getsource(kind)
            except (OSError, TypeError):
                continue
            yield re.sub(r'"""[\s\S]*?"""|#.*', "", source)


def _speaks_of_causality(module: nn.Module) -> str | None:
    if "causal" in type(module).__name__.lower():
        return type(module).__name__
    for source in _sources(module):
        if match := _CAUSAL_SOURCE.search(source):
            return match[0]
    return None


def is_polyheads(module: nn.Module) -> bool:
    return type(module).__module__.startswith("polyhead.")


# Trying


def _find_call(
    module: nn.Module, calling: Calling, claims: Claims, d_in: int | None
) -> tuple[int, str, Calling]:
    """Return the input size, its origin, and a calling convention that works with it.

    Sets `claims.tokens`, the sequence length of that call.
    """
    sizes = {d_in: "given"} if d_in else _sizes(module)
    module = copied(module).eval()
    like = next(module.parameters(), torch.zeros(1))
    errors: dict[str, None] = {}
    for way in (calling, *other_ways(module, calling)):
        for size, how in sizes.items():
            for T in claims.lengths():
                x = torch.randn(1, T, size, dtype=like.dtype).to(like.device)
                try:
                    with torch.no_grad():
                        shape = tuple(way(module, x).output.shape)
                        if way is not calling:  # a mask of another form may fit one row
                            way(module, x.expand(3, -1, -1))
                    if len(shape) != 3 or shape[:2] != (1, T):
                        raise TypeError(f"its output {shape} is not (1, {T}, features)")
                except (Exception, SystemExit) as error:  # of unknown code
                    errors[f"{T} tokens of {size}: {type(error).__name__}: {first_line(error)}"] = (
                        None
                    )
                else:
                    claims.tokens = T
                    if claims.lengths()[0] != T:
                        claims.how["tokens"] = next(iter(errors))
                    return size, how, way
    raise no_call(list(errors))


def _sizes(module: nn.Module) -> dict[int, str]:
    """Candidates for the features of the input, the likeliest first, with their origin."""
    sizes: dict[int, str] = {}
    for place in _places(module):
        for name in WIDTH:
            if isinstance(value := getattr(place, name, None), int) and value > 0:
                sizes.setdefault(value, f"attribute {name}")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            sizes.setdefault(layer.in_features, f"input of {name}")
    for name, parameter in module.named_parameters():
        for size in reversed(parameter.shape if parameter.ndim > 1 else ()):
            sizes.setdefault(size, f"a size of {name}")
    return sizes
