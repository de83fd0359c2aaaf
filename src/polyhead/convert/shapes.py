"""Shape checks of an attention layer's tensors against one another.

The rules hold for any attention, so they are the same for every layout, in both directions:

    W_query (H * D, d_in)    W_key (G * D, d_in)    W_value (G * E, d_in)    out_proj (d_out, H * E)
    a bias: the weight's outputs    q_norm, k_norm (D,)    sinks (H,)    position_bias (buckets, H)

Latent (DeepSeek):

    W_kv_down (C + R, d_in)    kv_norm (C,)    W_key (H * N, C)    W_value (H * E, C)
    W_query_down (Q, d_in)     q_norm (Q,)     W_query (H * (N + R), Q or d_in)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

from torch import Tensor

from polyhead.convert.layout import Layout, Sizes
from polyhead.errors import ConversionError

__all__ = ["Shapes"]

_CHECK = "get the checkpoint again, or choose the layout of its family"
_CHECK_SIZES = "check num_heads, nope_head_dim, value_head_dim and the config"
_CHECK_HEADS = "check num_heads, num_kv_heads and the config"
_QKV = ("W_query", "W_key", "W_value")


class Shapes:
    """Shapes of a layer under our names; errors use the names in the file.

    Args:
        ours: the layer under our names.
        named: returns, for one of our names, the name and shape of the file's tensor with it.
    """

    def __init__(
        self, ours: Mapping[str, Tensor], named: Callable[[str], tuple[str, str]], remedy: str = ""
    ) -> None:
        self._ours = ours
        self._named = named

    def check(self, sizes: Sizes, layout: Layout | None, *, is_read: bool) -> None:
        """Raise unless the tensors fit together as one layer.

        Args:
            sizes: known sizes.
            layout: of the family that the layer is read from or written for; None: ours.
            is_read: True if it is read from that layout.
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
        if layout is not None and layout.name.startswith("torch"):
            self._both_biases()
        if layout is not None and layout.one_width:
            is_turned = any(rule.transposed for rule in layout.rules)
            self._width(sizes, is_checked=is_read or is_turned)

    def _outputs(self, name: str) -> int:
        return self._ours[f"{name}.weight"].shape[0]

    def _takes(self, name: str) -> int:
        return self._ours[f"{name}.weight"].shape[1]

    def _refuse(self, name: str, rule: str, remedy: str = _CHECK) -> NoReturn:
        raise ConversionError(
            f"{self._named(name)[0]} must {rule}; got {self._named(name)[1]}; {remedy}"
        )

    def _with(self, name: str) -> str:
        return " ".join(self._named(f"{name}.weight"))

    def _sources(self) -> str:
        """Describe the tensors of queries and values; a fused layout has one for both."""
        return " and ".join(dict.fromkeys((self._with("W_query"), self._with("W_value"))))

    def _biases(self) -> None:
        for name, tensor in self._ours.items():
            projection, _, kind = name.rpartition(".")
            if kind != "bias":
                continue
            if f"{projection}.weight" not in self._ours:
                self._refuse(name, f"come with {projection}.weight, which is missing")
            if tensor.shape[0] != self._outputs(projection):
                rows = self._outputs(projection)
                self._refuse(name, f"have one value per output of {self._with(projection)}, {rows}")
        without = [name for name in _QKV if f"{name}.bias" not in self._ours]
        if without and len(without) < len(_QKV) and "W_kv_down.weight" not in self._ours:
            there = next(name for name in _QKV if name not in without)
            rule = "come with the bias of queries, keys and values alike; one of them is missing"
            remedy = "give the whole checkpoint, or zeros where the model has no bias (Whisper)"
            self._refuse(f"{there}.bias", rule, remedy)
        for name, tensor in self._ours.items():
            if 0 in tensor.shape:
                self._refuse(name, "have values")

    def _both_biases(self) -> None:
        """Raise unless torch's layer has both biases, before the heads and after them, or none."""
        pair = ("W_query.bias", "out_proj.bias")
        there = [name for name in pair if name in self._ours]
        if len(there) == 1:
            self._refuse(
                there[0],
                "come with the other bias of torch's layer, in_proj_bias and out_proj.bias",
                "give the whole checkpoint, or zeros where the layer has no bias, as to_torch does",
            )

    def _dtypes(self) -> None:
        """Raise unless all projections have one dtype; norms and sinks may be float32."""
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
                f"take the {merged} features that the heads of {self._sources()} give",
            )
        if "W_gate.weight" in self._ours and self._outputs("W_gate") != merged:
            self._refuse("W_gate.weight", f"give the heads' {merged} features")
        H = self._count(sizes)
        if H is not None:
            self._per_head(sizes, H, (queries, keys, values), family)
        self._norms(H, queries, keys, family=family)

    def _count(self, sizes: Sizes) -> int | None:
        """Return the number of query heads, if a size or a tensor determines it."""
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
                self._refuse(name, f"have one value per head, for {H} heads")
        return H

    def _per_head(self, sizes: Sizes, H: int, features: tuple[int, int, int], family: bool) -> None:
        queries, keys, values = features
        D, left = divmod(queries, H)
        if left or not D:
            self._refuse("W_query.weight", f"give the features of {H} heads", _CHECK_HEADS)
        if sizes.head_dim is not None and sizes.head_dim != D:
            rule = f"give {H} heads of {sizes.head_dim} features, {H * sizes.head_dim} in all"
            self._refuse("W_query.weight", rule, _CHECK_HEADS)
        G, left = divmod(keys, D)
        # A config without a number of KV heads is read as having H.
        wrong = sizes.num_kv_heads not in ((None, G) if family else (None, G, H))
        if left or not G or wrong or values % G:
            count = sizes.num_kv_heads if wrong else f"a divisor of {H}"
            rule = f"give KV heads of {D} features, {count} of them"
            self._refuse("W_key.weight", rule, _CHECK_HEADS)

    def _norms(self, H: int | None, queries: int, keys: int, *, family: bool) -> None:
        if ("q_norm.weight" in self._ours) != ("k_norm.weight" in self._ours):
            there = "q_norm" if "q_norm.weight" in self._ours else "k_norm"
            self._refuse(f"{there}.weight", "come with the norm of the others, which is missing")
        for name in ("q_norm.weight", "k_norm.weight"):
            if name not in self._ours:
                continue
            size = self._ours[name].shape[0]
            if H is None and family and size == queries:
                self._refuse(
                    name,
                    f"be of one head, and all {queries} features are one head only if there is "
                    "no other",
                    "pass num_heads=1, or keep a layer whose norms are over all heads, "
                    "as OLMo 2's are",
                )
            D = self._ours["q_norm.weight"].shape[0] if H is None else queries // H
            if size != D or queries % D or keys % D:
                self._refuse(
                    name,
                    f"have one value per feature of a head, {D}",
                    "choose the layout of a family with norms per head: those over all heads, as "
                    "OLMo 2's, have no counterpart here",
                )

    def _width(self, sizes: Sizes, *, is_checked: bool) -> None:
        """Raise unless a family's layer has equal input and output widths (a residual needs it)."""
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
        latent = self._takes("W_key")
        entering = self._takes("W_kv_down")
        if self._takes("W_value") != latent:
            self._refuse("W_value.weight", f"take the latent's {latent} features")
        if "kv_norm.weight" in self._ours and self._ours["kv_norm.weight"].shape[0] != latent:
            self._refuse("kv_norm.weight", f"have one value per feature of the latent, {latent}")
        if (R := self._outputs("W_kv_down") - latent) < 0:
            self._refuse("W_kv_down.weight", f"give the latent's {latent} features and rope's")
        source = "W_query"
        if "W_query_down.weight" in self._ours:
            source, rank = "W_query_down", self._outputs("W_query_down")
            if self._takes("W_query") != rank:
                self._refuse("W_query.weight", f"take the queries' latent of {rank} features")
            if "q_norm.weight" in self._ours and self._ours["q_norm.weight"].shape[0] != rank:
                self._refuse("q_norm.weight", f"have one value per feature of the latent, {rank}")
        if self._takes(source) != entering:
            self._refuse(f"{source}.weight", f"take {entering} features, as the keys' latent does")
        if "out_proj.weight" in self._ours and self._takes("out_proj") != values:
            self._refuse("out_proj.weight", f"take the {values} features that the heads give")
        H = sizes.num_heads
        for name, size in (("W_key", sizes.nope_head_dim), ("W_value", sizes.value_head_dim)):
            if H is not None and size is not None and self._outputs(name) != H * size:
                rule = f"give {H} heads of {size} features, {H * size}"
                self._refuse(f"{name}.weight", rule, _CHECK_SIZES)
        if H is None and R:
            H = (queries - keys) // R
        if H is None:
            return
        if H < 1 or queries != keys + H * R or keys % H or values % H:
            rule = f"give {keys} features and {R} per head for rope, {keys} + {H} x {R}"
            self._refuse("W_query.weight", rule, _CHECK_HEADS)
