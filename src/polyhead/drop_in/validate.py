"""What `nn.MultiheadAttention` is called on: checked, and its masks said in polyhead's terms."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyhead.mask
from polyhead.errors import DeviceError, DtypeError, ShapeError
from polyhead.mask import Mask
from polyhead.mask.algebra import conjunction
from polyhead.modules.validate import check_sizes
from polyhead.validate import autocasts, check_is_tensor

__all__ = ["check_embed_dim", "check_inputs", "lower_masks"]


def check_embed_dim(embed_dim: int, num_heads: int) -> None:
    check_sizes(embed_dim=embed_dim, num_heads=num_heads)
    if embed_dim % num_heads:
        raise ShapeError(
            "embed_dim",
            f"must be divisible by num_heads = {num_heads}: it is split into heads",
            embed_dim,
            "change one of them",
        )


def check_inputs(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """The inputs fit the module, and one another."""
    weight = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
    dtype = weight.dtype
    if weight.is_meta and not query.is_meta:
        raise DeviceError(
            "query",
            "must be on the device of the module's weights, meta, which have no values",
            query.device,
            "load the weights first: to_empty(device=...), then load_state_dict",
        )
    for name, x, features in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        check_is_tensor(name, x)
        if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != features:
            batched = "(B, tokens, {})" if module.batch_first else "(tokens, B, {})"
            raise ShapeError(
                name,
                f"must be {batched.format(features)}, or (tokens, {features}) if all three are",
                tuple(x.shape),
                "match the constructor's embed_dim, kdim, vdim and batch_first",
            )
        if x.dtype != dtype and not autocasts(x):
            raise DtypeError(
                name,
                f"must have the module's dtype, {dtype}",
                x.dtype,
                "cast one: nothing is cast silently",
            )
    if value.shape[:-1] != key.shape[:-1]:
        raise ShapeError(
            "value",
            f"must have the key's tokens, {tuple(key.shape[:-1])}",
            tuple(value.shape[:-1]),
            "give one value for each key",
        )
    batch_dim = 0 if module.batch_first else 1
    if query.ndim == 3 and key.shape[batch_dim] != query.shape[batch_dim]:
        raise ShapeError(
            "key",
            f"must have the query's batch rows, {query.shape[batch_dim]}",
            key.shape[batch_dim],
            f"see batch_first, which is {module.batch_first}",
        )


def lower_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    query_bhtd: Tensor,
    key_bhsd: Tensor,
    extra: int,
    is_batched: bool,
) -> tuple[Mask | None, Tensor | None]:
    """torch's masks (True = forbidden, or numbers) as who may attend, and a bias.

    Args:
        attn_mask, key_padding_mask, is_causal: as in `nn.MultiheadAttention`.
        query_bhtd, key_bhsd: what they are for.
        extra: how many keys will stand before these, that every query may attend to.
        is_batched: whether the module's inputs have a batch.

    Raises:
        ShapeError, DtypeError: a mask is none of these.
    """
    (B, H, T, _), S = query_bhtd.shape, key_bhsd.shape[2]
    rules: list[Mask] = []
    biases: list[Tensor] = []
    if is_causal and extra:
        rules.append(polyhead.mask.window(after=extra, align="start"))
    elif is_causal:
        rules.append(polyhead.mask.causal(align="start"))
    padding_shape = (B, S) if is_batched else (S,)
    for name, mask, shapes in (
        ("attn_mask", attn_mask, ((T, S), (B * H, T, S))),
        ("key_padding_mask", key_padding_mask, (padding_shape,)),
    ):
        if mask is None:
            continue
        _check_mask(name, mask, shapes, query_bhtd)
        full = _of_four_dimensions(name, mask, B, H)
        if extra:
            full = F.pad(full, (extra, 0))  # 0, or False: not forbidden
        if full.is_floating_point():
            biases.append(full)
        else:
            rules.append(polyhead.mask.dense(~full))
    return conjunction(rules), functools.reduce(operator.add, biases) if biases else None


def _of_four_dimensions(name: str, mask: Tensor, B: int, H: int) -> Tensor:
    if name == "key_padding_mask":
        return mask.reshape(B, 1, 1, mask.shape[-1])
    return mask if mask.ndim == 2 else mask.unflatten(0, (B, H))


def _check_mask(
    name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...], query_bhtd: Tensor
) -> None:
    check_is_tensor(name, mask)
    if tuple(mask.shape) not in shapes:
        raise ShapeError(
            name,
            f"must be {' or '.join(map(str, shapes))}",
            tuple(mask.shape),
            "(T, S) or (B * num_heads, T, S) for attn_mask, (B, S) for key_padding_mask",
        )
    dtypes = {torch.bool, torch.float32, query_bhtd.dtype}
    if mask.dtype not in dtypes:
        raise DtypeError(
            name,
            "must be bool (True = forbidden), or numbers of the heads' dtype, "
            f"{query_bhtd.dtype}, or float32",
            mask.dtype,
            "convert it with .bool() or .to(...)",
        )
