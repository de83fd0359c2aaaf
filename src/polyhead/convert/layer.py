"""One attention layer of a checkpoint, its tensors held against one another before they move.

The rules are those of any attention, so that they are the same for every layout and both ways:

    W_query (H * D, d_in)    W_key (G * D, d_in)    W_value (G * E, d_in)    out_proj (d_out, H * E)
    a bias: the weight's outputs    q_norm, k_norm (D,)    sinks (H,)    position_bias (buckets, H)

Latent (DeepSeek):

    W_kv_down (C + R, d_in)    kv_norm (C,)    W_key (H * N, C)    W_value (H * E, C)
    W_query_down (Q, d_in)     q_norm (Q,)     W_query (H * (N + R), Q or d_in)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from polyhead.convert.layout import Layout, Sizes
from polyhead.errors import ConversionError

__all__ = ["check_shapes", "check_tensors"]

_DEQUANTIZE = (
    "dequantize the model first, as model.dequantize() of transformers does, and save that one"
)


_CHECK_HEADS = "check num_heads, num_kv_heads and the config"
_HEAD = re.compile(r"heads\.(\d+)\.")


def check_tensors(layer: Mapping[str, Tensor], layout: Layout | None, sizes: Sizes) -> Sizes:
    """Each tensor of a layer on its own, under the names it comes with.

    Args:
        layer: by name below the layer.
        layout: whose names they are; None: ours.
        sizes: what is known.

    Returns:
        The sizes, with the number of heads where stacked heads tell it.

    Raises:
        ConversionError: one is no plain floating point tensor, or has other dimensions.
    """
    ours = {rule.theirs: rule.ours[0] for rule in layout.rules} if layout else {}
    stacked = layout is not None and not layout.one_width
    heads: set[int] = set()
    first: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in layer.items():
        alone = name
        if stacked and (head := _HEAD.match(name)):
            heads.add(int(head[1]))
            alone = name[head.end() :]
        if layout and alone not in ours:
            continue  # the layout refuses it by name
        check_numbers(name, tensor)
        rank = _rank(ours.get(alone, alone))
        if tensor.ndim != rank:
            raise ConversionError(
                f"{name} must have {rank} dimension{'s' * (rank > 1)}; got {tuple(tensor.shape)}; "
                "get the checkpoint anew, or choose the layout of its family"
            )
        if alone is not name:
            other, like = first.setdefault(alone, (name, tensor))
            if like.shape != tensor.shape:
                raise ConversionError(
                    f"{name} must have the shape {tuple(like.shape)} of {other}; got "
                    f"{tuple(tensor.shape)}; stacked heads are alike"
                )
    if not heads:
        return sizes
    if sizes.num_heads not in (None, H := len(heads)):
        raise ConversionError(
            f"num_heads must be the {H} heads that are stacked; got {sizes.num_heads}; leave it out"
        )
    return replace(sizes, num_heads=H)


def check_shapes(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], layout: Layout | None, sizes: Sizes
) -> None:
    """The tensors of a layer against one another, and against the numbers of heads.

    Args:
        ours: the layer under our names.
        theirs: the same under those that an error shall name: the layout's, or ours.
        layout: the family whose rules hold; None: ours.
        sizes: what is known.

    Raises:
        ConversionError: they cannot be one layer of that kind.
    """
    is_read = ours is not theirs
    rules = {name: rule.theirs for rule in layout.rules for name in rule.ours} if layout else {}

    def named(name: str) -> tuple[str, str]:
        name = rules.get(name, name) if is_read else name
        like = theirs.get(name, ours.get(name))
        return name, "nothing" if like is None else str(tuple(like.shape))

    shapes = Shapes(ours, named, _CHECK)
    try:
        shapes.check(sizes, layout, is_read=is_read)
    except ConversionError:
        if layout and is_read and _fits_turned(theirs, layout, sizes):
            weights = ", ".join(name for name, tensor in theirs.items() if tensor.ndim == 2)
            shapes = Shapes(ours, named, _TURN.format(weights))
        shapes.check(sizes, layout, is_read=is_read)


_CHECK = "get the checkpoint anew, or choose the layout of its family"
_TURN = (
    "all of it fits when turned, as programs that keep weights the other way save it (nanoGPT "
    "under GPT-2's names): transpose {} first (tensor.T)"
)


def _fits_turned(theirs: Mapping[str, Tensor], layout: Layout, sizes: Sizes) -> bool:
    """Whether the layer would be one if its weights were kept the other way, (in, out)."""
    turned = {
        name: tensor.detach().to("meta").T if tensor.ndim == 2 else tensor.detach().to("meta")
        for name, tensor in theirs.items()
    }
    try:
        ours = layout.to_ours(turned, sizes)
        Shapes(ours, lambda name: (name, ""), "").check(sizes, layout, is_read=True)
    except ConversionError:
        return False
    return True


def _rank(ours: str) -> int:
    """How many dimensions a tensor of this name of ours has."""
    is_norm = ours.rpartition(".")[0].endswith("_norm")
    return 1 if ours.endswith("bias") or ours == "sinks" or is_norm else 2


def check_numbers(name: str, tensor: Tensor) -> None:
    """A tensor that moves is dense numbers of 16 bits or more.

    Raises:
        ConversionError: it holds codes of a quantizer, or is of a class of its own.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor).__name__
        remedy = (
            "gather it first (tensor.full_tensor())" if kind == "DTensor" else _DEQUANTIZE
        )
        raise ConversionError(f"{name} must be a plain tensor to be moved; got a {kind}; {remedy}")
    dtype = tensor.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConversionError(
            f"{name} must hold floating point numbers of 16 bits or more; got {dtype}, which are "
            f"codes; {_DEQUANTIZE}"
        )
    if tensor.layout is not torch.strided:
        raise ConversionError(
            f"{name} must be a dense tensor to be moved; got {tensor.layout}; call to_dense() first"
        )


class Shapes:
    """The shapes of a layer of ours, by name, and the errors that tell them by the file's names.

    Args:
        ours: the layer under our names.
        named: gives, for a name of ours, the file's name of the tensor that holds it, and its shape.
        remedy: what helps where tensors do not fit.
    """

    def __init__(
        self, ours: Mapping[str, Tensor], named: Callable[[str], tuple[str, str]], remedy: str
    ) -> None:
        self._ours = ours
        self._named = named
        self._remedy = remedy

    def check(self, sizes: Sizes, layout: Layout | None, *, is_read: bool) -> None:
        """Raise unless they can be one layer's.

        Args:
            sizes: what is known.
            layout: of the family that the layer is read from or written for; None: ours.
            is_read: whether it is read from there.
        """
        is_family = layout is not None and layout.is_family
        self._biases()
        self._dtypes()
        if "W_kv_down.weight" in self._ours:
            self._latent(sizes)
        else:
            # torch's keys and values may be made of features of their own (kdim, vdim).
            self._inputs(layout is not None and layout.name == "torch_unpacked")
            self._heads(sizes, family=is_family, grouped=layout is None or layout.grouped)
        if layout is not None and layout.one_width:
            is_turned = any(rule.transposed for rule in layout.rules)
            self._width(sizes, is_checked=is_read or is_turned)

    def _outputs(self, name: str) -> int:
        return self._ours[f"{name}.weight"].shape[0]

    def _takes(self, name: str) -> int:
        return self._ours[f"{name}.weight"].shape[1]

    def _refuse(self, name: str, rule: str, remedy: str = "") -> NoReturn:
        raise ConversionError(
            f"{self._named(name)[0]} must {rule}; got {self._named(name)[1]}; "
            f"{remedy or self._remedy}"
        )

    def _with(self, name: str) -> str:
        return " ".join(self._named(f"{name}.weight"))

    def _biases(self) -> None:
        for name, tensor in self._ours.items():
            projection, _, kind = name.rpartition(".")
            if kind != "bias":
                continue
            if f"{projection}.weight" not in self._ours:
                self._refuse(name, f"come with {projection}.weight, which is not there")
            if tensor.shape[0] != self._outputs(projection):
                rows = self._outputs(projection)
                self._refuse(name, f"hold one number an output of {self._with(projection)}, {rows}")
        for name, tensor in self._ours.items():
            if 0 in tensor.shape:
                self._refuse(name, "hold numbers")

    def _dtypes(self) -> None:
        """A norm or sinks may be kept in float32; what is multiplied and added is of one dtype."""
        first = self._ours["W_query.weight"].dtype
        for name, tensor in self._ours.items():
            if name.startswith(("W_", "out_proj")) and tensor.dtype != first:
                self._refuse(
                    name,
                    f"be {first}, as {self._named('W_query.weight')[0]} is; it is {tensor.dtype}",
                    "cast the layer to one dtype first",
                )

    def _inputs(self, own_columns: bool) -> None:
        width = self._takes("W_query")
        others = ("W_gate",) if own_columns else ("W_key", "W_value", "W_gate")
        for name in others:
            if f"{name}.weight" in self._ours and self._takes(name) != width:
                self._refuse(
                    f"{name}.weight", f"take the {width} features that {self._with('W_query')} does"
                )

    def _heads(self, sizes: Sizes, *, family: bool, grouped: bool) -> None:
        queries, keys, values = (self._outputs(f"W_{x}") for x in ("query", "key", "value"))
        if family and values != keys:
            self._refuse("W_value.weight", f"give {keys} features, as {self._with('W_key')} does")
        if not grouped and keys != queries:
            self._refuse("W_key.weight", f"give {queries} features, as {self._with('W_query')} do")
        if queries % keys:
            self._refuse(
                "W_key.weight", f"give a divisor of the {queries} of {self._with('W_query')}"
            )
        merged = values * (queries // keys)
        if "out_proj.weight" in self._ours and self._takes("out_proj") != merged:
            self._refuse(
                "out_proj.weight",
                f"take the {merged} features that the heads of {self._with('W_query')} and "
                f"{self._with('W_value')} give",
            )
        if "W_gate.weight" in self._ours and self._outputs("W_gate") != merged:
            self._refuse("W_gate.weight", f"give the heads' {merged} features")
        H = self._count(sizes)
        if H is not None:
            self._per_head(sizes, H, (queries, keys, values), family)
        self._norms(H, queries, keys, family=family)

    def _count(self, sizes: Sizes) -> int | None:
        """How many query heads there are, if anything tells."""
        counts = {}
        if "sinks" in self._ours:
            counts["sinks"] = self._ours["sinks"].shape[0]
        if "position_bias.weight" in self._ours:
            counts["position_bias.weight"] = self._ours["position_bias.weight"].shape[1]
        H = sizes.num_heads
        if H is None and not counts and sizes.num_kv_heads is not None:
            D = self._outputs("W_key") // sizes.num_kv_heads
            H = self._outputs("W_query") // D if D else None
        for name, count in counts.items():
            H = count if H is None else H
            if count != H:
                self._refuse(name, f"hold a number a head, for {H} heads")
        return H

    def _per_head(
        self, sizes: Sizes, H: int, features: tuple[int, int, int], family: bool
    ) -> None:
        queries, keys, values = features
        D, left = divmod(queries, H)
        if left or not D:
            self._refuse("W_query.weight", f"give the features of {H} heads", _CHECK_HEADS)
        if sizes.head_dim is not None and sizes.head_dim != D:
            rule = f"give {H} heads of {sizes.head_dim} features, {H * sizes.head_dim} in all"
            self._refuse("W_query.weight", rule, _CHECK_HEADS)
        G, left = divmod(keys, D)
        # A config that names no key heads is read as having as many as query heads.
        wrong = sizes.num_kv_heads not in ((None, G) if family else (None, G, H))
        if left or not G or wrong or values % G:
            count = sizes.num_kv_heads if wrong else f"a divisor of {H}"
            rule = f"give key heads of {D} features, {count} of them"
            self._refuse("W_key.weight", rule, _CHECK_HEADS)

    def _norms(self, H: int | None, queries: int, keys: int, *, family: bool) -> None:
        if ("q_norm.weight" in self._ours) != ("k_norm.weight" in self._ours):
            there = "q_norm" if "q_norm.weight" in self._ours else "k_norm"
            self._refuse(f"{there}.weight", "come with the norm of the others, which is not there")
        for name in ("q_norm.weight", "k_norm.weight"):
            if name not in self._ours:
                continue
            size = self._ours[name].shape[0]
            if H is None and family and size == queries:
                self._refuse(
                    name,
                    f"be of one head, and all {queries} features are one head only if there is "
                    "no other",
                    "pass num_heads= (--heads 1), or keep a layer whose norms are over all heads, "
                    "as OLMo 2's are",
                )
            D = self._ours["q_norm.weight"].shape[0] if H is None else queries // H
            if size != D or queries % D or keys % D:
                self._refuse(
                    name,
                    f"hold one number a feature of a head, {D}",
                    "choose the layout of a family whose norms are so: those over all heads, as "
                    "OLMo 2's, have no counterpart here",
                )

    def _width(self, sizes: Sizes, *, is_checked: bool) -> None:
        """What enters a family's layer is as wide as what it gives: a residual is around it."""
        if not is_checked:
            return
        entering = "W_query" if "W_query_down.weight" not in self._ours else "W_query_down"
        width = self._takes(entering)
        if sizes.width is not None and width != sizes.width:
            self._refuse(f"{entering}.weight", f"take the config's {sizes.width} features")
        if "out_proj.weight" in self._ours and self._outputs("out_proj") != width:
            self._refuse(
                "out_proj.weight", f"give the {width} features that {self._with(entering)} takes"
            )

    def _latent(self, sizes: Sizes) -> None:
        """Raise unless the tensors of a latent layer (DeepSeek) fit together."""
        queries, keys, values = (self._outputs(f"W_{x}") for x in ("query", "key", "value"))
        C = self._takes("W_key")
        entering = self._takes("W_kv_down")
        if self._takes("W_value") != C:
            self._refuse("W_value.weight", f"take the latent's {C} features")
        if "kv_norm.weight" in self._ours and self._ours["kv_norm.weight"].shape[0] != C:
            self._refuse("kv_norm.weight", f"hold one number a feature of the latent, {C}")
        if (R := self._outputs("W_kv_down") - C) < 0:
            self._refuse("W_kv_down.weight", f"give the latent's {C} features and rope's")
        source = "W_query"
        if "W_query_down.weight" in self._ours:
            source, Q = "W_query_down", self._outputs("W_query_down")
            if self._takes("W_query") != Q:
                self._refuse("W_query.weight", f"take the queries' latent of {Q} features")
            if "q_norm.weight" in self._ours and self._ours["q_norm.weight"].shape[0] != Q:
                self._refuse("q_norm.weight", f"hold one number a feature of the latent, {Q}")
        if self._takes(source) != entering:
            self._refuse(f"{source}.weight", f"take {entering} features, as the keys' latent does")
        if "out_proj.weight" in self._ours and self._takes("out_proj") != values:
            self._refuse("out_proj.weight", f"take the {values} features that the heads give")
        H = sizes.num_heads
        if H is None and R:
            H = (queries - keys) // R
        if H is None:
            return
        if H < 1 or queries != keys + H * R or keys % H or values % H:
            rule = f"give {keys} features and {R} a head for rope, {keys} + {H} x {R}"
            self._refuse("W_query.weight", rule, _CHECK_HEADS)
