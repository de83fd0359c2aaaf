"""polyhead's own C++ kernels for the processor (csrc/): no T x S tensor, every variant fused.

Semantics are those of `reference`, with one difference in what is undefined anyway: NaN or
infinity in a *value* that a query may not attend to reaches its output there (0 * NaN), and here
only where it shares a tile with values that it may attend to.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from polyhead.backends import cpu_operators, reference, sdpa
from polyhead.backends.structure import custom_reasons, read_structure
from polyhead.backends.transforms import transform_reasons
from polyhead.call import AttentionCall, Aux, AuxRequest, HeadStats

__all__ = ["notes", "passed_over", "run", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_SIZE = 512
_MAX_TOKENS = 2**31 - 2
# As in csrc/decode.hpp: so few queries a key head are not worth packing keys for.
_MAX_DECODE_TOKENS = 16
_MAX_DECODE_ROWS = 32
_FEW_WEIGHTS = 2**14


def why_not(call: AttentionCall) -> list[str]:
    """Every reason why the kernels cannot run this call."""
    reasons = []
    if cpu_operators.missing:
        reasons.append(cpu_operators.missing)
    if call.device.type != "cpu":
        reasons.append(f"runs on the CPU; got device {call.device}")
    if call.dtype not in _DTYPES:
        reasons.append(f"runs float32, bfloat16 and float16; got {_name(call.dtype)}")
    if max(call.D, call.E) > _MAX_HEAD_SIZE:
        reasons.append(f"has heads of up to {_MAX_HEAD_SIZE}; got D = {call.D}, E = {call.E}")
    if max(call.T, call.S) > _MAX_TOKENS:
        reasons.append(f"has up to {_MAX_TOKENS} tokens; got T = {call.T}, S = {call.S}")
    if _learnt(call.alibi_slopes):
        reasons.append("gives no gradient to alibi_slopes")
    reasons.extend(custom_reasons(call.mask))
    reasons.extend(transform_reasons())
    return reasons


def passed_over(call: AttentionCall) -> list[str]:
    """Why "auto" leaves a call to torch: matrix units that these kernels do not use, exported
    programs, and small examples with dropout, whose digits should be those of the same lines typed
    by hand."""
    if call.dtype == torch.bfloat16 and _has_amx() and not sdpa.why_not(call):
        return ["uses no AMX, and torch's own bfloat16 kernel does on this processor"]
    if torch.compiler.is_exporting():
        return ["would tie an exported program to this library; torch's own operators do not"]
    weights = call.B * call.H * call.T * call.S
    if call.dropout > 0.0 and weights <= _FEW_WEIGHTS:
        return [
            f"drops by its own generator; {weights} weights are few enough to drop as F.dropout "
            "does for this seed"
        ]
    return []


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
    return noted


def run(call: AttentionCall) -> tuple[Tensor, Aux]:
    """Output (B, H, T, E), and lse and stats if asked for."""
    structure = read_structure(call.mask, call.T, call.S)
    allowed = None
    if structure.rest is not None:
        allowed = structure.rest.materialize(call.T, call.S, device=call.device)
    sinks, slopes = call.sinks, call.alibi_slopes
    # The kernel's statistics have no gradient.
    stats_here = call.aux.stats and not call.needs_grad
    operators = torch.ops.polyhead
    attend = operators.attention_forward if call.needs_grad else operators.attention_inference
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


def _learnt(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


@functools.cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
