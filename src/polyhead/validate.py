"""Validation of the arguments of `attention()`, and construction of the `AttentionCall`."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from polyhead.cache_view import CacheView
from polyhead.call import AttentionCall, AuxRequest
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError, check_is_plain
from polyhead.mask import Lengths, Mask
from polyhead.mask.algebra import conjunction

__all__ = [
    "autocasts",
    "build_call",
    "cached_query_offset",
    "check_is_tensor",
    "check_number",
    "check_positions",
    "check_query_offset",
    "check_request",
    "check_scale",
    "check_softcap",
    "mask_cached_rows",
]


def autocasts(tensor: Tensor) -> bool:
    """True if autocast is enabled for the device of this tensor."""
    if tensor.is_cpu:  # reading device.type costs more than the rest of this function
        return torch.is_autocast_enabled("cpu")
    # is_autocast_enabled raises for a device without autocast (meta).
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def build_call(
    query: Tensor,
    key: Tensor | CacheView,
    value: Tensor | CacheView,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    aux: AuxRequest = AuxRequest(),
    query_offset: int | Tensor | None = None,
) -> AttentionCall:
    """Validate the arguments of `attention`. Errors name the argument, the rule and the remedy."""
    cache_views = None
    if isinstance(key, CacheView) or isinstance(value, CacheView):
        cache_views = _both_views(key, value)
        key = value = cache_views[0].placeholder()
        if (
            cache_views[1].shape != cache_views[0].shape
            or cache_views[1].dtype != cache_views[0].dtype
        ):
            value = cache_views[1].placeholder()
    _check_tensors(query, key, value)
    _check_shapes(query, key, value)
    S, D = key.shape[2:]
    if mask is not None:
        _check_mask(mask, query, S)
    if bias is not None:
        _check_bias(bias, query, S)
    if sinks is not None:
        _check_per_head("sinks", sinks, query)
    if alibi_slopes is not None:
        _check_per_head("alibi_slopes", alibi_slopes, query)
    if scale is None:
        scale = 1.0 / math.sqrt(D)
    else:
        check_scale(scale)
    check_softcap(softcap)
    softcap = None if softcap is None else _nameable(softcap)
    if not isinstance(dropout, bool):  # `self.training and p` is False in evaluation
        check_number("dropout", dropout, "pass 0.0 for none")
    dropout = _nameable(dropout)
    if not 0.0 <= dropout < 1.0:
        raise ArgumentError("dropout", "must be in [0, 1)", dropout, "pass 0.0 for none")
    check_request(aux)
    if query_offset is not None:
        check_query_offset(query_offset, query)
    if cache_views is not None and cache_views[0].lengths is not None:
        mask = mask_cached_rows(cache_views[0], mask)
        if query_offset is None:
            query_offset = cached_query_offset(cache_views[0], query.shape[2])
    return AttentionCall(
        query,
        key,
        value,
        mask,
        bias,
        scale,
        softcap,
        sinks,
        alibi_slopes,
        dropout,
        aux,
        query_offset,
        cache_views,
    )


def cached_query_offset(key: Tensor | CacheView, T: int) -> Tensor | None:
    """(B,) the `query_offset` of T queries of cached rows of different lengths, else None."""
    if not isinstance(key, CacheView) or key.lengths is None:
        return None
    return key.lengths - T if key.query_offset is None else key.query_offset


def mask_cached_rows(key: Tensor | CacheView, mask: Mask | None) -> Mask | None:
    """The mask, and none of the keys beyond the length of each cached row."""
    if not isinstance(key, CacheView) or key.lengths is None:
        return mask
    return conjunction([*(() if mask is None else mask.conjuncts), Lengths(key.lengths)])


def _nameable(number: float) -> float:
    # torch.compile may make a number symbolic, and cannot trace an f-string of it except as float.
    return float(number) if torch.compiler.is_compiling() else number


def _both_views(key: Tensor | CacheView, value: Tensor | CacheView) -> tuple[CacheView, CacheView]:
    for name, given in (("key", key), ("value", value)):
        if not isinstance(given, CacheView):
            raise DtypeError(
                name,
                "must be a CacheView if the other of key and value is",
                type(given).__name__,
                "pass both as append_as_views or read_as_views returned them, or both as tensors",
            )
    return key, value  # type: ignore[return-value]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_is_tensor("query", query)
    dtype, device = query.dtype, query.device
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
        if tensor.ndim != 4:
            raise ShapeError(
                name,
                "must have 4 dimensions (B, heads, tokens, size)",
                tuple(tensor.shape),
                "add the batch with [None], split heads with unflatten and transpose(1, 2)",
            )
        if not tensor.is_floating_point():
            raise DtypeError(name, "must be floating point", tensor.dtype, "convert it first")
        if tensor.dtype != dtype:
            raise DtypeError(
                name, f"must have the query's dtype, {dtype}", tensor.dtype, "cast one"
            )
        if tensor.device != device:
            raise DeviceError(
                name, f"must be on the query's device, {device}", tensor.device, "move one"
            )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    B, H, _, D = query.shape
    key_shape = tuple(key.shape)
    batch, G, S, head_size = key_shape
    if batch != B or head_size != D or G == 0:
        raise ShapeError(
            "key",
            f"must be (B, G, S, D) with the query's B = {B} and D = {D}, and G at least 1",
            key_shape,
            "check the order of dimensions: (B, heads, tokens, size)",
        )
    if value.shape[:3] != (B, G, S):
        raise ShapeError(
            "value",
            f"must be (B, G, S, E) with the key's (B, G, S) = {(B, G, S)}",
            tuple(value.shape),
            "check the order of dimensions: (B, heads, tokens, size)",
        )
    if H == 0 or H % G:
        raise ShapeError(
            "query",
            f"must have a positive multiple of the key's G = {G} heads",
            f"H = {H}",
            "query head h uses KV head h // (H / G)",
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
            "pass an additive mask as bias=",
        )
    B, H, T, _ = query.shape
    mask.check(B, H, T, S, query.device)


def _check_bias(bias: Tensor, query: Tensor, S: int) -> None:
    check_is_tensor("bias", bias)
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
            "wrap it in polyhead.mask.dense instead (True = may attend)"
            if bias.dtype == torch.bool
            else "cast it",
        )
    _check_same_device("bias", bias, query)


def _check_per_head(name: str, tensor: Tensor, query: Tensor) -> None:
    check_is_tensor(name, tensor)
    if tensor.shape != (query.shape[1],):
        raise ShapeError(
            name,
            f"must be (H,) = ({query.shape[1]},), one value per head",
            tuple(tensor.shape),
            "give one for each query head",
        )
    if not tensor.is_floating_point():
        raise DtypeError(name, "must be floating point", tensor.dtype, "convert it first")
    _check_same_device(name, tensor, query)


def check_number(argument: str, number: object, remedy: str) -> None:
    """Raise unless `number` is a Python or numpy number; bools, text and tensors are not.

    >>> check_number("scale", "0.1", "leave it out")
    Traceback (most recent call last):
    polyhead.errors.DtypeError: scale must be a number; got '0.1'; leave it out
    """
    if isinstance(number, float):
        return
    # torch.export may make a number symbolic.
    if isinstance(number, bool) or not isinstance(
        number, (int, Real, torch.SymFloat, torch.SymInt)
    ):
        raise DtypeError(argument, "must be a number", repr(number), remedy)


def check_scale(scale: float | None) -> None:
    if scale is None:
        return
    # Kernels compute no gradient of a scale tensor.
    check_number("scale", scale, "leave it out for 1 / sqrt(D); multiply the query by a tensor")
    if not -math.inf < scale < math.inf:  # torch.compile cannot trace isfinite of a symbolic number
        raise ArgumentError("scale", "must be finite", scale, "leave it out for 1 / sqrt(D)")


def check_softcap(softcap: float | None) -> None:
    if softcap is None:
        return
    check_number("softcap", softcap, "leave it out for no cap")
    softcap = _nameable(softcap)
    if not 0.0 < softcap < math.inf:
        raise ArgumentError("softcap", "must be positive", softcap, "leave it out for no cap")


def check_is_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise DtypeError(name, "must be a tensor", type(tensor).__name__, "torch.as_tensor it")
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        remedy = (
            "pad it with torch.nested.to_padded_tensor, and pass mask.lengths"
            if tensor.is_nested
            else "call .to_dense()"
        )
        raise DtypeError(name, "must be a dense tensor", got, remedy)
    check_is_plain(name, tensor)


def check_request(return_aux: AuxRequest | None) -> AuxRequest:
    """Return the validated request; None is an empty `AuxRequest`."""
    if return_aux is None:
        return AuxRequest()
    if not isinstance(return_aux, AuxRequest):
        raise DtypeError(
            "return_aux",
            "must be a polyhead.AuxRequest or None",
            repr(return_aux),
            "pass for example AuxRequest(weights=True)",
        )
    return return_aux


def check_positions(positions: Tensor, B: int, T: int) -> None:
    if not isinstance(positions, Tensor):
        raise DtypeError(
            "positions",
            "must be a tensor of integers",
            type(positions).__name__,
            "torch.as_tensor it",
        )
    integers = not (positions.is_floating_point() or positions.dtype == torch.bool)
    # Not `in (...)`: torch.compile would hash the sizes, and recompile for each.
    if not integers or (positions.shape != (T,) and positions.shape != (B, T)):
        raise ShapeError(
            "positions",
            f"must be integers of shape (T,) = ({T},) or (B, T) = ({B}, {T})",
            f"{positions.dtype} {tuple(positions.shape)}",
            "pass one position per query token",
        )


def check_query_offset(query_offset: int | Tensor, query: Tensor) -> None:
    """Raise unless `query_offset` is an int, or (B,) integers on the query's device."""
    B, remedy = query.shape[0], "pass the position of query 0 among the keys; None is S - T"
    if not isinstance(query_offset, Tensor):
        if isinstance(query_offset, bool) or not isinstance(query_offset, (int, torch.SymInt)):
            got = repr(query_offset)
            raise DtypeError("query_offset", "must be an int or a tensor of integers", got, remedy)
        return
    check_is_tensor("query_offset", query_offset)
    if query_offset.dtype not in (torch.int32, torch.int64):
        raise DtypeError("query_offset", "must be int32 or int64", query_offset.dtype, "cast it")
    if query_offset.shape != (B,):
        rule = f"must be (B,) = ({B},), one per batch row"
        raise ShapeError("query_offset", rule, tuple(query_offset.shape), remedy)
    _check_same_device("query_offset", query_offset, query)


def _check_same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise DeviceError(
            name, f"must be on the query's device, {query.device}", tensor.device, "move one"
        )
