"""Benchmark cases: one `Case` has sizes, dtype, mask and targets."""

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

# Inputs of at least this many bytes in total do not stay in a processor's cache.
_OUT_OF_CACHE = 2**28
_MOST_COPIES = 8
# With more operations per byte of keys and values, a case is not memory-bound.
_OPERATIONS_A_BYTE = 16


@dataclass(frozen=True)
class Case:
    """One benchmark case. Sizes as in the legend of `polyhead.call`.

    Attributes:
        id: as in the table of targets; variants of a row follow a slash (`P7/bf16`).
        B, H, G, T, S, D: the sizes; a module's width is H * D.
        latent: size of values that are the first features of the keys; None: separate, size D.
        codes: True if the KV cache is int8.
        blocks: block size of the paged KV cache, in tokens; None: contiguous.
        dtype: of every tensor.
        kind: "attention" on queries, keys and values; "module" with projections; "generate", a
            transformers decoder, measured per token, or with T = S on its prompt; "model", a whole
            model of another library (`peers/models.py`).
        decoder: of "generate": a Llama of 4 layers as wide as H * D, or the real SmolLM2-135M.
        model: of "model": its name.
        causal: True if a query attends only to keys at its position and before.
        window: the number of keys before its own position a query attends to; None: all.
        train: True if gradients are computed too.
        dropout: probability with which a weight is dropped.
        statistics: True if head statistics are requested in addition to the output.
        in_cache: True if keys and values may stay in the processor's cache between calls.
        targets: minimum speed-up over "best" (the best peer), or over a peer by name.
        target_share: minimum share of the ceiling.
        target_us: maximum microseconds.
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
    kind: Literal["attention", "module", "generate", "model"] = "attention"
    decoder: Literal["Llama", "SmolLM2"] = "Llama"
    model: str = ""
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
        """True if it is one query per sequence against many keys."""
        return self.kind == "attention" and self.T == 1

    @property
    def reads(self) -> bool:
        """True if it is memory-bound: reading keys and values takes longer than the products."""
        return self.decode and self._operations <= _OPERATIONS_A_BYTE * self._cache_bytes

    @property
    def cached(self) -> bool:
        """True if keys and values are in a KV cache that is paged or quantized."""
        return self.codes or self.blocks is not None

    @property
    def mask(self) -> Mask | None:
        """The polyhead mask. None for decoding: the last query attends to every key."""
        if not self.causal or self.decode:
            return None
        causal = polyhead.mask.causal()
        return causal if self.window is None else causal & polyhead.mask.window(before=self.window)

    @property
    def pairs(self) -> float:
        """Query-key pairs per head that count as work; by convention, causal counts half."""
        if self.window is not None:
            return self.T * min(self.window + 1, self.S)
        return self.T * self.S / (2 if self.causal and not self.decode else 1)

    @property
    def work(self) -> float | None:
        """Work of one call: bytes read if memory-bound, else floating-point operations.

        A forward pass is 2 * B * H * pairs * (D + E) (two products), and a backward pass 2.5 times
        that (five products, one recomputed). A module adds four projections; their backward pass
        costs twice their forward. None for a whole model.
        """
        if self.is_model:
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
        """Unit of the rate, work per time."""
        if self.is_model:
            return None
        return "GB/s" if self.reads else "GFLOP/s"

    @property
    def ceiling(self) -> str | None:
        """Name of the machine ceiling that bounds it. (float16 is computed in float32.)"""
        if self.is_model or self.in_cache:
            return None
        if self.reads:
            return "read"
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"

    @property
    def width(self) -> int:
        return self.H * self.D

    @property
    def copies(self) -> int:
        """Number of inputs used round-robin, so that decoding reads memory, not the CPU cache."""
        if not self.decode or self.in_cache:
            return 1
        return min(ceil(_OUT_OF_CACHE / self._cache_bytes), _MOST_COPIES)

    @property
    def tokens(self) -> int:
        """Number of tokens one call generates; its time is divided by it."""
        return 8 if self.kind == "generate" and not self.prompt else 1

    @property
    def is_model(self) -> bool:
        """True if more than attention and its projections is measured."""
        return self.kind in ("generate", "model")

    @property
    def prompt(self) -> bool:
        """True if a decoder's prompt is measured, not the tokens after it."""
        return self.kind == "generate" and self.T == self.S

    @property
    def _operations(self) -> float:
        return 2 * self.B * self.H * self.pairs * (self.D + (self.latent or self.D))

    @property
    def _cache_bytes(self) -> int:
        tensors = 1 if self.latent else 2
        # int8 values have one float32 scale per token.
        token = self.D + 4 if self.codes else self.D * self.dtype.itemsize
        return self.B * self.G * self.S * tensors * token

    def __str__(self) -> str:
        names = {"attention": "decode" if self.decode else "forward"}
        kind = names.get(self.kind, self.kind) + (" and backward" if self.train else "")
        if self.kind == "generate":
            kind = f"{self.decoder}, {'a prompt' if self.prompt else 'a token'}:"
        if self.kind == "model":
            kind = self.model + (", forward and backward:" if self.train else ":")
        sizes = f"{self.B}, {self.H}/{self.G}, {self.T}, {self.S}, {self.D}"
        rule = "full" if self.mask is None else repr(self.mask)
        extras = [f"values of {self.latent} in the keys"] if self.latent else []
        extras += ["int8"] if self.codes else []
        extras += [f"blocks of {self.blocks}"] if self.blocks else []
        extras += [f"dropout {self.dropout}"] if self.dropout else []
        extras += ["head statistics"] if self.statistics else []
        return ", ".join([f"{kind} {sizes}", rule, *extras, self.dtype_name])

    def shrunk(self, factor: int) -> Case:
        """Return the case with batch, heads and tokens divided: for trials, not measurements."""
        if factor == 1:
            return self
        if self.kind == "model":  # whose sizes fit one another
            return replace(self, B=max(self.B // factor, 1))
        fixed = self.kind == "generate" and self.decoder != "Llama"  # its heads are given
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
        """Return random inputs of this case's shapes, equal for equal seeds in every dtype."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        if self.kind == "generate":
            return {"ids": torch.randint(1000, (self.B, self.S), generator=generator)}
        if self.kind == "model":
            return {"x": random(self.B, self.T, self.width)}
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
        """Round to values that int8 represents exactly, so that peers do not differ by rounding."""
        codes = (numbers.float() * 32).round().clamp(-127, 127)
        codes[..., 0] = 127  # the scale is computed from each token's largest value
        return (codes / 64).to(numbers.dtype)
