"""torch's `flex_attention`, compiled: mask and score rules become parts of one fused kernel.

Source: Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention
Kernels".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from polyhead.backends.flex import block_mask as flex_mask
from polyhead.backends.reasons import dtype_reasons, tracing_reasons, transform_reasons
from polyhead.call import AttentionCall, Aux

__all__ = ["auto_skip", "notes", "run", "why_not"]

_MIN_CUDA_HEAD_DIM = 16  # Triton's smallest matrix product
# torch's 8 would be used up by a few head sizes and masks; beyond the limit it raises.
_KINDS_OF_CALL = 256

ScoreRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def why_not(call: AttentionCall) -> list[str]:
    """Every reason why this call must not go to `flex_attention`."""
    reasons = dtype_reasons(call)
    if call.B * call.T * call.S * call.E == 0:
        sizes = f"B = {call.B}, T = {call.T}, S = {call.S}, E = {call.E}"
        reasons.append(f"needs B, T, S and E of at least 1; got {sizes}")
    if call.dropout > 0.0:
        reasons.append(f"has no dropout; got dropout = {call.dropout}")
    reasons.extend(_offset_reasons(call))
    reasons.extend(transform_reasons())
    reasons.extend(tracing_reasons())
    unknown = flex_mask.unknown(call.mask)
    if unknown:
        reasons.append(f"lowers the masks of polyhead.mask; got {', '.join(unknown)}")
    if call.device.type == "cpu":
        reasons.extend(_cpu_reasons(call))
    elif call.device.type == "cuda":
        reasons.extend(_cuda_reasons(call))
    else:
        reasons.append(f"runs on cpu and cuda; got {call.device.type}")
    return reasons


def auto_skip(call: AttentionCall, can_run: Callable[[str], bool]) -> list[str]:
    """Why "auto" does not take it although it could run."""
    if call.device.type == "cpu":
        return ["compiles for seconds each new size and kind of mask on cpu"]
    return []


def notes(call: AttentionCall) -> list[str]:
    """How it would run, and what it holds beside the tensors it is given."""
    size = f"{flex_mask.blocks(call.T)} x {flex_mask.blocks(call.S)}"
    size += f" blocks of {flex_mask.BLOCK} x {flex_mask.BLOCK}"
    if call.mask is None:
        how = f"no mask, {size}"
    elif flex_mask.is_opaque(call.mask):
        how = f"{call.mask!r} asked in all of {size}"
    else:
        how = f"{call.mask!r}, skipping what it forbids of {size}"
    return [
        f"compiled kernel, {how}: no T x S tensor",
        "compiles for seconds each new kind of call: dtype, head sizes, mask"
        + (", and on cpu each T and S" if call.device.type == "cpu" else ""),
    ]


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E); aux is left to the definition."""
    assert not isinstance(call.query_offset, Tensor)  # see _offset_reasons
    options: dict[str, Any] = {
        "score_mod": _score_rule(call),
        # Also where all may attend: torch's default, one block, holds T x S scores on a cpu.
        "block_mask": flex_mask.block_mask(
            call.mask, call.T, call.S, call.device, call.query_offset
        ),
        "scale": call.scale,
        "enable_gqa": call.group > 1,
    }
    query, key, value = call.query, call.key, call.value
    if call.device.type == "cpu":
        # It refuses what requires a gradient even where none is recorded, as in torch.no_grad().
        query, key, value = query.detach(), key.detach(), value.detach()
        # A partition that is no multiple of a block keeps it from its decoding kernel (T = 1 and
        # long S), which is wrong where blocks have no allowed pair (torch 2.13; tests/backends).
        options["kernel_options"] = {"PARTITION_SIZE": 1}
    if call.sinks is None:
        return _flex_attention(query, key, value, **options), Aux()
    from torch.nn.attention.flex_attention import AuxRequest

    output, aux = _flex_attention(query, key, value, return_aux=AuxRequest(lse=True), **options)
    # The weights' share of exp(lse) + exp(sink). Where lse is -inf it is 0.
    share_bht = torch.sigmoid(aux.lse - call.sinks[:, None])
    return (output * share_bht[..., None]).to(call.dtype), Aux()


def _offset_reasons(call: AttentionCall) -> list[str]:
    if isinstance(call.query_offset, Tensor):
        return ["has one query_offset for all batch rows; got one per row"]
    if call.query_offset is not None and not 0 <= call.query_offset <= call.S - call.T:
        return [
            "needs queries at positions of keys; got query_offset = "
            f"{call.query_offset}, T = {call.T}, S = {call.S}"
        ]
    return []


def _cpu_reasons(call: AttentionCall) -> list[str]:
    reasons = []
    # torch.compile cannot trace the question.
    if not torch.compiler.is_compiling() and not torch.cpu._is_avx2_supported():
        reasons.append("needs a cpu with AVX2")
    if _may_lose_keys(call.S):
        sizes = f"some multiples of 8 keys below {flex_mask.BLOCK}"
        reasons.append(f"is wrong for {sizes} on cpu; got S = {call.S}")
    if call.sinks is not None:
        reasons.append(f"gives no lse on cpu, which sinks need; got sinks for {call.H} heads")
    if call.needs_grad:
        reasons.append(f"has no backward on cpu; got requires_grad of {', '.join(call.grad_names)}")
    return reasons


def _may_lose_keys(S: int) -> bool:
    """Torch's kernel does of 8, 24, 40, 56 and 72 keys, with heads of 8 and 16 numbers (torch 2.13,
    AVX2); where, may depend on the processor."""
    if torch.compiler.is_compiling():
        # Where the number is open, to ask would fix it.
        from torch.fx.experimental.symbolic_shapes import statically_known_true as known

        return known(S > 0) and known(S < flex_mask.BLOCK) and known(S % 8 == 0)
    return 0 < S < flex_mask.BLOCK and S % 8 == 0


def _cuda_reasons(call: AttentionCall) -> list[str]:
    reasons = []
    if min(call.D, call.E) < _MIN_CUDA_HEAD_DIM:
        least = f"needs D and E of at least {_MIN_CUDA_HEAD_DIM} on cuda"
        reasons.append(f"{least}; got D = {call.D}, E = {call.E}")
    # torch.compile cannot trace the question; it would itself miss the package.
    if not torch.compiler.is_compiling() and find_spec("triton") is None:
        reasons.append("needs the package triton on cuda; it is not installed")
    return reasons


def _flex_attention(*args: Any, **options: Any) -> Any:
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(*args, **options)
    # Numbers of the call (scale, softcap) are part of a kernel: torch cannot lower symbolic ones.
    with torch._dynamo.config.patch(recompile_limit=_KINDS_OF_CALL, specialize_float=True):
        return _compiled(args[0].device.type)(*args, **options)


@functools.cache
def _compiled(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # The C++ that torch writes for symbolic sizes does not compile (torch 2.13).
    dynamic = False if device_type == "cpu" else None
    # Whole, or it would fall back to an unfused form that holds T x S scores.
    return torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)


def _score_rule(call: AttentionCall) -> ScoreRule | None:
    """What happens to a scaled score before the mask, in the definition's order."""
    if call.softcap is None and call.bias is None and call.alibi_slopes is None:
        return None
    softcap, slopes = call.softcap, call.alibi_slopes
    assert isinstance(call.first_position, int)
    offset = flex_mask.number(call.first_position, call.device)
    bias = None if call.bias is None else flex_mask.entry(call.bias)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias(b, h, q, k)
        if slopes is not None:
            score = score - slopes[h] * (q + offset - k).abs()
        return score

    return score_mod
