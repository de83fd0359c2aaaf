"""Tensors that do not hold their numbers: refused by name, wherever a tensor is given."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.masked import masked_tensor
from torch.nn.attention.bias import causal_lower_right

import polyhead as ph
from polyhead.errors import DtypeError

QUERY = torch.randn(1, 4, 5, 8)
PER_HEAD = torch.zeros(4)
ALLOWED = torch.ones(5, 5, dtype=torch.bool)
X = torch.randn(1, 5, 24)
REMEDY = r"pass \.to_local\(\) on every rank, of whole heads, rows and tokens"

CALLS = {
    "query": lambda make: ph.attention(make(QUERY), QUERY, QUERY),
    "key": lambda make: ph.attention(QUERY, make(QUERY), QUERY),
    "value": lambda make: ph.explain(QUERY, QUERY, make(QUERY)),
    "bias": lambda make: ph.attention(QUERY, QUERY, QUERY, bias=make(torch.zeros(5, 5))),
    "sinks": lambda make: ph.attention(QUERY, QUERY, QUERY, sinks=make(PER_HEAD)),
    "alibi_slopes": lambda make: ph.attention(QUERY, QUERY, QUERY, alibi_slopes=make(PER_HEAD)),
    "allowed": lambda make: ph.mask.dense(make(ALLOWED)),
    "lengths": lambda make: ph.mask.lengths(make(torch.tensor([3]))),
    "x": lambda make: ph.MultiHeadAttention(24, 24, 9, 0.0, 6)(make(X)),
    "memory": lambda make: ph.MultiHeadAttention(24, 24, 9, 0.0, 6, mask=None)(X, make(X)),
}


@pytest.fixture(scope="module")
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("argument", CALLS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dtensor_is_refused_by_name(argument, grad, mesh):
    def make(tensor):
        return distribute_tensor(tensor, mesh, [Replicate()])

    rule = rf"^{argument} must be a plain tensor; got DTensor; {REMEDY}$"
    with torch.set_grad_enabled(grad), pytest.raises(DtypeError, match=rule):
        CALLS[argument](make)


def test_dtensor_remedy_gives_what_the_whole_gives(mesh):
    heads = [distribute_tensor(QUERY, mesh, [Shard(1)]).to_local() for _ in range(3)]
    torch.testing.assert_close(ph.attention(*heads), ph.attention(QUERY, QUERY, QUERY))


def test_dtensor_is_refused_by_caches_and_rope(mesh):
    given = distribute_tensor(QUERY, mesh, [Replicate()])
    cache = ph.KVCache(1, 9, 4, 8)
    with pytest.raises(DtypeError, match=r"key must be a plain tensor; got DTensor"):
        cache.append(given, given)
    assert cache.length == 0
    with pytest.raises(DtypeError, match=r"x must be a plain tensor; got DTensor"):
        ph.Rope(theta=10_000.0)(given, torch.arange(5))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_other_wrappers_are_refused_by_name():
    given = masked_tensor(QUERY, QUERY > 0)
    with pytest.raises(
        DtypeError, match=r"query must be a plain tensor; got MaskedTensor; convert it"
    ):
        ph.attention(given, given, given)


def test_torchs_causal_bias_is_refused_with_the_mask_it_means():
    """It holds no numbers: added to the scores it would be no mask at all."""
    with pytest.raises(
        DtypeError, match=r"bias must .*got CausalBias; pass mask=polyhead\.mask\.c"
    ):
        ph.attention(QUERY, QUERY, QUERY, bias=causal_lower_right(5, 5))


def test_subclasses_that_change_no_operator_are_taken():
    class Named(torch.Tensor):
        pass

    given = QUERY.as_subclass(Named)
    assert torch.equal(ph.attention(given, given, given), ph.attention(QUERY, QUERY, QUERY))
    ph.attention(*(torch.nn.Parameter(QUERY) for _ in range(3)))
