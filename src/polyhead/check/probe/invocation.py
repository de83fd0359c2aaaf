"""Calls of arbitrary attention modules: arguments in, results out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.call import Aux
from polyhead.check.law import NotApplicable
from polyhead.errors import ArgumentError

__all__ = ["FORMS", "Calling", "MaskArgument", "Result"]

# Mask formats: (batch, tokens), shapes that broadcast to (batch, heads, T, S), or (batch) number of
# real tokens.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "keys": lambda allowed: allowed[:, 0, -1],
    "full": lambda allowed: allowed,
    "square": lambda allowed: allowed[0, 0],
    "batch": lambda allowed: allowed[:, 0],
    "lengths": lambda allowed: _lengths(allowed[:, 0, -1]),
}


@dataclass(frozen=True)
class MaskArgument:
    """Mask argument of a module, and its format.

    Attributes:
        name: name of the argument.
        form: a key of `FORMS`.
        true_means: "attend" or "ignore" for a boolean; "add" for an additive mask; "count" for
            lengths.
        how: origin of these facts.
    """

    name: str
    form: str
    true_means: str
    how: str = ""

    def __str__(self) -> str:
        words = {"add": "added to the scores", "count": "number of real tokens"}
        meaning = words.get(self.true_means, f"True means {self.true_means}")
        return f"{self.name}, form {self.form}, {meaning}"

    def given(self, allowed_b1ts: Tensor, dtype: torch.dtype) -> Tensor:
        allowed = FORMS[self.form](allowed_b1ts)
        if self.true_means in ("attend", "count"):
            return allowed
        if self.true_means == "ignore":
            return ~allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, float("-inf")
        )


@dataclass(frozen=True)
class Result:
    """Result of a call: the output (B, T, features), weights (B, H, T, S), and a cache."""

    output: Tensor
    weights: Tensor | None = None
    cache: Any = None


@dataclass(frozen=True)
class Calling:
    """Calling convention of a module. Laws vary a call only through it.

    Attributes:
        style: one of the styles in `polyhead.check.probe.signature`, or "yours".
        run: `run(module, x, keywords)`: the call itself, with x (B, T, features).
        mask: the mask argument, if there is one.
        supplies: function of T that returns a mask (T, T) for every call, as a model would; or
            None.
        weights: keywords that request attention weights.
        always: keywords of every call.
        cache: protocol of its cache: "polyhead", "transformers", "functional", "stateful", or
            another of `polyhead.check.probe.caches.STARTS`.
        cache_name: the cache argument.
        cache_options: keywords that come with it.
        placed: arguments that position tokens after the cached ones, and their format: "count" (an
            integer), "row" (T) or "rows" (1, T).
        batch_first: False if tensors are (T, B, features).
        weights_come: True if results shaped like weights are weights.
        told: addition to the style in the report.
        positions: the argument for passed positions, if there is one.
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
    placed: Mapping[str, str] = field(default_factory=dict)
    batch_first: bool = True
    weights_come: bool = True
    told: str = ""
    positions: str = ""

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
            module: the module.
            x: (B, T, features).
            allowed: (B, 1, T, T) True where a query may attend, in addition to the module's mask.
            weights: request the attention weights.
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
        if not self.weights_come:
            result = replace(result, weights=None)
        if self.batch_first:
            return result
        return replace(result, output=result.output.transpose(0, 1))


def _lengths(real: Tensor) -> Tensor:
    """Number of real tokens, (B), of key masks (B, S) that exclude only the last tokens."""
    counts = real.sum(dim=-1)
    if not torch.equal(real, torch.arange(real.shape[-1], device=real.device) < counts[:, None]):
        raise NotApplicable("its mask argument takes lengths, which exclude the last tokens only")
    return counts


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
        if isinstance(item, Tensor) and _like_weights(item, T):
            # The last one: T5's layers return their position bias first.
            weights = item if item.ndim == 4 else item[:, None]
        elif item is not None and not isinstance(item, Aux):
            cache = item
    return Result(tensors[0], weights, cache)


def _flat(returned: Any) -> Iterable[Any]:
    if isinstance(returned, Mapping):
        return list(returned.values())
    if isinstance(returned, (tuple, list)):
        return list(returned)
    if dataclasses.is_dataclass(returned) and not isinstance(returned, type):
        return [getattr(returned, f.name) for f in dataclasses.fields(returned)]
    return [returned]


def _like_weights(item: Tensor, T: int) -> bool:
    # Key indices, as sparse attention returns, are not weights.
    shaped = item.ndim in (3, 4) and item.is_floating_point()
    return shaped and item.shape[-2] == T and item.shape[-1] >= T
