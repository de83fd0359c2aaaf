"""Weights sharded by torch.distributed: the module runs, and no shard is taken for a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ArgumentError, ConversionError, DtypeError

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


def module():
    torch.manual_seed(5)
    return ph.MultiHeadAttention(24, 24, 17, 0.0, 3, mask=None).eval()


def x():
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mesh(tmp_path):
    """One rank, on which torch.distributed shards as on many."""
    from torch import distributed

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def fully_sharded(mha, mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(mha, mesh=mesh)


def sharded_by_projection(mha, mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    for name in ("W_query", "W_key", "W_value", "out_proj"):
        fully_shard(getattr(mha, name), mesh=mesh, mp_policy=policy)
    return mha


def tensor_parallel(mha, mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {name: ColwiseParallel() for name in ("W_query", "W_key", "W_value")}
    return parallelize_module(mha, mesh, plan | {"out_proj": RowwiseParallel()})


@pytest.mark.parametrize("shard", [fully_sharded, sharded_by_projection, tensor_parallel])
def test_sharded_module_runs_and_its_weights_are_refused(shard, mesh):
    mha, sharded = module(), shard(module(), mesh)
    for refused, error in (
        (sharded.fuse, ArgumentError),
        (lambda: sharded.prune_heads([0]), ArgumentError),
        (lambda: ph.convert.split_to_stacked(sharded), ConversionError),
        (lambda: ph.convert.to_torch(sharded), ConversionError),
    ):
        with pytest.raises(error, match=r"sharded .*DTensor\.full_tensor\(\)"):
            refused()
    with torch.no_grad():
        tolerance = 1e-2 if shard is sharded_by_projection else 1e-6
        torch.testing.assert_close(sharded(x()), mha(x()), rtol=0, atol=tolerance)


def test_sharded_weights_without_hooks_take_no_plain_input(mesh):
    from torch.distributed.tensor import distribute_tensor

    mha = module()
    mha.W_query.weight = nn.Parameter(distribute_tensor(mha.W_query.weight.detach(), mesh))
    with pytest.raises(DtypeError, match=r"x must be a DTensor .*; got Tensor; .*fully_shard"):
        mha(x())
