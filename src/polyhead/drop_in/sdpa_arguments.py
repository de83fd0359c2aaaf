"""Arguments of torch's `scaled_dot_product_attention` as arguments of `polyhead.attention`.

Whatever polyhead would compute otherwise than torch, or not at all, gives a reason: torch's own
function then has the call, with torch's result or torch's error.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import polyhead.mask
from polyhead.backends.cpu import ops
from polyhead.backends.reasons import dtype_name, tracing_reasons, transform_reasons
from polyhead.drop_in.recognize import recognize
from polyhead.mask import Mask
from polyhead.validate import autocasts

__all__ = ["SdpaArguments", "lower"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SdpaArguments(NamedTuple):
    """Arguments of `polyhead.attention`, and how its output becomes torch's.

    Attributes:
        query, key, value: of four dimensions.
        mask, bias, scale, dropout: as in `polyhead.attention`.
        recognized: the rule of a dense `attn_mask`, or None; `EVERYTHING` if it forbids nothing.
        shape: of the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    bias: Tensor | None
    scale: float | None
    dropout: float
    recognized: Mask | str | None
    shape: tuple[int, ...]


Lowered: TypeAlias = SdpaArguments | str


def lower(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Lowered:
    """The arguments for polyhead, or the reason why torch has to take them."""
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    for reason in (_tensor_reason(tensors), _number_reason(dropout_p, is_causal, scale)):
        if reason is not None:
            return reason
    if attn_mask is not None and is_causal:
        return "attn_mask and is_causal: torch raises or applies both, by its kernel"
    if autocasts(query):
        dtype = torch.get_autocast_dtype("cpu")
        # As autocast does: float64 and what is not floating point stay as they are.
        query, key, value, attn_mask = (
            x.to(dtype) if x is not None and _is_autocast(x) else x
            for x in (query, key, value, attn_mask)
        )
    if (reason := _dtype_reason(query, key, value, attn_mask)) is not None:
        return reason
    shaped = _four_dimensions(query, key, value, bool(enable_gqa))
    if isinstance(shaped, str):
        return shaped
    query, key, value, batch_shape, has_heads = shaped
    B, H, T, D = query.shape
    S, E = value.shape[2:]
    mask: Mask | None = polyhead.mask.causal("end" if T == S else "start") if is_causal else None
    bias = recognized = None
    if attn_mask is not None:
        attn_mask = _mask_of_four_dimensions(attn_mask, (*batch_shape, T, S), has_heads)
        if isinstance(attn_mask, str):
            return attn_mask
        if not torch.compiler.is_compiling():
            recognized = recognize(attn_mask, B, H, T, S, D + E)
        if recognized is not None:
            mask = None if isinstance(recognized, str) else recognized
        elif attn_mask.dtype == torch.bool:
            mask = polyhead.mask.dense(attn_mask)
        else:
            bias = attn_mask
    shape = (*batch_shape, T, E)
    scale = None if scale is None else float(scale)
    dropout = float(dropout_p)
    return SdpaArguments(query, key, value, mask, bias, scale, dropout, recognized, shape)


def _tensor_reason(tensors: dict[str, Any]) -> str | None:
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.layout != torch.strided or tensor.is_nested:
            return f"{name} is nested" if tensor.is_nested else f"{name} is {tensor.layout}"
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device.type}: polyhead's kernels run on the CPU"
    if ops.unavailable:
        return f"polyhead's kernels: {ops.unavailable}"
    # (Asked in a compiled graph, it would be of the compiler's own modes.)
    if not torch.compiler.is_compiling() and is_in_torch_dispatch_mode():
        return "a TorchDispatchMode is active, which sees torch's operators"
    return next(iter(transform_reasons() + tracing_reasons()), None)


def _number_reason(dropout_p: Any, is_causal: Any, scale: Any) -> str | None:
    # A number of another type, bool among them, is torch's to take or to refuse.
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        return f"dropout_p is {dropout_p}: polyhead takes numbers in [0, 1)"
    if not isinstance(is_causal, bool):
        return f"is_causal is a {type(is_causal).__name__}"
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale)
    ):
        return f"scale is {scale}: polyhead takes finite numbers"
    return None


def _is_autocast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _dtype_reason(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> str | None:
    if query.dtype not in _DTYPES:
        return f"{dtype_name(query.dtype)}: polyhead's kernels run float32, bfloat16 and float16"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return "query, key and value of several dtypes: torch raises"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask of {dtype_name(attn_mask.dtype)}: torch raises"
    return None


_SHAPES = "shapes that do not fit: torch raises"


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], bool] | str:
    """Query (B, H, T, D), key and value (B, G, S, ·); all dimensions of the output before T, and
    whether the last of these are heads (or else batch rows, of one head)."""
    dims = [query.ndim, key.ndim, value.ndim]
    if min(dims) < 2 or key.shape[-1] != query.shape[-1] or key.shape[-2] != value.shape[-2]:
        return _SHAPES
    if 0 in (query.numel(), key.numel(), value.numel()):
        return "an empty tensor: there is nothing to compute"
    shapes = [x.shape[:-2] for x in (query, key, value)]
    if enable_gqa:
        if min(dims) < 3:
            return _SHAPES
        H, G = query.shape[-3], key.shape[-3]
        if value.shape[-3] != G or H % G:
            return "enable_gqa with other numbers of heads than H = n G: torch repeats or raises"
        shapes = [shape[:-1] for shape in shapes]
    batch_shape = _broadcast(shapes)
    if batch_shape is None:
        return _SHAPES
    has_heads = enable_gqa or len(batch_shape) > 1
    heads, leading = (1, 1, 1), batch_shape  # batch rows, as a mask that differs by row has them
    if enable_gqa:
        leading, batch_shape = batch_shape, (*batch_shape, H)
        heads = (H, G, G)
    elif has_heads:
        *_, H = batch_shape
        leading = batch_shape[:-1]
        # One KV head for all query heads is a group, and needs no copy.
        G = 1 if all(shape[-1:] in ((), (1,)) for shape in shapes[1:]) else H
        heads = (H, G, G)
    query, key, value = (
        _shaped(x, leading, n) for x, n in zip((query, key, value), heads, strict=True)
    )
    return query, key, value, batch_shape, has_heads


def _broadcast(shapes: list[torch.Size]) -> tuple[int, ...] | None:
    """The shape that all broadcast to, or None. (`torch.broadcast_shapes` takes 15 us.)"""
    first = shapes[0]
    if all(shape == first for shape in shapes[1:]):
        return tuple(first)
    ndim = max(map(len, shapes))
    padded = [(1,) * (ndim - len(shape)) + tuple(shape) for shape in shapes]
    broadcast = []
    for sizes in zip(*padded, strict=True):
        wide = [size for size in sizes if size != 1]
        if any(size != wide[0] for size in wide):
            return None
        broadcast.append(wide[0] if wide else 1)
    return tuple(broadcast)


def _shaped(x: Tensor, leading: tuple[int, ...], heads: int) -> Tensor:
    """(B, heads, tokens, size): a view, unless several expanded dimensions become one."""
    if x.ndim == 4 and x.shape[:2] == (*leading, heads):
        return x
    if heads == 1 and x.shape[:-2] == leading:  # without a dimension of heads
        x = x.unsqueeze(-3)
    x = x.expand(*leading, heads, *x.shape[-2:])
    return x.reshape(math.prod(leading), *x.shape[-3:])


def _mask_of_four_dimensions(
    attn_mask: Tensor, full: tuple[int, ...], has_heads: bool
) -> Tensor | str:
    """A mask for scores of shape `full`, as one for (B, H, T, S)."""
    given = (1,) * (len(full) - attn_mask.ndim) + tuple(attn_mask.shape)
    if len(given) != len(full) or any(
        have not in (1, want) for have, want in zip(given, full, strict=True)
    ):
        return "attn_mask that does not broadcast to the scores: torch raises"
    attn_mask = attn_mask.reshape(given)
    leading = full[:-2]
    if has_heads:
        leading = full[:-3]
    else:
        attn_mask = attn_mask.unsqueeze(-3)
    if len(leading) == 1:
        return attn_mask
    if any(size > 1 for size in attn_mask.shape[:-3]):
        attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:])
    return attn_mask.reshape(-1, *attn_mask.shape[-3:])
