"""How to call a module that has never heard of polyhead: found out from its signature.

    x style       forward(x, ...)                       most code of courses and repositories
    qkv style     forward(query, key, value, ...)       nn.MultiheadAttention and its like
    transformers  forward(hidden_states, ...)           layers of Hugging Face models

What comes back is the output, or a tuple, list or dict whose first tensor is the output; weights
are the next tensor that ends in (tokens, tokens).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.call import Aux, AuxRequest
from polyhead.errors import ArgumentError

__all__ = [
    "FORMS",
    "Calling",
    "MaskArgument",
    "Result",
    "find_calling",
    "from_function",
    "mask_names",
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
_WEIGHT_NAMES = (
    "need_weights",
    "return_weights",
    "return_attention",
    "return_attn",
    "return_attn_weights",
    "return_attention_weights",
    "output_attentions",
)
_FUNCTIONAL_CACHES = ("kv_cache", "cache", "past_kv", "layer_past", "past_key_value", "past")

# Where a mask may stand: (batch, tokens) or a shape that broadcasts to (batch, heads, T, S).
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "keys": lambda allowed: allowed[:, 0, -1],
    "full": lambda allowed: allowed,
    "square": lambda allowed: allowed[0, 0],
    "batch": lambda allowed: allowed[:, 0],
}


@dataclass(frozen=True)
class MaskArgument:
    """The argument that says who may attend, and how.

    Attributes:
        name: of the argument.
        form: a key of `FORMS`.
        true_means: "show" or "hide" for a boolean; "add" for numbers added to scores.
        how: how this was found out.
    """

    name: str
    form: str
    true_means: str
    how: str = ""

    def given(self, allowed_b1ts: Tensor, dtype: torch.dtype) -> Tensor:
        allowed = FORMS[self.form](allowed_b1ts)
        if self.true_means == "show":
            return allowed
        if self.true_means == "hide":
            return ~allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, float("-inf")
        )


@dataclass(frozen=True)
class Result:
    """What a call gave: the output (B, T, features), weights (B, H, T, S), and a cache."""

    output: Tensor
    weights: Tensor | None = None
    cache: Any = None


@dataclass(frozen=True)
class Calling:
    """How to call a module. Everything that a law may ask of a call stands here.

    Attributes:
        style: which of the styles above.
        run: `run(module, x, keywords)`: the call itself, with x (B, T, features).
        mask: the argument for a mask, if there is one.
        supplies: makes a mask (T, T) that the check passes, as a model would; or None.
        weights: the keywords that ask for attention weights.
        always: keywords of every call.
        cache: what kind of cache it takes: "polyhead", "transformers", "functional", "stateful".
        cache_name: the argument for it.
        cache_options: keywords that come with it.
        batch_first: False where tensors are (T, B, features).
    """

    style: str
    run: Callable[[nn.Module, Tensor, dict[str, Any]], Any]
    mask: MaskArgument | None = None
    supplies: Callable[[int], Tensor] | None = None
    weights: Mapping[str, Any] | None = None
    always: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    cache_name: str = ""
    cache_options: Mapping[str, Any] = field(default_factory=dict)
    batch_first: bool = True

    def __call__(
        self,
        module: nn.Module,
        x: Tensor,
        *,
        allowed: Tensor | None = None,
        weights: bool = False,
        **more: Any,
    ) -> Result:
        """Call the module.

        Args:
            module: which.
            x: (B, T, features).
            allowed: (B, 1, T, T) True where a query may attend, in addition to the module's rule.
            weights: whether to ask for the attention weights.
            more: keywords passed on.
        """
        keywords = dict(self.always) | more
        if weights and self.weights is not None:
            keywords |= self.weights
        if self.supplies is not None:
            supplied = self.supplies(x.shape[1]).to(x.device)[None, None]
            allowed = supplied if allowed is None else allowed & supplied
        if allowed is not None:
            if self.mask is None:
                raise ArgumentError("allowed", "needs a mask argument", "none", "do not mask")
            allowed = allowed.expand(x.shape[0], 1, -1, -1)
            keywords[self.mask.name] = self.mask.given(allowed, x.dtype)
        given = x if self.batch_first else x.transpose(0, 1)
        result = _read(self.run(module, given, keywords), x.shape[1])
        if self.batch_first:
            return result
        return replace(result, output=result.output.transpose(0, 1))


def from_function(call: Callable[[nn.Module, Tensor], Any]) -> Calling:
    """The calling that a user gave: `call(module, x)`."""
    return Calling("yours", lambda module, x, keywords: call(module, x))


def find_calling(module: nn.Module) -> Calling:
    """How to call this module, without its mask and its cache tried out.

    Raises:
        ArgumentError: its signature is none that is known.
    """
    if type(module).__module__.startswith("transformers."):
        return _transformers(module)
    parameters = _parameters(module)
    needed = [
        p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.KEYWORD_ONLY
    ]
    first_letters = [name.lstrip("_")[0].lower() for name in needed[:3]]
    common: dict[str, Any] = {"weights": _weight_keywords(parameters)}
    common |= _cache(module, parameters)
    if first_letters == ["q", "k", "v"]:
        common["batch_first"] = bool(getattr(module, "batch_first", True))
        if "need_weights" in parameters:
            common["always"] = {"need_weights": False}
            common["weights"] = {"need_weights": True}
            if "average_attn_weights" in parameters:
                common["weights"] |= {"average_attn_weights": False}
        run = _called_with_three
        needed = needed[3:]
        style = "query, key, value"
    elif needed or any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        run, needed, style = _called_with_one, needed[1:], "x"
    else:
        raise _unknown(module, "takes no input")
    masks = [name for name in needed if name in _MASK_NAMES]
    if others := [name for name in needed if name not in _MASK_NAMES]:
        raise _unknown(module, f"also needs {', '.join(others)}")
    always = {**common.pop("always", {}), **dict.fromkeys(masks)}
    return Calling(style, run, always=always, **common)


def mask_names(module: nn.Module) -> list[str]:
    """Arguments of the module's forward that are masks by their name."""
    parameters = _parameters(module)
    return [name for name in _MASK_NAMES if name in parameters]


def _unknown(module: nn.Module, what: str) -> ArgumentError:
    return ArgumentError(
        "call",
        "must be given for a module that cannot be called as module(x) or module(q, k, v)",
        f"{type(module).__name__}.forward, which {what}",
        "pass call=lambda module, x: ...",
    )


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)


def _called_with_one(module: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
    return module(x, **keywords)


def _called_with_three(module: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
    return module(x, x, x, **keywords)


def _weight_keywords(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any] | None:
    if "return_aux" in parameters:
        return {"return_aux": AuxRequest(weights=True)}
    return next(({name: True} for name in _WEIGHT_NAMES if name in parameters), None)


def _cache(module: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    if hasattr(module, "make_cache") and "cache" in parameters:
        return {"cache": "polyhead", "cache_name": "cache"}
    if "use_cache" in parameters and hasattr(module, "reset_cache"):
        return {"cache": "stateful", "cache_name": "use_cache"}
    for name in _FUNCTIONAL_CACHES:
        if name in parameters:
            options = {"use_cache": True} if "use_cache" in parameters else {}
            return {"cache": "functional", "cache_name": name, "cache_options": options}
    return {}


def _transformers(module: nn.Module) -> Calling:
    """A layer of transformers: the model would pass it rotary positions and an additive mask."""
    parameters = _parameters(module)
    config: Any = getattr(module, "config", None)
    rotary = None
    if "position_embeddings" in parameters:
        rotary = _rotary(module, config)

    def run(layer: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
        first = keywords.pop("_first", 0)
        if rotary is not None:
            positions = torch.arange(first, first + x.shape[1], device=x.device)[None]
            cos, sin = rotary(x, positions)
            keywords["position_embeddings"] = (cos.to(x.dtype), sin.to(x.dtype))
        if "attention_mask" in parameters:
            keywords.setdefault("attention_mask", None)
        return layer(x, **keywords)

    mask = MaskArgument("attention_mask", "full", "add", "as the model passes it")
    weights = None
    if getattr(config, "_attn_implementation", None) == "eager":
        weights = {"output_attentions": True} if "output_attentions" in parameters else {}
    cache = next((n for n in ("past_key_values", "past_key_value") if n in parameters), "")
    return Calling(
        "transformers",
        run,
        mask=mask if "attention_mask" in parameters else None,
        weights=weights,
        cache="transformers" if cache else None,
        cache_name=cache,
    )


def _rotary(module: nn.Module, config: Any) -> nn.Module:
    source = sys.modules[type(module).__module__]
    for name in dir(source):
        if name.endswith("RotaryEmbedding"):
            rotary: nn.Module = getattr(source, name)(config=config)
            return rotary
    raise _unknown(module, "needs position_embeddings")


def _read(returned: Any, T: int) -> Result:
    items = list(_flat(returned))
    tensors = [item for item in items if isinstance(item, Tensor)]
    aux = next((item for item in items if isinstance(item, Aux)), None)
    if not tensors:
        kind = type(returned).__name__
        raise TypeError(f"the call must return a tensor, or several with the output first: {kind}")
    weights = None if aux is None else aux.weights
    cache = None
    for item in items[1:]:
        if weights is None and isinstance(item, Tensor) and _like_weights(item, T):
            weights = item if item.ndim == 4 else item[:, None]
        elif item is not None and not isinstance(item, Aux):
            cache = item
    return Result(tensors[0], weights, cache)


def _flat(returned: Any) -> Iterable[Any]:
    if isinstance(returned, Tensor):
        return [returned]
    if isinstance(returned, Mapping):
        return list(returned.values())
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _like_weights(item: Tensor, T: int) -> bool:
    return item.ndim in (3, 4) and item.shape[-2] == T and item.shape[-1] >= T
