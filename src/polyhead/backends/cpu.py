"""polyhead's own C++ kernels for the processor (csrc/): no T x S tensor, every variant fused.

Semantics are those of `reference`, with one difference in what is undefined anyway: NaN or
infinity in a *value* that a query may not attend to reaches its output there (0 * NaN), and here
only where it shares a tile with values that it may attend to.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polyhead.backends import cpu_operators, reference
from polyhead.backends.structure import read_structure
from polyhead.call import AttentionCall, Aux, AuxRequest, HeadStats

__all__ = ["notes", "run", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_SIZE = 512
_MAX_TOKENS = 2**31 - 2
# As in csrc/decode.hpp: so few queries a key head are not worth packing keys for.
_MAX_DECODE_TOKENS = 16
_MAX_DECODE_ROWS = 32


def why_not(call: AttentionCall) -> list[str]:
    """Every reason why the kernels cannot run this call."""
    reasons = []
    if not cpu_operators.is_built:
        reasons.append(
            "was not built, for want of a C++ compiler; "
            "install one and run: pip install --no-build-isolation polyhead"
        )
    if call.device.type != "cpu":
        reasons.append(f"runs on the CPU; got device {call.device}")
    if call.dtype not in _DTYPES:
        reasons.append(f"runs float32, bfloat16 and float16; got {_name(call.dtype)}")
    if max(call.D, call.E) > _MAX_HEAD_SIZE:
        reasons.append(f"has heads of up to {_MAX_HEAD_SIZE}; got D = {call.D}, E = {call.E}")
    if max(call.T, call.S) > _MAX_TOKENS:
        reasons.append(f"has up to {_MAX_TOKENS} tokens; got T = {call.T}, S = {call.S}")
    slopes = _alibi_slopes(call)
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        reasons.append("gives no gradient to alibi_slopes")
    return reasons


def notes(call: AttentionCall) -> list[str]:
    """Instruction set, threads, and which way keys are read."""
    threads = torch.get_num_threads()
    many = f"up to {threads} threads" if threads > 1 else "1 thread"
    noted = [f"{cpu_operators.isa()} kernels, {many}"]
    if call.T <= _MAX_DECODE_TOKENS and call.group * call.T <= _MAX_DECODE_ROWS:
        noted.append("few queries: keys are read once, in place, shared out among the threads")
    else:
        noted.append("many queries: keys and values are packed once a key head")
    rest = read_structure(call.mask, call.T, call.S).rest
    if rest is not None:
        noted.append(f"{rest!r} written out as booleans")
    if call.aux.stats and _needs_gradient(call):
        noted.append("stats, with gradients, by reference: holds T x S scores")
    return noted


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E), and lse and stats if asked for."""
    structure = read_structure(call.mask, call.T, call.S)
    allowed = None
    if structure.rest is not None:
        allowed = structure.rest.materialize(call.T, call.S, device=call.device)
    sinks, slopes = call.sinks, _alibi_slopes(call)
    needs_gradient = _needs_gradient(call)
    # The kernel's statistics have no gradient.
    stats_here = call.aux.stats and not needs_gradient
    operators = torch.ops.polyhead
    attend = operators.attention_forward if needs_gradient else operators.attention_inference
    output, lse, details = attend(
        cpu_operators.side_by_side(call.query),
        cpu_operators.side_by_side(call.key),
        cpu_operators.side_by_side(call.value),
        call.bias,
        allowed,
        structure.lengths,
        structure.padding,
        structure.documents,
        None if sinks is None else sinks.float().contiguous(),
        None if slopes is None else slopes.float().contiguous(),
        torch.randint(2**62, (1,)) if call.dropout > 0.0 else None,
        structure.band,
        call.scale,
        0.0 if call.softcap is None else call.softcap,
        call.dropout,
        stats_here,
    )
    stats = None
    if stats_here:
        stats = HeadStats(*details[2:].unbind())
    elif call.aux.stats:
        stats = reference.compute_aux(replace(call, aux=AuxRequest(stats=True))).stats
    return output, Aux(lse=lse if call.aux.lse else None, stats=stats)


def _needs_gradient(call: AttentionCall) -> bool:
    tensors = (call.query, call.key, call.value, call.bias, call.sinks)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _alibi_slopes(call: AttentionCall) -> Tensor | None:
    return getattr(call, "alibi_slopes", None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
