"""torch's own `scaled_dot_product_attention`, held to polyhead's semantics.

It is asked only for what its fused kernels do. Where its conventions differ the call is lowered so
that ours hold: its `is_causal` is upper-left aligned, its masks may leave a query nothing to
attend to, and it repeats key heads in memory when it falls to its math path. One difference is
left: infinity or NaN in a *key* that a query may not attend to can reach its output.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from polyhead.backends.layout import maybe_contiguous
from polyhead.backends.reasons import (
    custom_reasons,
    dtype_name,
    dtype_reasons,
    transform_reasons,
)
from polyhead.backends.tracing import is_traced
from polyhead.call import AttentionCall, Aux
from polyhead.mask import Causal, Mask
from polyhead.mask.algebra import conjunction

__all__ = ["notes", "run", "why_not"]

# Above this many cells a mask is written out in chunks of so many queries: linear memory, and
# keys out of a window's reach are not visited.
_WHOLE = 2**20
_ROWS = 512

_KERNELS = {
    SDPBackend.MATH.value: "math path",
    SDPBackend.FLASH_ATTENTION.value: "flash kernel",
    SDPBackend.EFFICIENT_ATTENTION.value: "memory-efficient kernel",
    SDPBackend.CUDNN_ATTENTION.value: "cuDNN kernel",
    SDPBackend.OVERRIDEABLE.value: "kernel of this device",
}


def why_not(call: AttentionCall) -> list[str]:
    """Every reason why this call must not go to `scaled_dot_product_attention`."""
    reasons = dtype_reasons(call)
    if call.B * call.T * call.S == 0:
        sizes = f"B = {call.B}, T = {call.T}, S = {call.S}"
        reasons.append(f"needs at least one batch row, query and key; got {sizes}")
    # Its kernels forbid before they scale: -inf times 0 is NaN, and times -1 what wins.
    if call.scale <= 0.0:
        reasons.append(f"needs a scale above 0; got scale = {float(call.scale)}")
    if call.softcap is not None:
        reasons.append(f"has no softcap; got softcap = {call.softcap}")
    if call.sinks is not None:
        reasons.append(f"has no sinks; got sinks for {call.H} heads")
    reasons.extend(custom_reasons(call.mask))
    reasons.extend(transform_reasons())
    # (Asked before the number of heads: it is symbolic in a graph.)
    if is_traced() and torch.onnx.is_in_onnx_export() and call.group > 1:
        reasons.append(
            f"has no grouped heads in torch.onnx's traced export; got H / G = {call.group}"
        )
    if call.device.type != "cpu" and call.dtype != torch.float32:
        reasons.extend(_wide_bias_reasons(call))
    if call.device.type == "cpu":
        reasons.extend(_math_path_reasons(call))
    return reasons


def notes(call: AttentionCall) -> list[str]:
    """How it would run: which kernel of torch's, and by structure or a mask written out."""
    call = simplify(call)
    kernel = _kernel_name(call)
    if not _writes_out(call):
        how = "no mask" if call.mask is None else "is_causal: no T x S tensor"
        return [f"torch's {kernel}, {how}"]
    parts = [repr(call.mask)] if call.mask is not None else []
    parts += ["bias"] if call.bias is not None else []
    parts += ["ALiBi"] if call.alibi_slopes is not None else []
    chunks = _chunks(call)
    size = f"T = {call.T} by S = {call.S}"
    if len(chunks) > 1:
        widest = max(last - first for _, _, first, last in chunks)
        size += f", {_ROWS} queries by at most {widest} keys at a time"
    return [f"torch's {kernel}, {' and '.join(parts)} written out, {size}"]


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E); aux is left to the definition."""
    call = simplify(call)
    if not _writes_out(call):
        is_causal = call.mask is not None
        return _kernel(call, call.query, call.key, call.value, is_causal=is_causal), Aux()
    chunks = _chunks(call)
    if len(chunks) == 1:
        return _attend_chunk(call, *chunks[0]), Aux()
    if call.needs_grad:
        # Kept for the backward pass, the chunks' masks would together be T x S: written out again.
        outputs = [checkpoint(_attend_chunk, call, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        outputs = [_attend_chunk(call, *chunk) for chunk in chunks]
    return torch.cat(outputs, dim=2), Aux()


def simplify(call: AttentionCall) -> AttentionCall:
    """The same call, its mask without the parts that forbid nothing for these sizes.

    One query at the last key's position (decoding) attends to every key before it.
    """
    # A trace would keep what holds for these sizes.
    if call.mask is None or call.T != 1 or call.query_offset is not None or is_traced():
        return call
    parts = call.mask.conjuncts
    needed = [p for p in parts if not (isinstance(p, Causal) and p.align == "end")]
    return call if len(needed) == len(parts) else replace(call, mask=conjunction(needed))


def _wide_bias_reasons(call: AttentionCall) -> list[str]:
    """Beside 16-bit queries only the CPU kernel takes numbers of 32 bits to add to the scores."""
    reasons = []
    if call.bias is not None and call.bias.dtype != call.dtype:
        asked, got = dtype_name(call.dtype), dtype_name(call.bias.dtype)
        reasons.append(f"takes a bias of the query's dtype {asked}; got {got}")
    if call.alibi_slopes is not None:
        reasons.append(f"would round ALiBi to {dtype_name(call.dtype)}; got alibi_slopes")
    return reasons


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
    reasons += [
        f"gives no gradient to {name}; {fall}"
        for name in call.grad_names
        if name in ("bias", "alibi_slopes")
    ]
    return reasons


def _kernel_name(call: AttentionCall) -> str:
    """Which of its kernels torch would take."""
    if call.device.type == "meta":
        return "fused kernel"
    attn_mask = None
    if _writes_out(call):
        # The choice is by dtype and shape; one that broadcasts costs no memory.
        attn_mask = call.query.new_zeros(1).expand(call.B, call.H, call.T, call.S)
    choice = torch._fused_sdp_choice(
        call.query,
        call.key,
        call.value,
        attn_mask,
        call.dropout,
        is_causal=attn_mask is None and call.mask is not None,
        scale=call.scale,
        enable_gqa=call.group > 1,
    )
    return _KERNELS[choice]


def _writes_out(call: AttentionCall) -> bool:
    """Whether the kernel needs its mask as a tensor."""
    if call.bias is not None or call.alibi_slopes is not None:
        return True
    return call.mask is not None and not _is_upper_left(call.mask, call)


def _is_upper_left(mask: Mask, call: AttentionCall) -> bool:
    if not isinstance(mask, Causal):
        return False
    # (A trace may be run with other sizes than it was made with.)
    is_square = not is_traced() and call.query_offset is None and call.T == call.S
    return mask.align == "start" or is_square


def _chunks(call: AttentionCall) -> list[tuple[int, int, int, int]]:
    """Queries start .. stop - 1 against keys first .. last - 1, so that no mask is T x S."""
    # A graph would have one branch a chunk, and so be for one length only.
    if torch.compiler.is_compiling() or is_traced() or call.T * call.S <= _WHOLE:
        return [(0, call.T, 0, call.S)]
    starts = range(0, call.T, _ROWS)
    spans = [(start, min(start + _ROWS, call.T)) for start in starts]
    return [(*span, *call.key_range(*span)) for span in spans]


def _attend_chunk(call: AttentionCall, start: int, stop: int, first: int, last: int) -> Tensor:
    """Some queries against the keys they can reach, through a mask written out."""
    if first >= last:
        return call.query.new_zeros(call.B, call.H, stop - start, call.E)
    attn_mask, attends = _written_out(call, start, stop, first, last)
    output = _kernel(
        call,
        call.query[:, :, start:stop],
        call.key[:, :, first:last],
        call.value[:, :, first:last],
        attn_mask=attn_mask,
    )
    # `where` also stops the gradient: a query with nothing to attend to gives and gets zeros.
    return torch.where(attends, output, 0.0)


def _written_out(
    call: AttentionCall, start: int, stop: int, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """The mask and bias as one `attn_mask`, and which queries, (..., rows, 1), attend at all."""
    allowed = call.allowed(start, stop, (first, last))
    bias = _bias(call, start, stop, first, last)
    if bias is None:
        assert allowed is not None
        attends = allowed.any(dim=-1, keepdim=True)
        return allowed | ~attends, attends
    if allowed is not None:
        bias = bias.masked_fill(~allowed, float("-inf"))
    attends = (bias != float("-inf")).any(dim=-1, keepdim=True)
    return bias.masked_fill(~attends, 0.0), attends


def _bias(call: AttentionCall, start: int, stop: int, first: int, last: int) -> Tensor | None:
    """What is added to the scores of this chunk: the bias and ALiBi, of four dimensions."""
    bias = None
    if call.bias is not None:
        # The fused kernels take a bias of 2 or 4 dimensions only.
        bias = call.bias.reshape((1,) * (4 - call.bias.ndim) + call.bias.shape)
        bias = bias if bias.shape[2] == 1 else bias[:, :, start:stop]
        bias = bias if bias.shape[3] == 1 else bias[..., first:last]
    if call.alibi_slopes is None:
        return bias
    offset = call.first_position
    if isinstance(offset, Tensor) and offset.ndim:  # a traced size has none
        offset = offset[:, None, None, None]
    query = torch.arange(start, stop, device=call.device)[:, None] + offset
    distance = (query - torch.arange(first, last, device=call.device)).abs()
    alibi = -call.alibi_slopes.float()[None, :, None, None] * distance
    return alibi if bias is None else alibi + bias


def _kernel(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    return F.scaled_dot_product_attention(
        maybe_contiguous(query),
        maybe_contiguous(key),
        maybe_contiguous(value),
        attn_mask=attn_mask,
        dropout_p=call.dropout,
        is_causal=is_causal,
        scale=call.scale,
        # A branch: torch.compile may make the comparison symbolic, which the kernel does not take.
        enable_gqa=True if call.group > 1 else False,  # noqa: SIM210
    )
