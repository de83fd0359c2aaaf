"""A module among modules: copied, pickled, moved, parametrised, wrapped, checkpointed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint


def saved(module):
    """Through torch.save, which pickles the whole module."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved]
)
def test_a_copy_is_the_same_and_apart(variant, copied):
    module, inputs = variant.build(), variant.inputs(5)
    other = copied(module)
    want = module(**inputs)
    assert torch.equal(other(**inputs), want)
    assert repr(other) == repr(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(module(**inputs), want)


def test_built_without_memory_then_filled_and_loaded_strictly(variant):
    module, inputs = variant.build(), variant.inputs(5)
    state = module.state_dict()
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    assert str(empty.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(empty(**inputs), module(**inputs))
    assigned = copy.deepcopy(module).to("meta")
    assigned.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(assigned(**inputs), module(**inputs))
    # All that it is, is in its parameters: there is no buffer to forget.
    assert state.keys() == dict(module.named_parameters()).keys()
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        empty.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_moves_every_parameter(variant, dtype):
    module = variant.build().to(dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert module(**variant.inputs(5, dtype)).dtype == dtype


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize(
    "parametrised",
    [
        lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
    ],
    ids=["own", "weight_norm", "orthogonal", "spectral_norm"],
)
@pytest.mark.parametrize("variant", ["head", "grouped"], indirect=True)
def test_a_parametrised_weight_is_used_and_trained(variant, parametrised):
    module, inputs = variant.build(), variant.inputs(5)
    parametrised(module.W_query)
    module.eval()  # spectral_norm steps in training
    y = module(**inputs)
    plain = variant.build()
    plain.W_query.weight.data.copy_(module.W_query.weight.detach())
    torch.testing.assert_close(y, plain(**inputs))
    y.square().sum().backward()
    original = [p for n, p in module.W_query.named_parameters() if "parametrizations" in n]
    assert original
    assert all(p.grad is not None for p in original)


class LowRank(nn.Module):
    """An adapter around a layer: it has no weight of its own name."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(base.in_features, rank))
        self.up = nn.Parameter(torch.randn(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + x @ self.down @ self.up

    def merged(self):
        return self.base.weight + (self.down @ self.up).mT


ADAPTED = ["W_query", "W_key", "W_value", "out_proj"]
PLACES = [(variant, name) for variant in ("grouped", "memory") for name in ADAPTED]
PLACES += [("head", name) for name in ADAPTED[:3]]


@pytest.mark.parametrize(("variant", "name"), PLACES, indirect=["variant"])
def test_an_adapter_around_a_projection(variant, name):
    module, inputs = variant.build(), variant.inputs(5)
    adapter = LowRank(getattr(module, name))
    setattr(module, name, adapter)
    y = module(**inputs)
    merged = variant.build()
    getattr(merged, name).weight.data.copy_(adapter.merged().detach())
    torch.testing.assert_close(y, merged(**inputs), rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert adapter.up.grad.abs().sum() > 0
    assert adapter.base.weight.grad is None


@pytest.mark.parametrize("variant", ["grouped"], indirect=True)
def test_adapters_everywhere_decode_with_a_cache(variant):
    module, x = variant.build(), variant.inputs(5)["x"]
    for name in ADAPTED:
        setattr(module, name, LowRank(getattr(module, name)))
    module.bfloat16()
    with torch.no_grad():
        cache = module.make_cache(2)
        module(x.bfloat16(), cache=cache)
    assert cache.dtype == torch.bfloat16
    assert cache.length == 5


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing_gives_the_same_gradients(variant, use_reentrant, dropout):
    module, inputs = variant.build(dropout=dropout), variant.inputs(7)
    inputs["x"].requires_grad_()  # the reentrant kind looks for it

    def gradients(run):
        torch.manual_seed(3)
        y = run()
        leaves = [inputs["x"], *module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    want = gradients(lambda: module(**inputs))
    got = gradients(lambda: checkpoint(module, *inputs.values(), use_reentrant=use_reentrant))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["head", "stacked", "grouped", "sinks"], indirect=True)
def test_dropout_repeats_with_the_seed_and_leaves_other_streams_alone(variant):
    module, inputs = variant.build(dropout=0.5), variant.inputs(7)
    torch.manual_seed(5)
    first, second = module(**inputs), module(**inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        forked = module(**inputs)
    assert torch.equal(forked, first)
    # The fork gave the stream back where it was.
    assert torch.equal(module(**inputs), first)
    assert torch.equal(module(**inputs), second)
    state = torch.get_rng_state()
    module.eval()(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
