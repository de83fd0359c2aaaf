"""Projections through oneDNN: where they gain, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polyhead as ph
from polyhead.modules import linear

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN"
)

WIDTH = 512
ONEDNN = "_linear_pointwise"


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    """As on a processor whose MKL is slow."""
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)


@pytest.fixture
def module():
    torch.manual_seed(7)
    return ph.MultiHeadAttention(WIDTH, WIDTH, 600, 0.0, num_heads=8, qkv_bias=True).eval()


def x(dtype=torch.float32, tokens=523):
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_every_projection_of_inference_gains(module, tensor_sizes, assert_as_good_as_eager):
    with torch.no_grad(), tensor_sizes:
        y = module(x())
    assert tensor_sizes.operations.count(ONEDNN) == 4
    exact = module.double()(x(torch.float64))
    module.float()
    assert_as_good_as_eager(y, module(x()), exact)


def test_so_do_the_drop_in_s(tensor_sizes):
    module = ph.drop_in.MultiheadAttention(WIDTH, 8, batch_first=True).eval()
    with torch.no_grad(), tensor_sizes:
        y, _ = module(x(), x(), x(), need_weights=False)
    assert tensor_sizes.operations.count(ONEDNN) == 4
    torch.testing.assert_close(y, module(x(), x(), x())[0])


def test_a_layer_keeps_its_hooks_and_what_wraps_it(module, tensor_sizes):
    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    called = []
    module.W_query.register_forward_hook(lambda *_: called.append("hook"))
    module.W_key = Scaled(module.W_key)
    with torch.no_grad(), tensor_sizes:
        y = module(x())
    assert called == ["hook"]
    assert tensor_sizes.operations.count(ONEDNN) == 4
    torch.testing.assert_close(y, module(x()))


@pytest.mark.parametrize(
    "case", ["gradients", "few tokens", "bfloat16", "autocast", "vmap", "small weight"]
)
def test_nothing_else_changes(case, module, tensor_sizes):
    given = x(tokens=5) if case == "few tokens" else x()
    if case == "bfloat16":
        module, given = module.bfloat16(), x(torch.bfloat16)
    if case == "small weight":
        module.W_query = module.W_key = module.W_value = nn.Linear(WIDTH, 8)
        module.out_proj, module.num_heads, module.num_kv_heads = None, 2, 2
        module.head_dim = module.value_head_dim = 4
    run = module
    if case == "vmap":
        run, given = torch.vmap(module), given[None]
    with (
        torch.set_grad_enabled(case == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
        tensor_sizes,
    ):
        run(given)
    assert ONEDNN not in tensor_sizes.operations


def test_outside_of_it_linear_is_torchs(module, tensor_sizes):
    with torch.no_grad(), linear.onednn_linear(x(), nn.Module()):
        pass
    with torch.no_grad(), tensor_sizes:
        F.linear(x(), module.W_query.weight)
    assert ONEDNN not in tensor_sizes.operations
