"""Conversion between the lecture's two mechanisms: stacked heads (3.6.1), weight splits (3.6.2).

They are the same function in two layouts. Each `head_dim` rows of a split projection are the
projection of one stacked head:

    W_query of the split      W_query of the stacked heads
    +------------------+      +------------------+
    | head 0           |      | heads[0]         |      d_out means the size of ONE head
    +------------------+      +------------------+      in MultiHeadAttentionWrapper, and
    | head 1           |  =   +------------------+      of ALL heads in MultiHeadAttention
    +------------------+      | heads[1]         |
    | ...              |      +------------------+

With fewer KV heads than query heads, each stacked head has a copy of its group's key and value
rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polyhead.convert.layout import Layout, Sizes, linear, parameter
from polyhead.convert.linear import check_kind, check_plain, copied, filled, values_of
from polyhead.errors import ConversionError, ShapeError
from polyhead.modules import CausalAttention, MultiHeadAttention, MultiHeadAttentionWrapper

__all__ = ["STACKED", "split_to_stacked", "stacked_to_split"]

_HEAD = re.compile(r"heads\.(\d+)\.(W_(?:query|key|value)\.(?:weight|bias))")


def split_to_stacked(mha: MultiHeadAttention) -> MultiHeadAttentionWrapper:
    """Convert split heads to stacked heads: the same function, each head with its own weights.

    Args:
        mha: split heads, H heads of size head_dim. It is not modified; weights are copied.

    Returns:
        A wrapper with `num_heads = H` and **`d_out = head_dim`, the size of one head**. Each head
        has the key and value rows of its group. out_proj, bias, dropout, rope, mask, scale,
        training mode and requires_grad are kept.

    Raises:
        ConversionError: a projection is no plain nn.Linear (adapters, quantization), or stacked
            heads have no such option (sinks, softcap and others).

    >>> split = MultiHeadAttention(6, 4, context_length=8, dropout=0.0, num_heads=2)
    >>> stacked = split_to_stacked(split)
    >>> x = torch.randn(1, 8, 6)
    >>> torch.allclose(stacked(x), split(x), atol=1e-6)
    True
    """
    check_kind("mha", mha, MultiHeadAttention, "stacked heads become a split by stacked_to_split")
    _check_options(mha)
    split = _projections(mha)
    state = _out_state(mha)
    has_bias = split["W_query"].bias is not None
    wrapper = MultiHeadAttentionWrapper(
        mha.d_in,
        mha.head_dim,
        mha.context_length,
        mha.dropout.p,
        mha.num_heads,
        has_bias,
        out_proj=mha.out_proj is not None,
        out_features=None if mha.out_proj is None else mha.d_out,
        out_bias=mha.out_proj is not None and mha.out_proj.bias is not None,
        rope=mha.rope,
        mask=mha.mask,
        scale=mha.scale,
        backend=mha.backend,
        device="meta",
    )
    for name, projection in split.items():
        for kind, all_rows in values_of(name, projection).items():
            rows = _rows_of_heads(all_rows, mha.head_dim, mha.num_heads)
            for h, row in enumerate(rows):
                state[f"heads.{h}.{name}.{kind}"] = row
    return filled(wrapper, state, mha)


def stacked_to_split(
    wrapper: MultiHeadAttentionWrapper, *, num_kv_heads: int | None = None
) -> MultiHeadAttention:
    """Convert stacked heads to one projection split into heads: the same function.

    Args:
        wrapper: stacked heads, H of size d_out each. It is not modified; weights are copied.
        num_kv_heads: G, the KV heads of the split, a divisor of H; None: H. The key and value
            weights of the heads of one group must be equal, bit for bit.

    Returns:
        Split heads with `head_dim = wrapper's d_out` and **`d_out` the size of the whole
        output**. It has an output projection if the wrapper has one.

    Raises:
        ConversionError: the heads differ in more than their weights, the heads of a group have
            different key or value weights, or a projection is no plain nn.Linear (adapters).

    >>> wrapper = MultiHeadAttentionWrapper(6, 2, context_length=8, dropout=0.0, num_heads=3)
    >>> split = stacked_to_split(wrapper)
    >>> split.d_out, split.head_dim                              # 3 heads of 2 features
    (6, 2)
    >>> x = torch.randn(1, 8, 6)
    >>> torch.allclose(split(x), wrapper(x), atol=1e-6)
    True
    """
    remedy = "a split becomes stacked heads by split_to_stacked"
    check_kind("wrapper", wrapper, MultiHeadAttentionWrapper, remedy)
    heads = _heads(wrapper)
    H = wrapper.num_heads
    G = H if num_kv_heads is None else num_kv_heads
    _check_divides(G, H)
    first = _common(heads)
    state = _out_state(wrapper)
    merged = H * first.d_out
    mha = MultiHeadAttention(
        first.d_in,
        merged if wrapper.out_proj is None else wrapper.out_proj.out_features,
        first.context_length,
        first.dropout.p,
        H,
        first.W_query.bias is not None,
        num_kv_heads=G,
        head_dim=first.d_out,
        out_proj=wrapper.out_proj is not None,
        out_bias=wrapper.out_proj is not None and wrapper.out_proj.bias is not None,
        rope=first.rope,
        mask=first.mask,
        scale=first.scale,
        backend=first.backend,
        device="meta",
    )
    for kind, _ in first.W_query.named_parameters():
        for name in ("W_query", "W_key", "W_value"):
            rows = [values_of(name, getattr(head, name))[kind] for head in heads]
            group = 1 if name == "W_query" else H // G
            state[f"{name}.{kind}"] = _one_projection(rows, group, f"{name}.{kind}")
    return filled(mha, state, wrapper)


class StackedLayout(Layout):
    """Layout of stacked heads: heads.0.W_query.weight and so on.

    A split becomes `sizes.num_heads` heads; the number of stacked heads is read from their names.
    """

    def __init__(self) -> None:
        out_proj = (
            *parameter("out_proj.weight", required=False),
            *parameter("out_proj.bias", required=False),
        )
        projections = (f"W_{what}" for what in ("query", "key", "value"))
        super().__init__("stacked", out_proj, *(linear(name, name) for name in projections))
        self.their_marks = {f"heads.0.{name}" for name in self.our_marks}

    def owns(self, name: str) -> bool:
        return _HEAD.fullmatch(name) is not None or name.startswith("out_proj.")

    def to_ours(self, theirs: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        ours = {name: tensor for name, tensor in theirs.items() if not _HEAD.fullmatch(name)}
        matches = [match for name in theirs if (match := _HEAD.fullmatch(name))]
        H = 1 + max(int(match[1]) for match in matches)
        G = H if sizes.num_kv_heads is None else sizes.num_kv_heads
        _check_divides(G, H)
        for name in sorted({match[2] for match in matches}):
            keys = [f"heads.{h}.{name}" for h in range(H)]
            if missing := [key for key in keys if key not in theirs]:
                raise ConversionError(
                    f"stacked heads must all have {name}; {missing[0]} cannot be found among the "
                    f"{H} heads; get the whole checkpoint"
                )
            group = 1 if name.startswith("W_query") else H // G
            ours[name] = _one_projection([theirs[key] for key in keys], group, name)
        return ours

    def to_theirs(self, ours: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        self._check(ours, self.ours, self.our_marks)
        H = sizes.need("num_heads")
        rows = ours["W_query.weight"].shape[0]
        head_dim, left = divmod(rows, H)
        keys = ours["W_key.weight"].shape[0]
        if left or not head_dim or keys % head_dim or H % (keys // head_dim or H + 1):
            raise ConversionError(
                f"num_heads must divide the {rows} rows of W_query.weight, and be a multiple of "
                f"the heads in the {keys} rows of W_key.weight; got {H}; check it"
            )
        theirs: dict[str, Tensor] = {}
        for name, tensor in ours.items():
            if name.startswith("out_proj."):
                theirs[name] = tensor
                continue
            for h, row in enumerate(_rows_of_heads(tensor, head_dim, H)):
                theirs[f"heads.{h}.{name}"] = row
        return theirs


STACKED = StackedLayout()


def _rows_of_heads(projection: Tensor, head_dim: int, H: int) -> list[Tensor]:
    """Return a copy of every head's rows: its own, or those of its group's KV head."""
    rows = projection.detach().split(head_dim)
    group = H // len(rows)
    flag = projection.requires_grad
    return [rows[h // group].clone().requires_grad_(flag) for h in range(H)]


def _one_projection(rows: list[Tensor], group: int, name: str) -> Tensor:
    """Concatenate the heads' rows to one projection, once per group."""
    if len({row.requires_grad for row in rows}) > 1:
        raise ConversionError(
            f"{name} must have one requires_grad in all stacked heads to become one split; got a "
            "mixture; set requires_grad alike"
        )
    kept = _one_a_group([row.detach() for row in rows], group, name)
    return torch.cat(kept).requires_grad_(rows[0].requires_grad)


def _check_divides(G: int, H: int) -> None:
    if G < 1 or H % G:
        raise ShapeError(
            "num_kv_heads", f"must divide num_heads = {H}", G, "leave it out to keep every head"
        )


def _check_options(mha: MultiHeadAttention) -> None:
    """Raise if a split has an option that the lecture's stacked heads do not have."""
    options = {
        "value_head_dim": mha.value_head_dim != mha.head_dim,
        "alibi": mha.alibi,
        "position_bias": mha.position_bias is not None,
        "softcap": mha.softcap is not None,
        "sinks": mha.sinks is not None,
        "qk_norm": mha.q_norm is not None,
        "output_gate": mha.W_gate is not None,
    }
    used = [name for name, on in options.items() if on]
    if used:
        raise ConversionError(
            f"stacked heads have no {', '.join(options)}; got a split with {', '.join(used)}; "
            "keep it as it is"
        )


def _projections(mha: MultiHeadAttention) -> dict[str, nn.Linear]:
    """Return the three projections, split if they are fused."""
    for name in ("W_qkv",) if mha.fused else ("W_query", "W_key", "W_value"):
        check_plain(name, getattr(mha, name))
    if mha.fused:
        mha = copy.deepcopy(mha).unfuse()
    projections = {name: getattr(mha, name) for name in ("W_query", "W_key", "W_value")}
    _check_biases(projections, "")
    return projections


def _check_biases(projections: Mapping[str, nn.Linear], prefix: str) -> None:
    """Raise unless all three projections have a bias, or none: qkv_bias is one option."""
    without = [prefix + name for name, linear in projections.items() if linear.bias is None]
    if without and len(without) < len(projections):
        raise ConversionError(
            f"{prefix}W_query, W_key and W_value must all have a bias or none to be converted; "
            f"got none in {', '.join(without)}; give those without one zeros"
        )


def _heads(wrapper: MultiHeadAttentionWrapper) -> list[CausalAttention]:
    heads: list[CausalAttention] = []
    for index, head in enumerate(wrapper.heads):
        if not isinstance(head, CausalAttention):
            raise ConversionError(
                f"heads[{index}] must be a CausalAttention; got {type(head).__name__}; "
                "merge adapters first"
            )
        projections = {name: getattr(head, name) for name in ("W_query", "W_key", "W_value")}
        for name, projection in projections.items():
            check_plain(f"heads[{index}].{name}", projection)
        _check_biases(projections, f"heads[{index}].")
        heads.append(head)
    return heads


def _out_state(module: MultiHeadAttention | MultiHeadAttentionWrapper) -> dict[str, Tensor]:
    if module.out_proj is None:
        return {}
    check_plain("out_proj", module.out_proj)
    return copied("out_proj", module.out_proj)


def _common(heads: list[CausalAttention]) -> CausalAttention:
    """Return the first head; the others must differ from it in their weights only."""
    first = _options(heads[0])
    for index, head in enumerate(heads):
        for name, option in _options(head).items():
            if option != first[name]:
                raise ConversionError(
                    f"stacked heads must share {name} to become one split; heads[0] has "
                    f"{first[name]!r}, heads[{index}] has {option!r}"
                )
    return heads[0]


def _options(head: CausalAttention) -> dict[str, object]:
    names = ("d_in", "d_out", "context_length", "rope", "mask", "scale", "backend")
    return {name: getattr(head, name) for name in names} | {
        "dropout": head.dropout.p,
        "qkv_bias": head.W_query.bias is not None,
        "dtype": head.W_query.weight.dtype,
        "device": head.W_query.weight.device,
    }


def _one_a_group(rows: list[Tensor], group: int, name: str) -> list[Tensor]:
    """Return the first of each group's rows; the group must be equal bit for bit."""
    for index, row in enumerate(rows):
        leader = index - index % group
        if not row.is_meta and not torch.equal(row, rows[leader]):
            raise ConversionError(
                f"heads[{leader}] and heads[{index}] must have equal {name} to share one KV head; "
                f"they differ by up to {(row - rows[leader]).abs().max():.3g}; "
                "leave num_kv_heads out to keep every head"
            )
    return rows[::group]
