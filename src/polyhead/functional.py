"""`attention()`: check what was asked, choose who runs it, run it. `explain()`: say who and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from polyhead.backends import BACKENDS, Backend, BackendChoice, candidates, choose
from polyhead.backends.reference import compute_aux
from polyhead.call import AttentionCall, Aux, AuxRequest
from polyhead.errors import ArgumentError, BackendError, DeviceError, DtypeError, ShapeError
from polyhead.mask import Mask

__all__ = ["Explanation", "attention", "build_call", "explain"]


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: BackendChoice = "auto",
    return_aux: None = None,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: BackendChoice = "auto",
    return_aux: AuxRequest,
) -> tuple[Tensor, Aux]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: BackendChoice = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Multi-head attention of queries over keys: softmax(scale * query @ key^T) @ value.

    Args:
        query: (B, H, T, D) float32, bfloat16, float16 or float64; the output has its dtype.
        key: (B, G, S, D), G a divisor of H: query head h uses key head h // (H / G).
        value: (B, G, S, E).
        mask: who may attend (`polyhead.mask`); None: everybody. A query with nothing to attend
            to gives zeros.
        bias: numbers added to the scores, broadcastable to (B, H, T, S); the query's dtype or
            float32. -inf forbids.
        scale: factor on the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap), before the bias.
        sinks: (H,) one extra logit a head that takes weight and gives no value.
        dropout: probability with which a weight is dropped, in [0, 1); applied whenever it is
            not 0, so pass 0 in evaluation.
        backend: "auto", a name, a `Backend`, or several in order of preference. One that is
            asked for runs or raises; there is no silent fallback.
        return_aux: what to return beside the output. Never changes the output.

    Returns:
        output (B, H, T, E), or (output, Aux) if `return_aux` is given.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: an argument breaks a rule.
        BackendError: the backend asked for cannot run this call; every reason is listed.

    Formula: `polyhead.backends.reference`; Vaswani et al. 2017, section 3.2.

    >>> import polyhead as ph
    >>> query, key, value = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
    >>> ph.attention(query, key, value, mask=ph.mask.causal()).shape
    torch.Size([1, 4, 3, 8])
    """
    call = build_call(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        softcap,
        sinks,
        dropout,
        AuxRequest() if return_aux is None else return_aux,
    )
    chosen = choose(call, backend)
    # Autocast would cast inside a backend, and degrade even the definition: a caller's autocast
    # decides the dtype of query, key and value, and that is the dtype of the output.
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):
            output, aux = _run(chosen, call)
    else:
        output, aux = _run(chosen, call)
    return output if return_aux is None else (output, aux)


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call and why no other does. Printing it gives a table.

    Attributes:
        chosen: name of the backend that runs, or None if all refuse.
        notes: how it would run the call.
        reasons: for every backend, each reason against it; empty where it could run.
    """

    chosen: str | None
    notes: tuple[str, ...]
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"runs: {self.chosen or 'nothing, every backend asked for refuses'}"]
        lines += [f"  {note}" for note in self.notes]
        for name, reasons in self.reasons.items():
            if name != self.chosen:
                lines.append(f"{name}: " + ("could run" if not reasons else "cannot run"))
                lines += [f"  {reason}" for reason in reasons]
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: BackendChoice = "auto",
    return_aux: AuxRequest | None = None,
) -> Explanation:
    """Say which backend `attention()` would run for these arguments, and why not the others.

    Takes the arguments of `attention`, computes nothing, and raises the same errors for bad ones.

    >>> import polyhead as ph
    >>> query = key = value = torch.ones(1, 2, 3, 8)
    >>> print(ph.explain(query, key, value, softcap=30.0))
    runs: reference
      plain PyTorch, holds the T x S scores of every head: 0.0 MiB each copy
    sdpa: cannot run
      has no softcap; got softcap = 30.0
    """
    call = build_call(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        softcap,
        sinks,
        dropout,
        AuxRequest() if return_aux is None else return_aux,
    )
    asked = candidates(backend)
    others = [entry for entry in BACKENDS if entry not in asked]
    reasons = {entry.name: tuple(entry.why_not(call)) for entry in (*asked, *others)}
    try:
        chosen = choose(call, backend)
    except BackendError:
        return Explanation(None, (), reasons)
    notes = chosen.notes(call)
    left = [name for name in call.aux.names if name not in chosen.aux]
    if left:
        notes.append(f"{', '.join(left)} computed apart, by reference: holds T x S scores")
    return Explanation(chosen.name, tuple(notes), reasons)


def _run(chosen: Backend, call: AttentionCall) -> tuple[Tensor, Aux]:
    """The output, and the aux with what the chosen backend does not give from the definition.

    The output comes from the chosen backend alone, so that asking for aux never changes it.
    """
    output, aux = chosen.run(call)
    left = {name: True for name in call.aux.names if name not in chosen.aux}
    if left:
        rest = compute_aux(replace(call, aux=AuxRequest(**left)))
        aux = replace(aux, **{name: getattr(rest, name) for name in left})
    return output, aux


def build_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    aux: AuxRequest = AuxRequest(),
) -> AttentionCall:
    """The arguments of `attention`, checked, as the one object that backends read."""
    _check_tensors(query, key, value)
    _check_shapes(query, key, value)
    S, D = key.shape[2:]
    if mask is not None:
        _check_mask(mask, query, S)
    if bias is not None:
        _check_bias(bias, query, S)
    if sinks is not None:
        _check_sinks(sinks, query)
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    elif not math.isfinite(scale):
        raise ArgumentError("scale", "must be finite", scale, "leave it out for 1 / sqrt(D)")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ArgumentError("softcap", "must be positive", softcap, "leave it out for no cap")
    if not 0.0 <= dropout < 1.0:
        raise ArgumentError("dropout", "must be in [0, 1)", dropout, "pass 0.0 for none")
    if not isinstance(aux, AuxRequest):
        raise DtypeError(
            "return_aux",
            "must be a polyhead.AuxRequest or None",
            repr(aux),
            "say what to return: AuxRequest(weights=True)",
        )
    return AttentionCall(query, key, value, mask, bias, scale, softcap, sinks, dropout, aux)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_is_tensor(name, tensor)
        if tensor.ndim != 4:
            raise ShapeError(
                name,
                "must have 4 dimensions (B, heads, tokens, size)",
                tuple(tensor.shape),
                "add the batch with [None], split heads with unflatten and transpose(1, 2)",
            )
        if not tensor.is_floating_point():
            raise DtypeError(name, "must be floating point", tensor.dtype, "convert it first")
        if tensor.dtype != query.dtype:
            raise DtypeError(
                name, f"must have the query's dtype, {query.dtype}", tensor.dtype, "cast one"
            )
        if tensor.device != query.device:
            raise DeviceError(
                name, f"must be on the query's device, {query.device}", tensor.device, "move one"
            )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    B, H, _, D = query.shape
    if key.shape[0] != B or key.shape[3] != D or key.shape[1] == 0:
        raise ShapeError(
            "key",
            f"must be (B, G, S, D) with the query's B = {B} and D = {D}, and G at least 1",
            tuple(key.shape),
            "check the order of dimensions: (B, heads, tokens, size)",
        )
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError(
            "value",
            f"must be (B, G, S, E) with the key's (B, G, S) = {tuple(key.shape[:3])}",
            tuple(value.shape),
            "check the order of dimensions: (B, heads, tokens, size)",
        )
    if H == 0 or H % key.shape[1]:
        raise ShapeError(
            "query",
            f"must have a positive multiple of the key's G = {key.shape[1]} heads",
            f"H = {H}",
            "query head h uses key head h // (H / G)",
        )
    if D == 0:
        raise ShapeError("query", "must have a head size D of at least 1", 0, "check its layout")


def _check_mask(mask: Mask, query: Tensor, S: int) -> None:
    if not isinstance(mask, Mask):
        raise DtypeError(
            "mask",
            "must be a polyhead.mask.Mask",
            type(mask).__name__,
            "wrap a bool tensor in polyhead.mask.dense (True = may attend); "
            "pass numbers to add to the scores as bias=",
        )
    B, H, T, _ = query.shape
    mask.check(B, H, T, S, query.device)


def _check_bias(bias: Tensor, query: Tensor, S: int) -> None:
    _check_is_tensor("bias", bias)
    full = (*query.shape[:3], S)
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(shape) > 4 or any(have not in (1, want) for have, want in zip(shape, full, strict=True)):
        raise ShapeError(
            "bias",
            f"must broadcast to (B, H, T, S) = {full}",
            tuple(bias.shape),
            "give each dimension its full size or 1",
        )
    if bias.dtype not in (query.dtype, torch.float32):
        raise DtypeError(
            "bias",
            f"must be {query.dtype} (the query's) or float32",
            bias.dtype,
            "wrap a bool tensor in polyhead.mask.dense instead",
        )
    _check_same_device("bias", bias, query)


def _check_sinks(sinks: Tensor, query: Tensor) -> None:
    _check_is_tensor("sinks", sinks)
    if sinks.shape != (query.shape[1],):
        raise ShapeError(
            "sinks",
            f"must be (H,) = ({query.shape[1]},), one logit a head",
            tuple(sinks.shape),
            "give one for each query head",
        )
    if not sinks.is_floating_point():
        raise DtypeError("sinks", "must be floating point", sinks.dtype, "convert it first")
    _check_same_device("sinks", sinks, query)


def _check_is_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise DtypeError(name, "must be a tensor", type(tensor).__name__, "torch.as_tensor it")


def _check_same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise DeviceError(
            name, f"must be on the query's device, {query.device}", tensor.device, "move one"
        )
