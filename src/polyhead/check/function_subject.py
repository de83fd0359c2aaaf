"""Functions called like scaled_dot_product_attention: arguments by purpose, and the reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.backends import reference
from polyhead.call import AttentionCall, AuxRequest
from polyhead.check.diagnose.cases import Case
from polyhead.check.law import NotApplicable
from polyhead.mask import causal, dense

__all__ = ["FunctionSubject", "definition"]

# Arguments by purpose. The first name in the signature is used.
_NAMES = {
    "mask": ("attn_mask", "mask", "attention_mask"),
    "causal": ("is_causal", "causal"),
    "scale": ("scale", "softmax_scale", "sm_scale"),
    "softcap": ("softcap", "logits_soft_cap"),
    "dropout": ("dropout_p", "dropout"),
    "grouped": ("enable_gqa",),
}
# Builtins have no readable signature.
_SDPA = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class FunctionSubject:
    """Function under check, with the calls that laws of functions make.

    Args:
        function: `function(query, key, value, ...)`, (B, H, T, D) and (B, G, S, D) in, and
            (B, H, T, E) out, or a tuple that begins with it.
        mask_true: meaning of True in its mask, "attend" or "ignore".
        layout: "heads first" (B, H, T, D), or "tokens first" (B, T, H, D).
        seed: seed of the generated calls.
        dtype: dtype of the generated calls.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        mask_true: str = "attend",
        layout: str = "heads first",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.function = function
        self.mask_true = mask_true
        self.layout = layout
        self.seed = seed
        self.dtype = dtype
        self.names = _find_names(function)
        self.polyhead = getattr(function, "__module__", "").startswith("polyhead.")

    def name_of(self, purpose: str) -> str:
        """Return the argument for a purpose; NotApplicable if there is none."""
        if purpose not in self.names:
            raise NotApplicable(f"it has no argument named {' or '.join(_NAMES[purpose])}")
        return self.names[purpose]

    def run(self, case: Case, inputs: Sequence[Tensor] | None = None, **more: Any) -> Tensor:
        """Return the function's output for a case, (B, H, T, E)."""
        query, key, value = case.inputs(self.dtype) if inputs is None else inputs
        keywords = self._keywords(case, query.dtype) | more
        if self.layout == "tokens first":
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        returned = self.function(query, key, value, **keywords)
        output: Tensor = returned[0] if isinstance(returned, (tuple, list)) else returned
        return output.transpose(1, 2) if self.layout == "tokens first" else output

    def _keywords(self, case: Case, dtype: torch.dtype) -> dict[str, Any]:
        keywords: dict[str, Any] = {}
        if case.scale is not None:
            keywords[self.name_of("scale")] = case.scale
        if case.softcap is not None:
            keywords[self.name_of("softcap")] = case.softcap
        if case.H != case.G and "grouped" in self.names:
            keywords[self.names["grouped"]] = True
        if self.polyhead:
            return keywords | self._polyhead_mask(case)
        if case.causal is not None:
            keywords[self.name_of("causal")] = True
        if case.mask is not None:
            allowed = case.allowed()
            assert allowed is not None
            name = self.name_of("mask")
            if case.mask == "additive":
                zeros = torch.zeros(allowed.shape, dtype=dtype)
                keywords[name] = zeros.masked_fill(~allowed, float("-inf"))
            else:
                keywords[name] = allowed if self.mask_true == "attend" else ~allowed
        return keywords

    def _polyhead_mask(self, case: Case) -> dict[str, Any]:
        allowed = case.allowed()
        masks = [] if allowed is None else [dense(allowed)]
        if case.causal is not None:
            masks.append(causal("start" if case.causal == "start" else "end"))
        if not masks:
            return {}
        return {"mask": masks[0] if len(masks) == 1 else masks[0] & masks[1]}


def definition(case: Case, inputs: Sequence[Tensor]) -> Tensor:
    """Return the reference output of a case, in the dtype of the inputs."""
    query, key, value = inputs
    mask = None if (own := case.allowed()) is None else dense(own)
    if case.causal is not None:
        rule = causal("start" if case.causal == "start" else "end")
        mask = rule if mask is None else mask & rule
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=mask,
        bias=None,
        scale=case.D**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        sinks=None,
        alibi_slopes=None,
        dropout=0.0,
        aux=AuxRequest(),
    )
    return reference.run(call)[0]


def _find_names(function: Callable[..., Any]) -> Mapping[str, str]:
    try:
        parameters: Sequence[str] = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = _SDPA
    found = {}
    for purpose, names in _NAMES.items():
        if known := [name for name in names if name in parameters]:
            found[purpose] = known[0]
    return found
