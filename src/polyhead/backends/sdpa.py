"""torch's own `scaled_dot_product_attention`, held to polyhead's semantics.

It is asked only for what its fused kernels do. Where its conventions differ the call is lowered so
that ours hold: its `is_causal` is upper-left aligned, its masks may leave a query nothing to
attend to, and it repeats key heads in memory when it falls to its math path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.call import AttentionCall, Aux
from polyhead.mask import All, Causal, Mask

__all__ = ["notes", "run", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(call: AttentionCall) -> list[str]:
    """Every reason why this call must not go to `scaled_dot_product_attention`."""
    reasons = []
    if call.dtype not in _DTYPES:
        reasons.append(f"runs float32, bfloat16 and float16; got {_name(call.dtype)}")
    if call.B * call.T * call.S == 0:
        sizes = f"B = {call.B}, T = {call.T}, S = {call.S}"
        reasons.append(f"needs at least one batch row, query and key; got {sizes}")
    if call.softcap is not None:
        reasons.append(f"has no softcap; got softcap = {call.softcap}")
    if call.sinks is not None:
        reasons.append(f"has no sinks; got sinks for {call.H} heads")
    if call.bias is not None and call.bias.dtype != call.dtype:
        reasons.append(
            f"takes a bias of the query's dtype {_name(call.dtype)}; got {_name(call.bias.dtype)}"
        )
    if call.device.type == "cpu":
        reasons.extend(_math_path_reasons(call))
    return reasons


def notes(call: AttentionCall) -> list[str]:
    """How it would run: by structure, or through a mask written out."""
    mask = simplify(call.mask, call.T, call.S)
    if call.bias is None and mask is None:
        return ["fused kernel, no mask"]
    if call.bias is None and _is_upper_left(mask, call.T, call.S):
        return ["fused kernel, is_causal: no T x S tensor"]
    parts = [repr(mask)] if mask is not None else []
    if call.bias is not None:
        parts.append("bias")
    return [f"fused kernel, {' and '.join(parts)} written out, T = {call.T} by S = {call.S}"]


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E); aux is left to the definition."""
    mask = simplify(call.mask, call.T, call.S)
    if call.bias is None and (mask is None or _is_upper_left(mask, call.T, call.S)):
        return _kernel(call, attn_mask=None, is_causal=mask is not None), Aux()
    attn_mask, attends = _written_out(call, mask)
    output = _kernel(call, attn_mask=attn_mask, is_causal=False)
    # `where` also stops the gradient: a query with nothing to attend to gives and gets zeros.
    return torch.where(attends, output, 0.0), Aux()


def simplify(mask: Mask | None, T: int, S: int) -> Mask | None:
    """The same rule for this T and S, without the parts that forbid nothing.

    One query that stands at the last key (decoding) sees every key before it.
    """
    if mask is None:
        return None
    parts = tuple(
        part
        for part in mask.conjuncts
        if not (T == 1 and isinstance(part, Causal) and part.align == "end")
    )
    if len(parts) == len(mask.conjuncts):
        return mask
    return All(parts) if len(parts) > 1 else next(iter(parts), None)


def _math_path_reasons(call: AttentionCall) -> list[str]:
    """What makes torch's CPU dispatcher leave its fused kernel and hold T x S scores."""
    fall = "torch then holds T x S scores and repeats key heads (its math path on CPU)"
    reasons = []
    # The switch is for every device. torch.compile cannot trace the question.
    if not torch.compiler.is_compiling() and not torch.backends.cuda.flash_sdp_enabled():
        reasons.append(f"has its fused kernel switched off (enable_flash_sdp, sdpa_kernel); {fall}")
    if call.dropout > 0.0:
        reasons.append(f"has no dropout in its CPU kernel; got dropout = {call.dropout}; {fall}")
    if call.E != call.D:
        reasons.append(f"needs E = D; got D = {call.D}, E = {call.E}; {fall}")
    if call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled():
        reasons.append(f"gives no gradient to a bias; {fall}")
    return reasons


def _is_upper_left(mask: Mask | None, T: int, S: int) -> bool:
    return isinstance(mask, Causal) and (mask.align == "start" or T == S)


def _written_out(call: AttentionCall, mask: Mask | None) -> tuple[Tensor, Tensor]:
    """The mask and bias as one `attn_mask`, and which queries attend to anything, (..., T, 1)."""
    allowed = None if mask is None else mask.materialize(call.T, call.S, device=call.device)
    if call.bias is None:
        assert allowed is not None
        attends = allowed.any(dim=-1, keepdim=True)
        return allowed | ~attends, attends
    # The fused kernels take a bias of 2 or 4 dimensions only.
    attn_mask = call.bias.reshape((1,) * (4 - call.bias.ndim) + call.bias.shape)
    if allowed is not None:
        attn_mask = attn_mask.masked_fill(~allowed, float("-inf"))
    attends = (attn_mask != float("-inf")).any(dim=-1, keepdim=True)
    return attn_mask.masked_fill(~attends, 0.0), attends


def _kernel(call: AttentionCall, *, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        _packed(call.query),
        _packed(call.key),
        _packed(call.value),
        attn_mask=attn_mask,
        dropout_p=call.dropout,
        is_causal=is_causal,
        scale=call.scale,
        enable_gqa=call.group > 1,
    )


def _packed(tensor: Tensor) -> Tensor:
    """The tensor with its features side by side: a fused kernel takes no other layout."""
    if tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
