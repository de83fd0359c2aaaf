"""torch's `scaled_dot_product_attention`: its arguments, results and errors, our kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.backends import BACKENDS, choose, is_automatic, skip_reasons
from polyhead.drop_in.recognize import EVERYTHING
from polyhead.drop_in.sdpa_arguments import SdpaArguments, lower
from polyhead.drop_in.sdpa_calls import SdpaCalls
from polyhead.drop_in.sdpa_sizes import size_reason
from polyhead.functional import attention, explain
from polyhead.validate import build_call

__all__ = ["SdpaExplanation", "attend", "explain_sdpa", "scaled_dot_product_attention"]

_CPU = next(backend for backend in BACKENDS if backend.name == "cpu")
_torch_sdpa = torch._C._nn.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` over polyhead's kernels.

    Same arguments, results, gradients and errors. A call that torch computes as fast, or that
    polyhead cannot compute as torch does, is torch's own (`explain_sdpa` gives the reason).
    Dense masks that are causal, windows, padding, prefixes or documents are recognized, exactly,
    and cost what their rule costs.

    Args:
        query: (..., H, T, D) of 2 dimensions or more.
        key: (..., H, S, D), or with `enable_gqa` (..., G, S, D), G a divisor of H.
        value: (..., H or G, S, E). The first dimensions of all three broadcast.
        attn_mask: broadcastable to (..., H, T, S): bool, True = may attend; or added to the scores.
        dropout_p: probability with which a weight is dropped, whenever it is not 0.
        is_causal: query t may attend to keys 0 .. t (upper left).
        scale: factor on the scores; None: 1 / sqrt(D). It may be 0 or negative.
        enable_gqa: query head h uses KV head h // (H / G).

    Returns:
        (..., H, T, E). A query with nothing to attend to gives zeros.

    Raises:
        RuntimeError, TypeError: torch's own, of arguments that torch refuses.

    Source: the documentation of `torch.nn.functional.scaled_dot_product_attention`.

    >>> import polyhead as ph
    >>> query = torch.randn(2, 12, 300, 64)
    >>> ph.drop_in.scaled_dot_product_attention(query, query, query, is_causal=True).shape
    torch.Size([2, 12, 300, 64])
    """
    given = (query, key, value, attn_mask, dropout_p, is_causal)
    return attend(given, {"scale": scale, "enable_gqa": enable_gqa}, None)


def attend(args: tuple[Any, ...], kwargs: dict[str, Any], calls: SdpaCalls | None) -> Tensor:
    """A call of torch's function by polyhead or by torch, counted."""
    routed = _route(args, kwargs)
    if isinstance(routed, str):
        if calls is not None:
            calls.add("torch", routed)
        return _torch_sdpa(*args, **kwargs)
    if calls is not None:
        calls.add("polyhead", _describe(routed))
    return _output(routed)


def _route(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SdpaArguments | str:
    """The arguments for polyhead, or the reason why torch has the call."""
    try:
        lowered = lower(*args, **kwargs)
    except TypeError:  # arguments that do not bind
        return "arguments that torch does not have: torch raises"
    return lowered if isinstance(lowered, str) else _reason(lowered) or lowered


def _reason(a: SdpaArguments) -> str | None:
    """Reason why torch computes this call as well; None: polyhead computes it."""
    if not is_automatic("auto"):  # a backend was named, and has it
        return None
    if (reason := size_reason(a)) is not None:
        return reason
    call = build_call(a.query, a.key, a.value, a.mask, a.bias, a.scale, dropout=a.dropout)
    chosen = choose(call)
    # torch does not recognize masks; `polyhead.attention` gives its kernels what they can use.
    if chosen.name == "cpu" or (chosen.name == "sdpa" and a.recognized is not None):
        return None
    reasons = _CPU.why_not(call) or skip_reasons(_CPU, call)
    return f"polyhead's kernels: {reasons[0]}"


def _output(a: SdpaArguments) -> Tensor:
    output = attention(
        a.query, a.key, a.value, mask=a.mask, bias=a.bias, scale=a.scale, dropout=a.dropout
    )
    if output.shape == a.shape:
        # Layout of torch's fused kernels: the query's, so that heads merge without a copy.
        if a.query.stride(1) < a.query.stride(2):
            return output.transpose(1, 2).contiguous().transpose(1, 2)
        return output
    return output.reshape(a.shape)


def _describe(a: SdpaArguments) -> str:
    if a.recognized is not None:
        return f"recognized: {_rule(a.recognized)}"
    if a.bias is not None:
        return "attn_mask added to the scores"
    return "no mask" if a.mask is None else _rule(a.mask)


def _rule(mask: object) -> str:
    return EVERYTHING if mask is EVERYTHING else repr(mask)


@dataclass(frozen=True)
class SdpaExplanation:
    """Explanation of a call of `scaled_dot_product_attention`. Printing it gives a few lines.

    Attributes:
        by: "polyhead" or "torch".
        why: for torch the reason; for polyhead the mask, and whether it was recognized.
        notes: how polyhead's backend runs it.
    """

    by: str
    why: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"runs: {self.by}", f"  {self.why}", *(f"  {n}" for n in self.notes)])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In a notebook's cell: as it is printed."""
        printer.text(str(self))


def explain_sdpa(*args: Any, **kwargs: Any) -> SdpaExplanation:
    """Explain who computes a call of `scaled_dot_product_attention`; computes nothing.

    Args:
        args, kwargs: as of `scaled_dot_product_attention`.

    >>> query = torch.randn(1, 12, 1024, 64)
    >>> window = torch.ones(1024, 1024, dtype=torch.bool).tril().triu(-511)
    >>> explain_sdpa(query, query, query, attn_mask=window).why
    'recognized: causal() & window(before=511)'
    >>> print(explain_sdpa(query.double(), query.double(), query.double()))
    runs: torch
      float64: polyhead's kernels run float32, bfloat16 and float16
    """
    a = _route(args, kwargs)
    if isinstance(a, str):
        return SdpaExplanation("torch", a)
    options = {"mask": a.mask, "bias": a.bias, "scale": a.scale, "dropout": a.dropout}
    explained = explain(a.query, a.key, a.value, **options)  # type: ignore[arg-type]
    notes = (f"backend {explained.chosen}", *explained.notes)
    return SdpaExplanation("polyhead", _describe(a), notes)
