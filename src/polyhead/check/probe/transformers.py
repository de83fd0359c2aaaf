"""Calling convention of attention layers of transformers: as their models call them, with rotary
positions, other sequences and masks.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.probe.invocation import Calling
from polyhead.check.probe.vocabulary import HEADS
from polyhead.errors import ArgumentError

__all__ = [
    "calling_of_transformers",
    "causal_by_its_model",
    "filled",
    "is_of_transformers",
    "is_transformers_own",
    "needs_rotary",
    "scale_of_its_class",
]

# Arguments of a model in addition to the tokens: another sequence, and a bias on the scores.
_OTHERS = re.compile(r"(encoder|cross_attention|image)_(hidden_)?states|key_value_states")
_SCALES = re.compile(r"scal(?!ar)|sqrt|\*\*\s*\(?-|inv_norm|attention_interface|scaled_dot_product")
_BIASES = ("alibi", "position_bias")


def is_of_transformers(module: object) -> bool:
    """True if a module, or a class, is of transformers, or a subclass of one of its classes."""
    kind = module if isinstance(module, type) else type(module)
    return any(base.__module__.startswith("transformers.") for base in kind.__mro__)


def is_transformers_own(module: object) -> bool:
    """True if a module's class itself is defined in transformers."""
    return type(module).__module__.startswith("transformers.")


def needs_rotary(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """True if a forward is that of a transformers layer with rotary positions."""
    return {"hidden_states", "position_embeddings"} <= parameters.keys()


@dataclass(frozen=True)
class _Run:
    """Call of a layer.

    Attributes:
        rotary: computes `position_embeddings`, if they are passed.
        position_ids: True if they are passed.
        fills: arguments other than None: "x" for the tokens, "0" for zeros of their shape, or
            "bias" for the position bias of the model's own function.
        bias: that function, given (B, S) ones.
    """

    rotary: nn.Module | None
    position_ids: bool
    fills: Mapping[str, str] = field(default_factory=dict)
    bias: Callable[[Tensor], Tensor] | None = None

    def __call__(self, layer: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
        first = keywords.pop("_first", 0)
        places = torch.arange(first, first + x.shape[1], device=x.device)[None]
        given: dict[str, Any] = {}
        if self.rotary is not None:
            cos, sin = self.rotary(x, places, **_layer_type(layer, self.rotary))
            given["position_embeddings"] = (cos.to(x.dtype), sin.to(x.dtype))
        elif self.position_ids:
            given["position_ids"] = places
        for name, fill in self.fills.items():
            if fill == "bias" and self.bias is not None:
                given[name] = self.bias(x.new_ones(x.shape[0], first + x.shape[1]))
            else:
                given[name] = x if fill == "x" else torch.zeros_like(x)
        return layer(x, **(keywords | given))


def calling_of_transformers(
    module: nn.Module, parameters: Mapping[str, inspect.Parameter]
) -> Calling:
    """Return the calling convention of a transformers layer. Its mask is found by trying.

    Raises:
        ArgumentError: it needs arguments that only its model can create.
    """
    config: Any = getattr(module, "config", None)
    passed = parameters.get("position_embeddings")
    rotary = None if passed is None else _rotary(module, config)
    if passed is not None and rotary is None and passed.default is passed.empty:
        raise ArgumentError(
            "call",
            "must be given for a layer whose rotary positions cannot be computed",
            type(module).__name__,
            "pass, in Python, call=lambda module, x: ...",
        )
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind < p.VAR_KEYWORD]
    always = dict.fromkeys(n for n in (*needed[1:], "attention_mask") if n in parameters)
    always.pop("position_embeddings", None)
    residual = {"residual": "0"} if "residual" in always else {}
    eager = getattr(config, "_attn_implementation", None) == "eager"
    asks = {"output_attentions": True} if "output_attentions" in parameters else {}
    caches = ("past_key_values", "past_key_value", "layer_past")
    cache = next((n for n in caches if n in parameters), "")
    return Calling(
        "transformers",
        _Run(rotary, "position_ids" in parameters, residual),
        weights=asks if eager else None,
        always=always,
        weights_come=eager,
        cache="transformers" if cache else None,
        cache_name=cache,
    )


def filled(module: nn.Module, calling: Calling) -> Iterator[Calling]:
    """Yield the same call with optional arguments filled in: other sequences, position bias."""
    if not isinstance(calling.run, _Run):
        return
    parameters = inspect.signature(module.forward).parameters
    others = {name: "x" for name in parameters if _OTHERS.fullmatch(name)}
    bias = _bias(module)
    biases = {name: "bias" for name in _BIASES if name in parameters and bias is not None}
    for fills in (biases, others, biases | others):
        if fills:
            run = replace(calling.run, fills={**calling.run.fills, **fills}, bias=bias)
            words = [
                f"{n}={'x' if fill == 'x' else 'its model computes'}" for n, fill in fills.items()
            ]
            positions = next(iter(biases), "") if fills != others else ""
            told = f"with {', '.join(words)}"
            yield replace(calling, run=run, told=told, positions=positions)


def _bias(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Function of a layer's file that builds the ALiBi bias, from (B, S) ones."""
    heads = next((getattr(module, n) for n in HEADS if hasattr(module, n)), None)
    for source in _sources(module):
        for name, function in vars(source).items():
            if "alibi" in name and inspect.isfunction(function) and name.startswith("build"):
                wanted = inspect.signature(function).parameters

                def bias(ones: Tensor, function: Any = function, wanted: Any = wanted) -> Tensor:
                    known = {
                        "attention_mask": ones,
                        "num_heads": heads,
                        "dtype": ones.dtype,
                        "device": ones.device,
                        "sequence_length": ones.shape[1],
                        "seq_len": ones.shape[1],
                    }
                    made: Tensor = function(**{n: v for n, v in known.items() if n in wanted})
                    return made.to(ones.dtype)

                return bias
    return None


def causal_by_its_model(module: nn.Module) -> bool:
    """True if the model of a transformers layer creates causal masks, and no other."""
    made = [vars(source) for source in _sources(module)]
    return any("create_causal_mask" in names for names in made) and not any(
        "create_bidirectional_mask" in names for names in made
    )


def scale_of_its_class(module: nn.Module) -> tuple[float, str] | None:
    """Scale of a transformers layer, from it or a layer inside it, and its origin; 1 if its code
    has no scale (GPT-Neo).
    """
    for part in module.modules():
        value = getattr(part, "scaling", None)
        if isinstance(value, float):
            return value, "attribute scaling"
    parts = [type(part) for part in module.modules() if is_transformers_own(part)]
    if not parts or any(_SCALES.search(inspect.getsource(kind)) for kind in set(parts)):
        return None
    return 1.0, "its code has no scale"


def _sources(module: nn.Module) -> Iterator[Any]:
    """Source files of a module's class and its base classes, except torch's."""
    for kind in type(module).__mro__:
        if not kind.__module__.startswith(("torch.", "builtins")):
            yield sys.modules[kind.__module__]


def _rotary(module: nn.Module, config: Any) -> nn.Module | None:
    """Rotary embedding of a layer: the first of its file that takes its configuration."""
    for source in _sources(module):
        for name in dir(source):
            if name.endswith("RotaryEmbedding"):
                with contextlib.suppress(Exception):  # belongs to another part of the model
                    rotary: nn.Module = getattr(source, name)(config=config)
                    kinds = _layer_type(module, rotary)
                    cos, sin = rotary(torch.zeros(1, 2, 4), torch.arange(2)[None], **kinds)
                    if cos.shape == sin.shape:
                        return rotary
    return None


def _layer_type(module: nn.Module, rotary: nn.Module) -> dict[str, Any]:
    """Keyword for rotary embeddings of models with several kinds of layers."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return {}
    types = getattr(getattr(module, "config", None), "layer_types", [None])
    index: Any = getattr(module, "layer_idx", 0)
    return {"layer_type": getattr(module, "layer_type", None) or types[index or 0]}
