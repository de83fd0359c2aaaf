"""polyhead's own C++ kernels for the processor (csrc/): no T x S tensor, every variant fused.

Semantics are those of `reference`, with one difference in what is undefined anyway: NaN or
infinity in a *value* that a query may not attend to reaches its output there (0 * NaN), and here
only where it shares a tile with values that it may attend to.

Any number of Python threads may call at once. So may a process forked after its parent called,
where torch's own parallel operations hang: there the thread that forked runs each call of more than
one thread on a new team.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyhead.backends.cpu import ops
from polyhead.backends.layout import maybe_contiguous
from polyhead.backends.mask_ranges import read_ranges
from polyhead.backends.reasons import (
    custom_reasons,
    dtype_reasons,
    tracing_reasons,
    transform_reasons,
)
from polyhead.backends.tracing import is_recorded, is_traced
from polyhead.cache_view import CacheView
from polyhead.call import NO_AUX, AttentionCall, Aux, HeadStats
from polyhead.mask import Causal, Mask

__all__ = [
    "auto_skip",
    "backward",
    "forward",
    "notes",
    "reads_cache_views",
    "run",
    "try_fast_path",
    "why_not",
]

_KERNEL_NOTES = {
    "decode": "K and V are read once, in place, split among the threads",
    "chunked prefill": "K and V are packed block by block, each used at once for all queries",
    "prefill": "K and V are packed once per KV head",
}
_FEW_WEIGHTS = 2**14


def why_not(call: AttentionCall) -> list[str]:
    """Every reason why the kernels cannot run this call."""
    reasons = []
    if ops.unavailable:
        reasons.append(ops.unavailable)
    if not call.query.is_cpu:
        reasons.append(f"runs on the CPU; got device {call.device}")
    reasons.extend(dtype_reasons(call))
    if not ops.unavailable:
        reasons.extend(_size_reasons(call))
    if call.alibi_slopes is not None and "alibi_slopes" in call.grad_names:
        reasons.append("gives no gradient to alibi_slopes")
    reasons.extend(custom_reasons(call.mask))
    reasons.extend(transform_reasons())
    reasons.extend(tracing_reasons())
    return reasons


def _size_reasons(call: AttentionCall) -> list[str]:
    reasons = []
    (T, D), (S, E) = call.query.shape[2:], call.value.shape[2:]
    if max(D, E) > ops.max_head_size:
        reasons.append(f"has heads of up to {ops.max_head_size}; got D = {D}, E = {E}")
    if max(T, S) > ops.max_tokens:
        reasons.append(f"has up to {ops.max_tokens} tokens; got T = {T}, S = {S}")
    return reasons


def auto_skip(call: AttentionCall, can_run: Callable[[str], bool]) -> list[str]:
    """Why "auto" leaves a call to torch: matrix units that these kernels do not use, exported
    programs, and small examples with dropout, whose digits should be those of the same lines typed
    by hand."""
    if call.dtype == torch.bfloat16 and _has_amx():
        # Not what a cache holds, of which torch would need tensors made; and not decoding: reading
        # keys is what takes time then, and matrix units read no faster. (torch.compile would make
        # the question a graph for few queries alone.)
        is_decoding = not torch.compiler.is_compiling() and _kernel(call) == "decode"
        if call.cache_views is None and not is_decoding and can_run("sdpa"):
            return ["uses no AMX, and torch's own bfloat16 kernel does on this processor"]
    if is_recorded():
        return ["would tie an exported program to this library; torch's own operators do not"]
    if call.dropout > 0.0:
        weights = call.B * call.H * call.T * call.S
        if weights <= _FEW_WEIGHTS:
            return [
                f"drops by its own generator; {weights} weights are few enough to drop as "
                "F.dropout does for this seed"
            ]
    return []


def reads_cache_views(call: AttentionCall) -> bool:
    """True if cached keys and values are read in place: in inference, unless weights, which are
    T x S numbers anyway, are requested."""
    return not (call.needs_grad or call.aux.weights or call.aux.mean_weights)


def notes(call: AttentionCall) -> list[str]:
    """Return the instruction set, the threads, and the kernel that runs."""
    threads = torch.get_num_threads()
    many = f"up to {threads} threads" if threads > 1 else "1 thread"
    noted = [f"{ops.isa()} kernels, {many}"]
    kernel = _kernel(call)
    noted.append(f"{kernel} kernel: {_KERNEL_NOTES[kernel]}")
    if call.cache_views is not None:
        noted.append(f"cached keys and values read in place: {call.cache_views[0]}")
    rest = read_ranges(call.mask, call.T, call.S, call.query_offset).unstructured
    if rest is not None:
        noted.append(f"{rest!r} materialized as a bool tensor")
    return noted


def _kernel(call: AttentionCall) -> str:
    D, E = call.query.shape[-1], call.value.shape[-1]
    return ops.kernel(call.B, call.H, call.G, call.T, call.S, D, E, call.needs_grad)


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E), and the requested aux, of which only lse has a gradient."""
    operators, query, variant = torch.ops.polyhead, maybe_contiguous(call.query), _variant(call)
    if call.cache_views is not None:
        keys, values = call.cache_views
        places = (
            keys.data,
            values.data,
            keys.scales,
            values.scales,
            keys.block_table,
            keys.num_tokens,
        )
        output, lse, saved = operators.attention_cached(query, *places, *variant, call.aux.stats)
        return output, _aux(call, query, variant, lse, saved)
    key, value = maybe_contiguous(call.key), maybe_contiguous(call.value)
    if call.needs_grad:
        attend = operators.attention_forward
    elif call.aux.names:
        attend = operators.attention_inference
    else:
        return operators.attention_output(query, key, value, *variant), NO_AUX
    output, lse, saved = attend(query, key, value, *variant, call.aux.stats)
    return output, _aux(call, query, variant, lse, saved)


def forward(call: AttentionCall) -> tuple[Tensor, Aux, tuple[Tensor, ...], tuple[Any, ...]]:
    """Forward pass of `backends.Derivative`."""
    query, key, value = map(maybe_contiguous, (call.query, call.key, call.value))
    variant = _variant(call)
    # Through autograd's keys an operator takes twice as long as a short call.
    with torch._C._AutoDispatchBelowAutograd():
        output, lse, saved = torch.ops.polyhead.attention_forward(
            query, key, value, *variant, call.aux.stats
        )
        return output, _aux(call, query, variant, lse, saved), (saved,), variant


def backward(
    call: AttentionCall,
    output: Tensor,
    saved: tuple[Tensor, ...],
    variant: tuple[Any, ...],
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
) -> dict[str, Tensor]:
    """Backward pass of `backends.Derivative`."""
    given = call.tensors
    needed = {name for name, x in given.items() if x.requires_grad}
    with torch._C._AutoDispatchBelowAutograd():
        inputs = map(maybe_contiguous, (call.query, call.key, call.value))
        arguments = dict(zip(ops.forward_names, (*inputs, *variant), strict=False))
        grads = ops.gradients(arguments, output, saved[0], grad_output, grad_lse, needed)
        return {name: grad.to(given[name].dtype) for name, grad in grads.items()}


def _variant(call: AttentionCall) -> tuple[Any, ...]:
    """The operators' arguments after keys and values, from `bias` to `dropout`."""
    offset = call.query_offset
    ranges = read_ranges(call.mask, call.T, call.S, offset)
    allowed = None
    if ranges.unstructured is not None:
        allowed = ranges.unstructured.materialize(
            call.T, call.S, query_offset=offset, device=call.device
        )
    if isinstance(offset, int):
        offset = torch.tensor([offset])
    return (
        call.bias,
        allowed,
        ranges.lengths,
        ranges.padding,
        ranges.documents,
        offset,
        None if call.sinks is None else call.sinks.float().contiguous(),
        None if call.alibi_slopes is None else call.alibi_slopes.float().contiguous(),
        torch.randint(2**62, (1,)) if call.dropout > 0.0 else None,
        ranges.band,
        call.scale,
        0.0 if call.softcap is None else call.softcap,
        call.dropout,
    )


def _aux(
    call: AttentionCall, query: Tensor, variant: tuple[Any, ...], lse: Tensor, saved: Tensor
) -> Aux:
    if not call.aux.names:
        return NO_AUX
    *masks, _, slopes, _, band, scale, softcap, _ = variant

    def weights(mean: bool) -> Tensor:
        written: Tensor = torch.ops.polyhead.attention_weights(
            query, maybe_contiguous(call.key), *masks, slopes, band, scale, softcap, saved, mean
        )
        return written.to(call.dtype)

    return Aux(
        weights=weights(mean=False) if call.aux.weights else None,
        mean_weights=weights(mean=True) if call.aux.mean_weights else None,
        lse=lse if call.aux.lse else None,
        stats=HeadStats(*saved[3:].unbind()) if call.aux.stats else None,
    )


def try_fast_path(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    mask: Mask | None,
    scale: float | None,
) -> Tensor | None:
    """Fast path: full or causal attention in inference, without validation, call and choice, which
    take longer than to decode a token of a small model.

    Returns:
        The output of `run`, to the bit; or None: then the general path runs the call, or raises.
    """
    if (
        ops.unavailable
        or torch.is_grad_enabled()
        or isinstance(key, CacheView)
        or isinstance(value, CacheView)
        # A subclass has ways of its own.
        or not (type(query) is type(key) is type(value) is Tensor)
        or not (query.is_cpu and key.is_cpu and value.is_cpu)
        or not (mask is None or (type(mask) is Causal and mask.align == "end"))
        or not (scale is None or -math.inf < scale < math.inf)
        or transform_reasons()
        or is_traced()
    ):
        return None
    try:
        # As in `auto_skip`: next to matrix units only decoding stays with these kernels.
        decode_only = query.dtype == torch.bfloat16 and _has_amx()
        attend = torch.ops.polyhead.attention_fast
        is_causal = mask is not None
        return attend(query, key, value, scale, decode_only, is_causal)  # type: ignore[no-any-return]
    except NotImplementedError:  # sparse or nested: the general way says so
        return None


@functools.cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
