"""Weights that are elsewhere, or not all that a layer computes: read right, or refused by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import polyhead as ph
from polyhead.errors import ArgumentError, ConversionError, DeviceError, DtypeError, ShapeError
from polyhead.modules import weights

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")


def module(**options):
    torch.manual_seed(5)
    options = {"num_kv_heads": 1, "mask": None} | options
    return ph.MultiHeadAttention(24, 24, 17, 0.0, 3, **options).eval()


def stacked():
    torch.manual_seed(5)
    return ph.MultiHeadAttentionWrapper(24, 8, 17, 0.0, 3, out_proj=True).eval()


def latent():
    torch.manual_seed(5)
    sizes = {"kv_rank": 6, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 5}
    return ph.MultiHeadLatentAttention(24, 24, 17, 0.0, 3, rope=ph.Rope(), **sizes).eval()


def offloaded_to_cpu(model, tmp_path):
    return accelerate.cpu_offload(model, execution_device="cpu")


def offloaded_to_disk(model, tmp_path):
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    return model


@pytest.fixture(params=[offloaded_to_cpu, offloaded_to_disk])
def offload(request, tmp_path_factory):
    """Moves a model's weights away, as accelerate does: they are on meta between calls."""

    def offload(model):
        model = request.param(copy.deepcopy(model), tmp_path_factory.mktemp("weights"))
        assert all(parameter.is_meta for parameter in model.parameters())
        return model

    return offload


def x(dtype=torch.float32):
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("build", [module, stacked, latent])
def test_offloaded_module_computes_the_same(build, offload):
    mha = build()
    with torch.no_grad():
        assert torch.equal(offload(mha)(x()), mha(x()))


@pytest.mark.parametrize("build", [module, latent])
def test_offloaded_module_decodes_the_same(build, offload):
    mha = build(mask=ph.mask.causal()) if build is module else build()
    away = offload(mha)
    with torch.no_grad():
        cache = away.make_cache(batch=2)
        steps = [away(token, cache=cache) for token in x().split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), mha(x()), rtol=0, atol=1e-6)


def test_offloaded_contributions_are_read(offload):
    mha = module()
    with torch.no_grad():
        assert torch.equal(offload(mha).head_contributions(x()), mha.head_contributions(x()))


def test_offloaded_split_is_converted(offload):
    mha, wrapper = module(), stacked()
    with torch.no_grad():
        away = ph.convert.split_to_stacked(offload(mha))
        torch.testing.assert_close(away(x()), mha(x()), rtol=0, atol=1e-6)
        split = ph.convert.stacked_to_split(offload(wrapper))
        torch.testing.assert_close(split(x()), wrapper(x()), rtol=0, atol=1e-6)
    assert all(parameter.requires_grad for parameter in split.parameters())


@pytest.mark.parametrize("extra", [{}, {"bias": False}, {"add_zero_attn": True}])
def test_offloaded_torch_module_is_converted(offload, extra):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, **extra).eval()
    with torch.no_grad():
        ours = ph.convert.from_torch(offload(theirs))
        torch.testing.assert_close(ours(x()), theirs(x(), x(), x())[0], rtol=0, atol=1e-6)


def test_offloaded_module_is_changed_by_nothing(offload):
    """In place there is nothing to fuse or prune: accelerate puts the weights back at each call."""
    away = offload(module(num_kv_heads=3))
    before = dict(away.named_modules())
    for change in (away.fuse, lambda: away.prune_heads([1])):
        with pytest.raises(ArgumentError, match=r"accelerate's hooks.*remove_hook_from_module"):
            change()
    assert dict(away.named_modules()) == before


def test_after_the_remedy_an_offloaded_module_fuses():
    mha = module()
    away = hooks.remove_hook_from_module(offloaded_to_cpu(copy.deepcopy(mha), None), recurse=True)
    with torch.no_grad():
        assert torch.equal(away.fuse()(x()), mha.fuse()(x()))


def test_cache_of_an_offloaded_module_is_where_it_computes(offload):
    cache = offload(module()).make_cache(batch=2)
    assert (cache.device, cache.dtype) == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["W_query", "W_key", "W_value", "out_proj", "W_gate"])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_without_values_meets_no_input(name, bias):
    """torch 2.13 gives uninitialized memory for F.linear(cpu, meta) without a bias."""
    mha = module(output_gate=True, qkv_bias=bias, out_bias=bias)
    getattr(mha, name).to("meta")
    cache = module().make_cache(batch=2)
    with torch.no_grad():
        for given in ({}, {"cache": cache}):
            with pytest.raises(DeviceError, match=r"meta"):
                mha(x(), **given)
    assert cache.length == 0


@pytest.mark.parametrize("build", [stacked, latent])
def test_no_part_without_values_meets_an_input(build):
    for name, part in build().named_modules():
        if isinstance(part, nn.Linear):
            mha = build()
            mha.get_submodule(name).to("meta")
            with torch.no_grad(), pytest.raises(DeviceError, match=r"meta"):
                mha(x())


def test_drop_in_without_values_meets_no_input():
    for options in ({"bias": False}, {"kdim": 24, "vdim": 24}):
        theirs = ph.drop_in.MultiheadAttention(24, 3, batch_first=True, device="meta", **options)
        with pytest.raises(DeviceError, match=r"query must be on .* meta, .*got cpu; load"):
            theirs(x(), x(), x())
    theirs = ph.drop_in.MultiheadAttention(24, 3, bias=False, batch_first=True)
    theirs.out_proj.to("meta")
    with pytest.raises(
        DeviceError, match=r"the weight must hold values on .* cpu; got a weight on meta"
    ):
        theirs(x(), x(), x())


def test_hook_that_loads_is_let_and_one_that_does_not_raises():
    mha = module()
    expected = mha(x())
    values = mha.W_key.weight
    mha.W_key.to("meta")

    def load(layer, args):
        layer.weight = values

    handle = mha.W_key.register_forward_pre_hook(lambda layer, args: None)
    with pytest.raises(DeviceError, match=r"the weight must hold values .*got a weight on meta"):
        mha(x())
    handle.remove()
    mha.W_key.register_forward_pre_hook(load)
    assert torch.equal(mha(x()), expected)


def adapted(layer):
    peft = pytest.importorskip("peft")
    holder = nn.ModuleDict({"q": layer})
    config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, holder)["q"]


def cast_by_hook(layer):
    hook = hooks.LayerwiseCastingHook(torch.bfloat16, torch.float32, non_blocking=False)
    return hooks.add_hook_to_module(layer, hook)


def with_own_forward(layer):
    layer.forward = functools.partial(F.linear, weight=layer.weight * 2)
    return layer


def with_hook(layer):
    layer.register_forward_hook(lambda layer, args, output: output * 2)
    return layer


def quantized(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def of_int8(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return layer


class Packed(torch.Tensor):
    """A tensor whose values are computed from others, as quantizers make."""


def packed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    return layer


def subclassed(layer):
    kind = type("Linear", (nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight * 2)})
    layer.__class__ = kind
    return layer


def pruned_by_mask(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


NOT_PLAIN = {
    "adapter": (adapted, "lora.*an adapter.*merge_and_unload"),
    "casting hook": (cast_by_hook, "LayerwiseCastingHook|accelerate's hooks"),
    "own forward": (with_own_forward, "a forward of its own"),
    "hook": (with_hook, "a forward hook, with_hook.*which may change it; remove"),
    "float8": (quantized, "of torch.float8_e4m3fn, whose scales are kept elsewhere; dequantize"),
    "int8": (of_int8, "of torch.int8, whose scales"),
    "tensor subclass": (packed, "a (Packed|Parameter)"),
    "subclass": (subclassed, r"got tests\.modules\.test_weights\.Linear"),
    "mask": (pruned_by_mask, r"with hooks that make its weight; call torch\.nn\.utils\.prune\.rem"),
    "parametrization": (parametrizations.weight_norm, "with a parametrization of its weight; call"),
    "meta": (lambda layer: layer.to("meta"), "on the meta device, without values; load"),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("name", ["W_query", "out_proj"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layer_that_is_more_than_its_weight_is_refused(kind, name):
    change, reason = NOT_PLAIN[kind]
    mha = module(num_kv_heads=3, qkv_bias=True)
    setattr(mha, name, change(getattr(mha, name)))
    parts = dict(mha.named_modules())
    with pytest.raises(ConversionError, match=rf"{name} must be a plain .*{reason}"):
        ph.convert.split_to_stacked(mha)
    with pytest.raises(ConversionError, match=rf"{name} must be a plain .*{reason}"):
        ph.convert.to_torch(mha)
    with pytest.raises(ArgumentError, match=reason):
        mha.prune_heads([0])
    if name == "W_query":
        with pytest.raises(ArgumentError, match=reason):
            mha.fuse()
    elif kind in ("own forward", "hook"):
        with pytest.raises(ArgumentError, match=rf"out_proj must be a plain linear.*{reason}"):
            mha.head_contributions(x())
    assert dict(mha.named_modules()) == parts


def test_after_the_remedies_layers_are_plain():
    layer = prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)
    assert weights.why_not_linear(prune.remove(layer, "weight")) is None
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    assert weights.why_not_linear(layer) is not None
    parametrize.remove_parametrizations(layer, "weight")
    assert weights.why_not_linear(layer) is None
    layer = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
    assert weights.why_not_linear(layer).remedy.startswith("call torch.nn.utils.remove_spectral")
    assert weights.why_not_linear(torch.nn.utils.remove_spectral_norm(layer)) is None
    layer = hooks.add_hook_to_module(nn.Linear(3, 3), hooks.AlignDevicesHook("cpu"))
    assert weights.why_not_in_place(layer) is not None
    assert weights.why_not_in_place(hooks.remove_hook_from_module(layer)) is None


@pytest.mark.parametrize("kind", ["casting hook", "hook", "float8"])
def test_input_of_a_layer_that_may_cast_is_not_judged(kind):
    """Hooks and quantized layers take another dtype than they keep."""
    mha = module()
    mha.W_query = NOT_PLAIN[kind][0](mha.W_query.bfloat16())
    if kind == "float8":
        mha.W_query.forward = lambda x: F.linear(x, mha.W_query.weight.to(x.dtype))
    if kind == "hook":
        mha.W_query.register_forward_pre_hook(lambda layer, args: (args[0].bfloat16(),))
        mha.W_query.register_forward_hook(lambda layer, args, y: y.float())
    with torch.no_grad():
        assert mha(x()).shape == (2, 7, 24)


def test_input_of_a_plain_layer_is_judged():
    with pytest.raises(DtypeError, match=r"x must have the module's dtype, torch.bfloat16; got"):
        module(dtype=torch.bfloat16)(x())


@pytest.mark.parametrize("change", [lambda m: m.fuse().unfuse(), lambda m: m.prune_heads([1])])
def test_weights_made_in_inference_mode_train(change):
    mha = module(num_kv_heads=3)
    with torch.inference_mode():
        change(mha)
    mha(x()).sum().backward()
    assert all(parameter.grad is not None for parameter in mha.parameters())


@pytest.mark.parametrize("is_inference_too", [False, True])
def test_conversions_in_inference_mode_train(is_inference_too):
    theirs = nn.MultiheadAttention(24, 3)
    conversions = [
        lambda: ph.convert.split_to_stacked(module()),
        lambda: ph.convert.stacked_to_split(stacked()),
        lambda: ph.convert.from_torch(theirs),
        lambda: ph.convert.to_torch(module(num_kv_heads=3, qkv_bias=True)),
    ]
    if not is_inference_too:
        mha, wrapper = module(num_kv_heads=3, qkv_bias=True), stacked()
        conversions = [
            lambda: ph.convert.split_to_stacked(mha),
            lambda: ph.convert.stacked_to_split(wrapper),
            lambda: ph.convert.to_torch(mha),
        ]
    for convert in conversions:
        with torch.inference_mode():
            made = convert()
        assert not any(parameter.is_inference() for parameter in made.parameters())
        assert all(parameter.requires_grad for parameter in made.parameters())


def test_cache_of_quantized_weights_needs_a_dtype():
    mha = module()
    for part in (mha.W_query, mha.W_key, mha.W_value):
        quantized(part)
    assert mha.make_cache(batch=1).dtype == torch.float32  # that of out_proj
    quantized(mha.out_proj)
    mha.out_proj.bias = None
    with pytest.raises(
        ArgumentError, match=r"dtype must be given .*weights of torch.float8_e4m3fn"
    ):
        mha.make_cache(batch=1)
    assert mha.make_cache(batch=1, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [module, latent])
def test_projection_of_some_heads_is_refused(build):
    mha = build()
    mha.W_query = nn.Linear(mha.W_query.in_features, 12, bias=False)
    with pytest.raises(ShapeError, match=r"W_query must give \d+ features, 3 heads of \d; got 12"):
        mha(x())
