"""Layout: the rules that map a library's attention tensors to ours, applied in both directions.

A fused tensor is split into groups of rows, each of which holds a part of every projection:

    rows = (groups, parts)        GPT-NeoX: (H, (1, 1, 1))          Phi-3: (1, (H, G, G))

The module path and the state-dict path read the same `Layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ConversionError, check_count

__all__ = [
    "Layout",
    "Rule",
    "Sizes",
    "blocks",
    "by_group",
    "by_head",
    "linear",
    "parameter",
    "thirds",
]


@dataclass(frozen=True)
class Sizes:
    """Sizes that tensor shapes do not determine. Those that no rule needs may stay None.

    Attributes:
        num_heads: query heads, H.
        num_kv_heads: key/value heads, G.
        nope_head_dim, value_head_dim: of a latent head (DeepSeek).
        head_dim, width: features per head, and of the layer's input. No rule needs them; if a
            config names them, weights of other sizes are refused.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    nope_head_dim: int | None = None
    value_head_dim: int | None = None
    head_dim: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if number is not None:
                check_count(name, number, 1, "count from 1")

    def need(self, name: str) -> int:
        """Return the size `name`, which the layout requires."""
        number: int | None = getattr(self, name)
        if number is None:
            raise ConversionError(
                f"{name} must be known to split the heads of a fused weight; got None; pass "
                f"{name}=, or the model's config (config.json next to a file)"
            )
        return number


# The number of groups of rows, and the heads (or features) of each part per group.
Rows = tuple[int, tuple[int, ...]]


def whole(sizes: Sizes) -> Rows:
    return 1, (1,)


def thirds(sizes: Sizes) -> Rows:
    """Return the rows of queries, keys, values: equal parts, for any number of heads."""
    return 1, (1, 1, 1)


def by_head(sizes: Sizes) -> Rows:
    """Return the rows per head: its query, its key, its value."""
    return sizes.need("num_heads"), (1, 1, 1)


def by_group(sizes: Sizes) -> Rows:
    """Return the rows per KV group: its query heads, its key, its value."""
    H, G = sizes.need("num_heads"), sizes.need("num_kv_heads")
    if G < 1 or H % G:
        raise ConversionError(f"num_kv_heads must divide num_heads = {H}; got {G}; check both")
    return G, (H // G, 1, 1)


def blocks(sizes: Sizes) -> Rows:
    """Return the rows of all query heads, then all keys, then all values."""
    H, G = sizes.need("num_heads"), sizes.need("num_kv_heads")
    return 1, (H, G, G)


@dataclass(frozen=True)
class Rule:
    """One tensor of the other library, and our tensors that its rows belong to.

    Attributes:
        theirs: its name below the attention layer, such as "c_attn.weight".
        ours: names below our layer, in the order of the rows.
        rows: returns how its rows are split.
        transposed: True if the weight is stored (in, out), as GPT-2's Conv1D does.
        required: True if every layer of this layout has it.
    """

    theirs: str
    ours: tuple[str, ...]
    rows: Callable[[Sizes], Rows] = whole
    transposed: bool = False
    required: bool = True

    def to_ours(self, theirs: Tensor, sizes: Sizes) -> list[Tensor]:
        """Return our tensors: copies, unless the tensor is only renamed."""
        theirs = self._turned(theirs)
        if len(self.ours) == 1:
            return [theirs]
        groups, parts = self.rows(sizes)
        unit, left = divmod(theirs.shape[0], groups * sum(parts)) if theirs.ndim else (0, 1)
        if left or not unit:
            self._refuse(f"{self.theirs} {tuple(theirs.shape)}", groups, parts)
        pieces = theirs.unflatten(0, (groups, -1)).split([unit * part for part in parts], dim=1)
        return [
            piece.clone(memory_format=torch.contiguous_format).flatten(0, 1) for piece in pieces
        ]

    def to_theirs(self, ours: Sequence[Tensor], sizes: Sizes) -> Tensor:
        if len(self.ours) == 1:
            return self._turned(ours[0])
        groups, parts = self.rows(sizes)
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)}" for name, tensor in zip(self.ours, ours, strict=True)
        )
        kinds = {(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in ours}
        units = {
            tensor.shape[0] / (groups * part) if tensor.ndim else 0.5
            for tensor, part in zip(ours, parts, strict=True)
        }
        if len(kinds) > 1 or len(units) > 1 or not max(units).is_integer():
            self._refuse(shapes, groups, parts)
        joined = torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in ours], dim=1)
        return self._turned(joined.flatten(0, 1))

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T.contiguous() if self.transposed and tensor.ndim == 2 else tensor

    def _refuse(self, got: str, groups: int, parts: tuple[int, ...]) -> None:
        raise ConversionError(
            f"{self.theirs} must be {groups} x ({' + '.join(map(str, parts))}) heads of rows alike "
            f"of {', '.join(self.ours)}; got {got}; check num_heads and num_kv_heads"
        )


def linear(
    theirs: str,
    *ours: str,
    rows: Callable[[Sizes], Rows] = whole,
    transposed: bool = False,
) -> tuple[Rule, Rule]:
    """Return the rules of a linear layer: a weight and an optional bias."""
    weight, bias = (tuple(f"{name}.{kind}" for name in ours) for kind in ("weight", "bias"))
    return (
        Rule(f"{theirs}.weight", weight, rows, transposed),
        Rule(f"{theirs}.bias", bias, rows, required=False),
    )


def parameter(theirs: str, ours: str | None = None, *, required: bool = True) -> tuple[Rule]:
    """Return the rule of a tensor that is only renamed, or has the same name here."""
    return (Rule(theirs, (ours or theirs,), required=required),)


class Layout:
    """All rules of one kind of attention layer.

    Args:
        name: its name in `convert.state_dict`.
        rules: of its tensors.
        staying: parameters of their module that are not the attention's; they are not moved.
        unmovable: parameters without a counterpart here: layers with them are refused.
        num_kv_heads: reads G from a config; None: it is num_key_value_heads there, or H.
        grouped: True if there may be fewer KV heads than query heads.
        offset_norms: True if its norms multiply by 1 + weight, as Gemma's do.
    """

    def __init__(
        self,
        name: str,
        *rules: Iterable[Rule],
        staying: Iterable[str] = (),
        unmovable: Iterable[str] = (),
        num_kv_heads: Callable[[Mapping[str, Any]], int | None] | None = None,
        grouped: bool = True,
        offset_norms: bool = False,
    ) -> None:
        self.name = name
        self.grouped = grouped
        self.offset_norms = offset_norms
        self.staying = frozenset(staying)
        self._unmovable = frozenset(unmovable)
        self._num_kv_heads = num_kv_heads
        self.rules = tuple(rule for several in rules for rule in several)
        self.theirs = {rule.theirs for rule in self.rules}
        self.projections = {
            rule.theirs.rpartition(".")[0]
            for rule in self.rules
            if rule.ours[0].startswith(("W_", "out_proj"))
        }
        # Names that only attention has: a tensor below one of these belongs to a layer.
        self.roots = {
            rule.theirs.removesuffix(".weight")
            for rule in self.rules
            if rule.required and rule.ours[0].startswith("W_")
        }
        # Our layers (fused, stacked) may have another output width than input width. A family is
        # one class in models of one kind; torch's layer may be anywhere.
        self.one_width = not any(root.startswith("W_") for root in self.roots)
        self.is_family = self.one_width and not name.startswith("torch")
        self.ours = {name for rule in self.rules for name in rule.ours}
        # A layer of this layout has all of these: they locate it in a checkpoint.
        self.their_marks = {rule.theirs for rule in self.rules if rule.required}
        self.our_marks = {name for rule in self.rules if rule.required for name in rule.ours}

    def owns(self, name: str) -> bool:
        """True if a name below a layer is one of its tensors."""
        return name in self.theirs or name in self._unmovable

    @torch.no_grad()
    def to_ours(self, theirs: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """Return our tensors by name; they require grad as the given ones did.

        Raises:
            ConversionError: a tensor is missing, unknown, or has other rows than the sizes imply.
        """
        self._check(theirs, self.theirs, self.their_marks)
        ours: dict[str, Tensor] = {}
        for rule in self.rules:
            if (tensor := theirs.get(rule.theirs)) is None:
                continue
            for name, part in zip(rule.ours, rule.to_ours(tensor, sizes), strict=True):
                ours[name] = part.requires_grad_(tensor.requires_grad)
        return ours

    @torch.no_grad()
    def to_theirs(self, ours: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """Return their tensors by name; the inverse of `to_ours`, bit for bit."""
        self._check(ours, self.ours, self.our_marks)
        theirs: dict[str, Tensor] = {}
        for rule in self.rules:
            tensors = [ours[name] for name in rule.ours if name in ours]
            if not tensors:
                continue
            flags = {tensor.requires_grad for tensor in tensors}
            if len(tensors) < len(rule.ours) or len(flags) > 1:
                what = "exist" if len(tensors) < len(rule.ours) else "require grad, or none,"
                raise ConversionError(
                    f"{', '.join(rule.ours)} must all {what} to become {rule.theirs}; got a "
                    "mixture; make them alike"
                )
            joined = rule.to_theirs(tensors, sizes)
            theirs[rule.theirs] = joined.requires_grad_(flags.pop())
        return theirs

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes in a model's config, in any of transformers' spellings."""

        def first(*names: str) -> int | None:
            return next((config[name] for name in names if config.get(name) is not None), None)

        num_heads = first("num_attention_heads", "n_head", "num_heads")
        if self._num_kv_heads is None:
            num_kv_heads = first("num_key_value_heads") or num_heads
        else:
            num_kv_heads = self._num_kv_heads(config)
        return Sizes(
            num_heads,
            num_kv_heads,
            first("qk_nope_head_dim"),
            first("v_head_dim"),
            head_dim=first("head_dim", "d_kv"),
            width=first("hidden_size", "n_embd", "n_embed", "d_model"),
        )

    def _check(self, got: Mapping[str, Tensor], known: set[str], marks: set[str]) -> None:
        if unknown := sorted(got.keys() - known):
            raise ConversionError(
                f"layout {self.name} has no place for {', '.join(unknown)}; it holds "
                f"{', '.join(sorted(known))}; choose another layout, or merge adapters first"
            )
        if missing := sorted(marks - got.keys()):
            raise ConversionError(
                f"layout {self.name} needs {', '.join(sorted(marks))}; {', '.join(missing)} "
                "cannot be found; choose another layout"
            )
