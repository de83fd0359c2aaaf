"""Code of a project that depends on polyhead; type checkers read it, and it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import polyhead as ph

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value, kind):
        return value


class Block(nn.Module):
    def __init__(self, width: int, heads: int, rope: ph.Rope | None = None) -> None:
        super().__init__()
        mask = ph.mask.causal() & ph.mask.window(before=3)
        self.attend = ph.MultiHeadAttention(width, width, 8, 0.0, heads, rope=rope, mask=mask)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, cache: ph.Cache | None = None) -> Tensor:
        return x + self.attend(self.norm(x), cache=cache)

    def entropy(self, x: Tensor, request: ph.AuxRequest) -> Tensor:
        y, aux = self.attend(x, return_aux=request)
        assert_type(y, Tensor)
        assert_type(aux, ph.Aux)
        return aux.stats.entropy + aux.weights.sum(dim=-1)


def each_module(x: Tensor, request: ph.AuxRequest) -> list[Tensor]:
    one = ph.CausalAttention(8, 8, 8, 0.0)
    stacked = ph.MultiHeadAttentionWrapper(8, 4, 8, 0.0, 2, out_proj=True)
    latent = ph.MultiHeadLatentAttention(
        8, 8, 8, 0.0, 2, kv_rank=6, nope_head_dim=4, rope_head_dim=2, value_head_dim=4, rope=None
    )
    relative = ph.positions.RelativeBias(2, bidirectional=True)
    drop_in = ph.drop_in.MultiheadAttention(8, 2, batch_first=True)
    assert_type(stacked.heads[0], ph.CausalAttention)
    assert_type(latent(x), Tensor)
    assert_type(relative(4, 4), Tensor)
    assert_type(one(x, return_aux=request), tuple[Tensor, ph.Aux])
    assert_type(stacked(x, return_aux=request), tuple[Tensor, ph.Aux])
    assert_type(latent(x, return_aux=request), tuple[Tensor, ph.Aux])
    assert_type(one(x), Tensor)
    assert_type(stacked(x), Tensor)
    y, weights = drop_in(x, x, x)
    assert_type(y, Tensor)
    return [*(head(x) for head in stacked.heads), stacked.out_proj.weight, weights[0], y]


def each_function(x: Tensor, backend: ph.BackendChoice) -> Tensor:
    assert_type(ph.attention(x, x, x, backend="reference"), Tensor)
    with ph.use_backend(["cpu", ph.backends()[-1]]):
        runs = ph.explain(x, x, x, mask=~ph.mask.causal()).chosen
    assert_type(runs, str | None)
    return ph.attention(x, x, x, softcap=30.0, backend=backend)


if __name__ == "__main__":
    block = Block(8, 2, rope=ph.Rope()).eval()
    x = torch.ones(1, 4, 8)
    with torch.no_grad():
        cache = block.attend.make_cache(batch=1)
        assert_type(cache, ph.KVCache)
        print(block(x, cache=cache).shape, block.entropy(x, ph.AuxRequest(True, stats=True)).shape)
        print(len(each_module(x, ph.AuxRequest(weights=True))))
    print(each_function(torch.ones(1, 2, 4, 8), "auto").shape)
