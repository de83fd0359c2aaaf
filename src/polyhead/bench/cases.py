"""What is measured: one `Case` is sizes, dtype, rule, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

import polyhead.mask
from polyhead.mask import Mask

__all__ = ["Case", "Inputs"]

Inputs = dict[str, Tensor]

# Tensors of at least this many bytes in turn do not stay in a processor's cache.
_OUT_OF_CACHE = 2**28
_MOST_COPIES = 8
# More operations than this for each byte of keys and values take longer than reading it.
_OPERATIONS_A_BYTE = 16


@dataclass(frozen=True)
class Case:
    """One thing to measure. Sizes as in the legend of `polyhead.call`.

    Attributes:
        id: as in the table of targets; variants of a row follow a slash (`P7/bf16`).
        B, H, G, T, S, D: the sizes; a module's width is H * D.
        latent: size of values that are the first features of the keys; None: of their own, D.
        codes: whether a cache holds keys and values as int8 codes.
        blocks: in blocks of how many tokens a cache holds them; None: side by side.
        dtype: of every tensor.
        kind: "attention" on queries, keys and values; "module" with projections; "generate", a
            decoder of transformers, of which a token is measured, or with T = S its prompt.
        decoder: of "generate": a Llama of 4 layers as wide as H * D, or the real SmolLM2-135M.
        causal: whether a query sees only keys at its position and before.
        window: how many keys before its own position a query sees, or None for all.
        train: whether the gradients belong to it.
        dropout: probability with which a weight is dropped.
        statistics: whether head statistics are asked for beside the output.
        in_cache: whether keys and values may stay in the processor's cache from call to call.
        targets: the least speed-up wanted over "best" (the best peer), or over a peer by name.
        target_share: the least share wanted of the ceiling.
        target_us: the most microseconds wanted.
    """

    id: str
    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    latent: int | None = None
    codes: bool = False
    blocks: int | None = None
    dtype: torch.dtype = torch.float32
    kind: Literal["attention", "module", "generate"] = "attention"
    decoder: Literal["Llama", "SmolLM2"] = "Llama"
    causal: bool = True
    window: int | None = None
    train: bool = False
    dropout: float = 0.0
    statistics: bool = False
    in_cache: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)
    target_share: float | None = None
    target_us: float | None = None

    @property
    def decode(self) -> bool:
        """Whether it is one query against many keys."""
        return self.kind == "attention" and self.T == 1

    @property
    def reads(self) -> bool:
        """Whether reading keys and values is the work, and not the products with them."""
        return self.decode and self._operations <= _OPERATIONS_A_BYTE * self._cache_bytes

    @property
    def cached(self) -> bool:
        """Whether keys and values are what a cache holds, and not tensors."""
        return self.codes or self.blocks is not None

    @property
    def mask(self) -> Mask | None:
        """The rule, as polyhead writes it. One last query sees every key: no rule is needed."""
        if not self.causal or self.decode:
            return None
        causal = polyhead.mask.causal()
        return causal if self.window is None else causal & polyhead.mask.window(before=self.window)

    @property
    def pairs(self) -> float:
        """Query-key pairs of a head that count as work; causal is half of all, as is usual."""
        if self.window is not None:
            return self.T * min(self.window + 1, self.S)
        return self.T * self.S / (2 if self.causal and not self.decode else 1)

    @property
    def work(self) -> float | None:
        """What a call has to do: bytes where reading is the work, else floating-point operations.

        A forward pass is 2 * B * H * pairs * (D + E) (two products), and a backward pass 2.5 times
        that (five products, one of them again). A module adds four projections; their backward pass
        costs twice their forward. None for a whole decoder.
        """
        if self.kind == "generate":
            return None
        if self.reads:
            return float(self._cache_bytes)
        attention = self._operations
        projections = 4 * 2 * self.B * self.T * self.width**2 if self.kind == "module" else 0
        return attention * 3.5 + projections * 3 if self.train else attention + projections

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def unit(self) -> str | None:
        """Of the rate at which the work is done."""
        if self.kind == "generate":
            return None
        return "GB/s" if self.reads else "GFLOP/s"

    @property
    def ceiling(self) -> str | None:
        """Which ceiling of this machine bounds it. (float16 is computed in float32.)"""
        if self.kind == "generate" or self.in_cache:
            return None
        if self.reads:
            return "read"
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"

    @property
    def width(self) -> int:
        return self.H * self.D

    @property
    def copies(self) -> int:
        """How many inputs take turns, so that decoding reads memory as it does between layers."""
        if not self.decode or self.in_cache:
            return 1
        return min(ceil(_OUT_OF_CACHE / self._cache_bytes), _MOST_COPIES)

    @property
    def tokens(self) -> int:
        """How many tokens one call makes; its time is divided by it."""
        return 8 if self.kind == "generate" and not self.prompt else 1

    @property
    def prompt(self) -> bool:
        """Whether reading a prompt is the work of a decoder, and not the tokens after it."""
        return self.kind == "generate" and self.T == self.S

    @property
    def _operations(self) -> float:
        return 2 * self.B * self.H * self.pairs * (self.D + (self.latent or self.D))

    @property
    def _cache_bytes(self) -> int:
        tensors = 1 if self.latent else 2
        # Codes have a scale of float32 for each token.
        token = self.D + 4 if self.codes else self.D * self.dtype.itemsize
        return self.B * self.G * self.S * tensors * token

    def __str__(self) -> str:
        names = {"attention": "decode" if self.decode else "forward"}
        kind = names.get(self.kind, self.kind) + (" and backward" if self.train else "")
        if self.kind == "generate":
            kind = f"{self.decoder}, {'a prompt' if self.prompt else 'a token'}:"
        sizes = f"{self.B}, {self.H}/{self.G}, {self.T}, {self.S}, {self.D}"
        rule = "full" if self.mask is None else repr(self.mask)
        extras = [f"values of {self.latent} in the keys"] if self.latent else []
        extras += ["int8 codes"] if self.codes else []
        extras += [f"blocks of {self.blocks}"] if self.blocks else []
        extras += [f"dropout {self.dropout}"] if self.dropout else []
        extras += ["head statistics"] if self.statistics else []
        return ", ".join([f"{kind} {sizes}", rule, *extras, self.dtype_name])

    def shrunk(self, factor: int) -> Case:
        """The same kind of case with batch, heads and tokens divided: a trial, no measurement."""
        if factor == 1:
            return self
        fixed = self.kind == "generate" and self.decoder != "Llama"  # it has the heads it has
        G = self.G if fixed else max(self.G // factor, 1)
        return replace(
            self,
            B=max(self.B // factor, 1),
            H=G * (self.H // self.G),
            G=G,
            T=max(self.T // factor, 1),
            S=max(self.S // factor, 1),
        )

    def inputs(self, seed: int) -> Inputs:
        """Random numbers of this case's shapes, the same for the same seed in every dtype."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        if self.kind == "generate":
            return {"ids": torch.randint(1000, (self.B, self.S), generator=generator)}
        if self.kind == "module":
            d = self.width
            return {
                "x": random(self.B, self.T, d),
                "qkv_weight": random(3 * d, d, scale=d**-0.5),
                "out_weight": random(d, d, scale=d**-0.5),
                "out_bias": random(d),
                "grad": random(self.B, self.T, d),
            }
        inputs = {
            "query": random(self.B, self.H, self.T, self.D),
            "key": random(self.B, self.G, self.S, self.D),
            "value": random(self.B, self.G, self.S, self.D),
        }
        if self.codes:
            inputs |= {name: self._exact_codes(inputs[name]) for name in ("key", "value")}
        if self.latent:
            inputs["value"] = inputs["key"][..., : self.latent]
        return inputs | ({"grad": random(self.B, self.H, self.T, self.D)} if self.train else {})

    @staticmethod
    def _exact_codes(numbers: Tensor) -> Tensor:
        """Numbers that int8 codes keep exactly: what peers differ in is then not the rounding."""
        codes = (numbers.float() * 32).round().clamp(-127, 127)
        codes[..., 0] = 127  # the largest of a token is what its scale is made of
        return (codes / 64).to(numbers.dtype)
