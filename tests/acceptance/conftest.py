"""The modules in the variants that decoders use, as what takes tensors and gives a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph

B, D_IN, D_OUT, H, CONTEXT = 2, 10, 24, 6, 64


class Padded(nn.Module):
    """A module whose mask is made of a tensor it is called with."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.inner(x, mask=ph.mask.lengths(lengths))


@dataclass(frozen=True)
class Variant:
    """A module under a name; `build` makes one, `inputs` the tensors it is called with."""

    name: str
    kind: Callable[..., nn.Module] = ph.MultiHeadAttention
    options: dict[str, Any] = field(default_factory=dict)
    memory: bool = False
    lengths: bool = False
    fused: bool = False

    def build(self, **more: Any) -> nn.Module:
        """Always the same random parameters, none of them zero."""
        sizes: dict[str, Any] = {"d_in": D_IN, "d_out": D_OUT, "context_length": CONTEXT}
        if self.kind is not ph.CausalAttention:
            sizes["num_heads"] = H
        dtype = more.pop("dtype", None)
        given = {**sizes, "dropout": 0.0, "qkv_bias": True, **self.options, **more}
        module: nn.Module = self.kind(**given)
        module = module.fuse() if self.fused else module
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        module = Padded(module) if self.lengths else module
        return module.to(dtype)

    def inputs(self, T: int, dtype: torch.dtype | None = None, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(tokens: int) -> Tensor:
            return torch.randn(B, tokens, D_IN, generator=generator).to(dtype)

        tensors = {"x": normal(T)}
        if self.memory:
            tensors["memory"] = normal(T + 3)
        if self.lengths:
            tensors["lengths"] = torch.tensor([T - 1, T])
        return tensors


def split(name: str, **options: Any) -> Variant:
    facts = {key: options.pop(key) for key in ("memory", "lengths", "fused") if key in options}
    return Variant(name, options=options, **facts)


def rope(scaling: Any = None, **more: Any) -> ph.Rope:
    return ph.Rope(theta=100.0, scaling=scaling, **more)


WINDOW = ph.mask.causal() & ph.mask.window(before=2)
EVERYTHING = {
    "num_kv_heads": 2,
    "value_head_dim": 3,
    "rope": rope(),
    "mask": WINDOW,
    "softcap": 2.0,
    "sinks": True,
    "alibi": True,
    "qk_norm": nn.RMSNorm,
    "output_gate": True,
}
VARIANTS = [
    Variant("head", ph.CausalAttention, {"d_out": 8, "rope": rope()}),
    Variant(
        "stacked", ph.MultiHeadAttentionWrapper, {"d_out": 4, "num_heads": 2, "out_proj": True}
    ),
    split("split"),
    split("grouped", num_kv_heads=2),
    split("fused", num_kv_heads=2, fused=True),
    split("memory", mask=None, memory=True),
    split("lengths", lengths=True),
    split("window", mask=WINDOW),
    split("rope", rope=rope(interleaved=True, rotary_dim=2)),
    split("llama3", rope=rope(ph.Llama3Scaling(8.0, 1.0, 4.0, original_context=8))),
    split("yarn", rope=rope(ph.YarnScaling(4.0, original_context=8))),
    split("dynamic", rope=rope(ph.DynamicNTKScaling(2.0, original_context=8))),
    split("longrope", rope=rope(ph.LongRopeScaling(4.0, 8, (1.0, 1.0), (1.0, 4.0)))),
    split("softcap", softcap=2.0),
    split("sinks", sinks=True),
    split("alibi", alibi=True),
    split("qk_norm", qk_norm=nn.RMSNorm),
    split("output_gate", output_gate=True),
    split("value_head_dim", value_head_dim=3),
    split("everything", **EVERYTHING),
]
BY_NAME = {variant.name: variant for variant in VARIANTS}


# A trace takes a second; these go every way that a trace can go.
QUICK = {"head", "fused", "lengths", "memory", "dynamic", "everything"}


@pytest.fixture(params=BY_NAME)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each variant in turn, or those named: `parametrize("variant", ["rope"], indirect=True)`."""
    return BY_NAME[request.param]


@pytest.fixture(
    params=[n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME]
)
def traced_variant(request: pytest.FixtureRequest) -> Variant:
    """Each variant, most of them slow tests: for what traces or compiles it."""
    return BY_NAME[request.param]


@pytest.fixture(scope="session")
def eager(naive_attention: Callable[..., Tensor]) -> ph.Backend:
    """The loop over heads that shares nothing with the library, as a backend."""

    def run(call: ph.AttentionCall) -> tuple[Tensor, ph.Aux]:
        allowed, bias = None, call.bias
        if call.mask is not None:
            allowed = call.mask.materialize(call.T, call.S)
        if call.alibi_slopes is not None:
            query = torch.arange(call.S - call.T, call.S)[:, None]
            distance = (query - torch.arange(call.S)).abs()
            bias = -call.alibi_slopes.to(call.dtype)[:, None, None] * distance
        options = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        tensors = call.query, call.key, call.value
        return naive_attention(*tensors, allowed=allowed, bias=bias, **options), ph.Aux()

    return ph.Backend("eager", lambda call: [], run)
