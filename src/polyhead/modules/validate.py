"""The checks that modules make: of their constructor's arguments and of what they are called on."""

from __future__ import annotations

from torch import Tensor, nn

from polyhead.cache import Cache
from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError, check_count
from polyhead.mask import Mask, Not, Or, Prefix, Window
from polyhead.modules.weights import takes_what_it_holds
from polyhead.positions import Rope
from polyhead.validate import autocasts, check_is_tensor, check_number

__all__ = [
    "check_cache",
    "check_dropout",
    "check_input",
    "check_mask",
    "check_norm",
    "check_position_bias",
    "check_rope",
    "check_sizes",
    "combine_masks",
    "head_sizes",
    "kv_heads",
    "split_heads",
]


def check_sizes(**sizes: int) -> None:
    """Every size is an integer of at least 1."""
    for name, size in sizes.items():
        check_count(name, size, 1, "count from 1", ShapeError)


def check_dropout(dropout: float) -> None:
    if not isinstance(dropout, bool):
        check_number("dropout", dropout, "pass 0.0 for none")
    if not 0.0 <= dropout < 1.0:
        raise ArgumentError(
            "dropout", "must be a probability in [0, 1)", dropout, "pass 0.0 for none"
        )


def check_norm(name: str, norm: object) -> None:
    """Whether this makes a norm from a size, and is none itself."""
    if not callable(norm) or isinstance(norm, nn.Module):
        raise DtypeError(
            name, "must make a norm from a size", repr(norm), "pass nn.RMSNorm itself, say"
        )


def check_position_bias(position_bias: object) -> None:
    if position_bias is not None and not callable(position_bias):
        raise DtypeError(
            "position_bias",
            "must be a module that gives numbers for (T, S), or None",
            repr(position_bias),
            "pass polyhead.positions.RelativeBias(num_heads, bidirectional=False), say",
        )


def check_rope(rope: Rope | None, head_dim: int, name: str = "head_dim") -> None:
    if rope is None:
        return
    if not isinstance(rope, Rope):
        raise DtypeError(
            "rope", "must be a polyhead.Rope or None", repr(rope), "pass Rope(theta=10_000.0)"
        )
    if rope.rotary_dim is None and head_dim % 2:
        raise ShapeError(name, "must be even with rope", head_dim, "change it or drop rope")
    if rope.rotary_dim is not None and rope.rotary_dim > head_dim:
        raise ShapeError(
            "rope",
            f"must turn at most {name} = {head_dim} features",
            f"rotary_dim = {rope.rotary_dim}",
            "let fewer turn",
        )


def head_sizes(
    d_out: int,
    num_heads: int,
    head_dim: int | None,
    value_head_dim: int | None,
    *,
    out_proj: bool,
) -> tuple[int, int]:
    """The size of a head's queries and keys, and of its values."""
    if head_dim is None:
        if d_out % num_heads:
            raise ShapeError(
                "d_out",
                f"must be divisible by num_heads = {num_heads}: it is split into heads",
                d_out,
                "change one of them, or say head_dim",
            )
        head_dim = d_out // num_heads
    check_sizes(head_dim=head_dim)
    name = "head_dim" if value_head_dim is None else "value_head_dim"
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    check_sizes(value_head_dim=value_head_dim)
    if not out_proj and num_heads * value_head_dim != d_out:
        raise ShapeError(
            "d_out",
            f"must be num_heads * {name} = {num_heads * value_head_dim} without an output "
            "projection",
            d_out,
            f"leave out_proj on, or change {name}",
        )
    return head_dim, value_head_dim


def kv_heads(num_heads: int, num_kv_heads: int | None) -> int:
    """How many key/value heads there are."""
    if num_kv_heads is None:
        return num_heads
    check_sizes(num_kv_heads=num_kv_heads)
    if num_heads % num_kv_heads:
        raise ShapeError(
            "num_kv_heads",
            f"must divide num_heads = {num_heads}",
            num_kv_heads,
            "every key head serves the same number of query heads",
        )
    return num_kv_heads


def check_cache(
    cache: Cache,
    rule: Mask | None,
    x: Tensor,
    memory: Tensor | None,
    num_heads: int,
    context_length: int,
) -> None:
    """Whether the tokens of x can follow what the cache holds. Asked before it is changed."""
    if not isinstance(cache, Cache):
        raise DtypeError(
            "cache",
            "must be a polyhead.KVCache, PagedKVCache or None",
            type(cache).__name__,
            "make one with make_cache(batch)",
        )
    if memory is not None:
        raise ArgumentError(
            "cache",
            "must be None with memory, whose keys do not grow",
            "both",
            "project memory once with project_qkv, and call polyhead.attention",
        )
    check_is_tensor("x", x)
    T = x.shape[1] if x.ndim == 3 else 0
    if cache.length + T > context_length:
        raise ShapeError(
            "x",
            f"must fit context_length = {context_length} behind the {cache.length} cached tokens",
            T,
            "shorten it, or build the module with a larger context_length",
        )
    window = cache.window
    if window is not None and not _within(rule, window):
        raise ArgumentError(
            "cache",
            f"with window = {window} needs a mask that looks no further back",
            repr(rule),
            _window_remedy(rule, window),
        )
    if rule is not None:
        rule.check(x.shape[0], num_heads, T, cache.length + T, x.device)


def _window_remedy(rule: Mask | None, window: int) -> str:
    """A window may be added to rules that only forbid; it would drop what another rule allows."""
    parts = () if rule is None else rule.conjuncts
    if any(isinstance(part, (Or, Not, Prefix)) for part in parts):
        return "use a cache without a window: its mask allows keys that a window forgets"
    return f"add & polyhead.mask.window(before={window}) to it, or use a cache without a window"


def _within(rule: Mask | None, window: int) -> bool:
    return rule is not None and any(
        isinstance(part, Window)
        and part.align == "end"
        and part.before is not None
        and part.before <= window
        for part in rule.conjuncts
    )


def split_heads(name: str, projected: Tensor, num_heads: int, size: int) -> Tensor:
    """(B, T, num_heads * size) as (B, num_heads, T, size), a view.

    Raises:
        ShapeError: there are other features, as on one rank of a projection split over several.
    """
    if projected.shape[-1] != num_heads * size:
        raise ShapeError(
            name,
            f"must give {num_heads * size} features, {num_heads} heads of {size}",
            projected.shape[-1],
            "give every rank whole projections: leave attention out of the tensor-parallel plan",
        )
    heads: Tensor = projected.unflatten(2, (num_heads, size))
    return heads.transpose(1, 2)


def check_mask(mask: Mask | None) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise DtypeError(
            "mask",
            "must be a polyhead.mask.Mask or None",
            type(mask).__name__,
            "wrap a bool tensor in polyhead.mask.dense (True = may attend)",
        )


def combine_masks(own: Mask | None, given: Mask | None) -> Mask | None:
    """Return the intersection of a module's own mask and the call's; None is no mask."""
    check_mask(given)
    if own is None or given is None:
        return given if own is None else own
    return own & given


def check_input(
    name: str, x: Tensor, projection: nn.Module, d_in: int, context_length: int | None = None
) -> None:
    """`x` is (B, tokens, d_in), of the projection's dtype and device, and not too long."""
    check_is_tensor(name, x)
    if x.ndim != 3:
        raise ShapeError(
            name,
            f"must have 3 dimensions (batch, tokens, d_in = {d_in})",
            tuple(x.shape),
            "add the batch with x[None]" if x.ndim == 2 else "reshape it",
        )
    if not x.is_floating_point():
        raise DtypeError(
            name, "must be floating point", x.dtype, "embed token ids before attention"
        )
    if x.shape[2] != d_in:
        raise ShapeError(
            name, f"must have d_in = {d_in} features", x.shape[2], "match the constructor's d_in"
        )
    if context_length is not None and x.shape[1] > context_length:
        raise ShapeError(
            name,
            f"must have at most context_length = {context_length} tokens",
            x.shape[1],
            "shorten it, or build the module with a larger context_length",
        )
    if not takes_what_it_holds(projection):
        _check_not_sharded(name, x, projection)
        return
    weight: Tensor = projection.weight  # type: ignore[assignment]
    if x.device != weight.device:
        raise DeviceError(
            name, f"must be on the module's device, {weight.device}", x.device, "move one"
        )
    if x.dtype != weight.dtype and not autocasts(x):
        raise DtypeError(
            name,
            f"must have the module's dtype, {weight.dtype}",
            x.dtype,
            "cast one: nothing is cast silently",
        )


def _check_not_sharded(name: str, x: Tensor, projection: nn.Module) -> None:
    """A sharded weight without hooks takes no plain tensor."""
    weight = projection._parameters.get("weight")
    is_sharded = type(weight).__name__ == "DTensor" and type(x).__name__ != "DTensor"
    if is_sharded and not projection._forward_pre_hooks:
        raise DtypeError(
            name,
            "must be a DTensor for a module whose weights are sharded over ranks (DTensor)",
            type(x).__name__,
            "shard the module with fully_shard, whose hooks gather weights, or gather them with "
            "DTensor.full_tensor()",
        )
