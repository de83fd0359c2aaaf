"""Module peers: ours, the book's variants, and `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyhead.bench.cases import Case, Inputs
from polyhead.bench.peers import book_variants as book
from polyhead.bench.peers.attention import Peer, Results, Run
from polyhead.bench.peers.flex import flex_attend, flex_reasons
from polyhead.drop_in import replace_attention
from polyhead.functional import explain
from polyhead.modules import MultiHeadAttention

__all__ = ["MODULES", "OWN_CLASS"]


class PolyheadModule(nn.Module):
    """`MultiHeadAttention`, built as a user would."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.inner = MultiHeadAttention(case.width, case.width, case.T, 0.0, case.H)

    @property
    def out_proj(self) -> nn.Linear:
        assert self.inner.out_proj is not None
        return self.inner.out_proj

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y

    def qkv(self) -> list[Tensor]:
        return [self.inner.W_query.weight, self.inner.W_key.weight, self.inner.W_value.weight]


class DropInModule(book.TorchModule):
    """torch's variant with its module replaced by ours, called in the same way."""

    def __init__(self, case: Case, need_weights: bool) -> None:
        super().__init__(case, need_weights)
        replace_attention(self)


Variant = (
    PolyheadModule
    | book.StackedHeads
    | book.SplitHeads
    | book.EinsumHeads
    | book.CombinedProjection
    | book.TorchModule
)


def _prepare(build: Callable[[Case], Variant], case: Case, inputs: Inputs) -> Run:
    module = build(case).to(case.dtype).train(case.train)
    x, qkv = inputs["x"], module.qkv()
    with torch.no_grad():
        rows = inputs["qkv_weight"].split([weight.shape[0] for weight in qkv])
        for weight, given in zip(qkv, rows, strict=True):
            weight.copy_(given)
        module.out_proj.weight.copy_(inputs["out_weight"])
        module.out_proj.bias.copy_(inputs["out_bias"])
    if not case.train:
        return lambda: {"output": module(x)}
    leaf = x.detach().requires_grad_()
    leaves = [leaf, module.out_proj.weight, module.out_proj.bias, *qkv]

    def forward_and_backward() -> Results:
        output = module(leaf)
        dx, dweight, dbias, *dqkv = torch.autograd.grad(output, leaves, inputs["grad"])
        results = {"output": output.detach(), "dx": dx}
        results |= {"dout_weight": dweight, "dout_bias": dbias}
        return results | {f"dqkv_{i}": rows for i, rows in enumerate(dqkv)}

    return forward_and_backward


def _compared(case: Case, results: Results) -> Results:
    """Concatenate the gradients of query, key and value weights, for any layout."""
    rows = [tensor for name, tensor in results.items() if name.startswith("dqkv_")]
    common = {n: tensor for n, tensor in results.items() if not n.startswith("dqkv_")}
    return common | ({"dqkv_weight": torch.cat(rows)} if rows else {})


def _backend(case: Case) -> str:
    module = PolyheadModule(case).to(case.dtype).inner
    x = torch.empty(case.B, case.T, case.width, dtype=case.dtype)
    with torch.set_grad_enabled(case.train):
        return str(explain(*module.project_qkv(x), mask=module.mask).chosen)


def _peer(
    name: str,
    build: Callable[[Case], Variant],
    why_not: Callable[[Case], list[str]] = lambda case: [],
    *,
    backend: Callable[[Case], str] = lambda case: "",
    ours: bool = False,
    compiles: bool = False,
) -> Peer:
    return Peer(
        name,
        why_not,
        lambda case, inputs: _prepare(build, case, inputs),
        compared=_compared,
        backend=backend,
        ours=ours,
        compiles=compiles,
    )


def _combined(attend: Callable[[Case], book.Attend]) -> Callable[[Case], Variant]:
    return lambda case: book.CombinedProjection(case, attend(case))


OWN_CLASS = _peer("book: split heads", book.SplitHeads)

MODULES: tuple[Peer, ...] = (
    _peer("polyhead", PolyheadModule, backend=_backend, ours=True),
    _peer("book: stacked heads", book.StackedHeads),
    OWN_CLASS,
    _peer("book: combined qkv", _combined(book.written_out)),
    _peer("book: einsum", book.EinsumHeads),
    _peer("book: sdpa", _combined(book.sdpa)),
    _peer("book: sdpa with mask", _combined(book.sdpa_written_mask)),
    _peer("torch MHA, weights", lambda c: book.TorchModule(c, need_weights=True)),
    _peer("torch MHA", lambda c: book.TorchModule(c, need_weights=False)),
    _peer("drop-in, weights", lambda c: DropInModule(c, need_weights=True), ours=True),
    _peer("drop-in", lambda c: DropInModule(c, need_weights=False), ours=True),
    _peer("book: flex", _combined(flex_attend), flex_reasons, compiles=True),
)
