"""`replace_attention`: a model's modules made ours, in place; and torch's layers around them."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import polyhead as ph

B, T, WIDTH = 3, 6, 24


class Model(nn.Module):
    """Two names for one module, a subclass, one that drops everything, and one of ours."""

    class Own(nn.MultiheadAttention):
        pass

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, 4, dropout=0.1)
        self.again = self.first
        self.second = nn.MultiheadAttention(WIDTH, 3, bias=False).eval()
        self.own = self.Own(WIDTH, 4)
        self.dropping = nn.MultiheadAttention(WIDTH, 4, dropout=1.0)
        self.ours = ph.drop_in.MultiheadAttention(WIDTH, 4)


def test_each_is_ours_and_itself():
    model = Model()
    before = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    report = ph.drop_in.replace_attention(model)
    assert report.replaced == ("first", "second")
    assert dict(model.named_modules(remove_duplicate=False)) == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.first is model.again
    assert type(model.first) is type(model.second) is ph.drop_in.MultiheadAttention
    assert (model.first.training, model.second.training) == (True, False)
    assert type(model.own) is Model.Own
    assert report.left == {
        "own": "its class, Own, may compute something else",
        "dropping": "its dropout is 1.0, and ours must be in [0, 1)",
    }
    assert ph.drop_in.replace_attention(model).replaced == ()


def test_the_report_prints():
    model = Model()
    model.second.register_forward_hook(lambda module, given, result: None)
    assert str(ph.drop_in.replace_attention(model)) == (
        "replaced 2 of 4 nn.MultiheadAttention\n"
        "  first\n"
        "  second: keeps its 1 forward hook\n"
        "  left own: its class, Own, may compute something else\n"
        "  left dropping: its dropout is 1.0, and ours must be in [0, 1)"
    )


def test_a_model_that_is_one_itself():
    module = nn.MultiheadAttention(WIDTH, 4)
    x = torch.randn(5, 2, WIDTH)
    want = module(x, x, x)
    assert str(ph.drop_in.replace_attention(module)).endswith("  (the model itself)")
    torch.testing.assert_close(module(x, x, x), want)
    assert module(x, x, x, is_causal=True)[1][:, 0, 1:].count_nonzero() == 0


def test_hooks_go_on_being_called():
    module, seen = nn.MultiheadAttention(WIDTH, 4), []
    module.register_forward_hook(lambda module, given, result: seen.append(result))
    ph.drop_in.replace_attention(module)
    x = torch.randn(5, 2, WIDTH)
    y, _ = module(x, x, x)
    assert [result[0] for result in seen] == [y]


def test_an_optimizer_goes_on_training_it():
    model = nn.TransformerEncoderLayer(WIDTH, 4, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ph.drop_in.replace_attention(model)
    before = model.self_attn.in_proj_weight.clone()
    model(torch.randn(5, 2, WIDTH)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.self_attn.in_proj_weight, before)


def test_lora_of_peft_trains_it():
    """In evaluation torch's fast path passes the adapters of its own by; not those of ours."""
    peft = pytest.importorskip("peft")
    trained, gradients = [], []
    x = torch.randn(2, 5, WIDTH)
    for replace in (lambda model: None, ph.drop_in.replace_attention):
        torch.manual_seed(7)
        model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 4, 32, 0.0, batch_first=True))
        replace(model)
        torch.manual_seed(11)
        config = peft.LoraConfig(r=3, target_modules=["self_attn"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        trained.append(adapted(x))
        trained[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*trained)
    assert any("lora_A" in name for name in gradients[0])
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want)
    torch.testing.assert_close(adapted.eval()(x), trained[1])
    merged = adapted.merge_and_unload()
    assert type(merged[0].self_attn) is ph.drop_in.MultiheadAttention
    torch.testing.assert_close(merged(x), trained[1])


def encoder_layer(**options):
    torch.manual_seed(7)
    return nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True, **options)


def padding():
    return torch.arange(T) >= torch.tensor([[4], [6], [1]])


@pytest.mark.parametrize(
    "copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_the_fast_path_does_not_pass_it_by(copied, monkeypatch):
    """Assigned by hand, and through a copy."""
    layer = encoder_layer().eval()
    x = torch.randn(B, T, WIDTH)
    calls = []
    forward = ph.drop_in.MultiheadAttention.forward
    monkeypatch.setattr(
        ph.drop_in.MultiheadAttention,
        "forward",
        lambda self, *given, **options: calls.append(self) or forward(self, *given, **options),
    )
    with torch.inference_mode():
        want = layer(x)
        assert not calls
        attend = ph.drop_in.MultiheadAttention(WIDTH, 4, batch_first=True)
        attend.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attend
        layer = copied(layer).eval()
        got = layer(x)
    assert calls == [layer.self_attn]
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_an_encoder_is_the_same(mode, norm_first):
    """Of padding the inputs to the next layer differ, and nobody reads them."""
    options = {"enable_nested_tensor": False} if norm_first else {}
    theirs = nn.TransformerEncoder(encoder_layer(norm_first=norm_first), 2, **options)
    ours = copy.deepcopy(theirs)
    assert len(ph.drop_in.replace_attention(ours).replaced) == 2
    x = torch.randn(B, T, WIDTH)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for given in ({}, {"src_key_padding_mask": padding()}, {"mask": future}):
        for model in (theirs, ours):
            model.train(mode == "train")
        with torch.inference_mode(mode == "inference"):
            want, got = theirs(x, **given), ours(x, **given)
        real = ~padding() if "src_key_padding_mask" in given else ...
        torch.testing.assert_close(got[real], want[real])


def test_a_decoder_is_the_same():
    torch.manual_seed(7)
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 32, dropout=0.0)
    theirs = nn.TransformerDecoder(layer, 2)
    ours = copy.deepcopy(theirs)
    assert len(ph.drop_in.replace_attention(ours).replaced) == 4
    x, memory = torch.randn(T, B, WIDTH), torch.randn(9, B, WIDTH)
    future = nn.Transformer.generate_square_subsequent_mask(T)
    given = {
        "tgt_mask": future,
        "memory_key_padding_mask": torch.arange(9) >= torch.tensor([[8]] * B),
    }
    torch.testing.assert_close(ours(x, memory, **given), theirs(x, memory, **given))


def test_a_row_of_padding_alone_is_no_nan():
    layer = encoder_layer().eval()
    nothing = padding()
    nothing[1] = True
    x = torch.randn(B, T, WIDTH)
    ph.drop_in.replace_attention(layer)
    with torch.inference_mode():
        assert not layer(x, src_key_padding_mask=nothing).isnan().any()


def runs_ours(module):
    """torch ignores `is_causal` in evaluation without gradients; ours does not."""
    x = torch.randn(5, 2, WIDTH)
    with torch.no_grad():
        weights = module.eval()(x, x, x, is_causal=True)[1]
    return weights[:, 0, 1:].count_nonzero() == 0


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy])
def test_replace_attention_after_offload_runs_ours(copied):
    torch.manual_seed(7)
    plain = nn.MultiheadAttention(WIDTH, 4)
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Identity(), copy.deepcopy(plain))
    accelerate.cpu_offload(model)
    assert str(ph.drop_in.replace_attention(model)) == (
        "replaced 1 of 1 nn.MultiheadAttention\n  1: keeps accelerate's hook"
    )
    model = copied(model)
    x = torch.randn(5, 2, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model[1](x, x, x), plain(x, x, x))
        nothing = torch.ones(2, 5, dtype=torch.bool)
        assert not model[1](x, x, x, key_padding_mask=nothing)[0].isnan().any()
    assert runs_ours(model[1])
    assert model[1].in_proj_weight.is_meta
    accelerate.hooks.remove_hook_from_submodules(model)
    assert runs_ours(model[1])


def test_replace_attention_with_two_hooks_runs_ours():
    hooks = pytest.importorskip("accelerate").hooks
    module = nn.MultiheadAttention(WIDTH, 4)
    for _ in "ab":
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
    assert ph.drop_in.replace_attention(module).replaced == ("",)
    assert runs_ours(module)


def test_replace_attention_after_hooks_were_removed_runs_ours():
    """They leave torch's own forward on the instance."""
    hooks = pytest.importorskip("accelerate").hooks
    module = nn.MultiheadAttention(WIDTH, 4)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    hooks.remove_hook_from_module(module)
    assert "forward" in vars(module)
    assert ph.drop_in.replace_attention(module).replaced == ("",)
    assert runs_ours(module)


def wrapped(module):
    forward = module.forward
    module.forward = lambda *given, **options: forward(*given, **options)


def partial(module):
    module.forward = functools.partial(nn.MultiheadAttention.forward, module)


def wrapped_over_a_hook(module):
    hooks = pytest.importorskip("accelerate").hooks
    hooks.add_hook_to_module(module, hooks.ModelHook())
    wrapped(module)


def a_hook_over_wrapped(module):
    hooks = pytest.importorskip("accelerate").hooks
    wrapped(module)
    hooks.add_hook_to_module(module, hooks.ModelHook())


@pytest.mark.parametrize("override", [wrapped, partial, wrapped_over_a_hook, a_hook_over_wrapped])
def test_replace_attention_leaves_a_foreign_forward(override):
    module = nn.MultiheadAttention(WIDTH, 4)
    override(module)
    before = dict(vars(module))
    report = ph.drop_in.replace_attention(module)
    assert report.replaced == ()
    assert report.left[""].startswith("its forward was replaced on the instance by ")
    assert type(module) is nn.MultiheadAttention
    assert vars(module) == before


def test_replace_attention_leaves_what_it_cannot_judge(monkeypatch):
    parametrized = nn.MultiheadAttention(WIDTH, 4)
    nn.utils.parametrizations.weight_norm(parametrized, "in_proj_weight")
    assert ph.drop_in.replace_attention(parametrized).left == {
        "": "parametrizations made its class; call replace_attention before them"
    }
    called = nn.MultiheadAttention(WIDTH, 4)
    called._call_impl = lambda *given, **options: None
    assert "its call was replaced" in ph.drop_in.replace_attention(called).left[""]
    forward = nn.MultiheadAttention.forward
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *given: forward(*given))
    patched = ph.drop_in.replace_attention(nn.MultiheadAttention(WIDTH, 4))
    assert "nn.MultiheadAttention itself was replaced" in patched.left[""]


@pytest.mark.parametrize("of_module", [True, False])
def test_replace_attention_of_a_compiled_module_runs_ours(of_module):
    module = nn.MultiheadAttention(WIDTH, 4)
    compiled = module
    if of_module:
        module.compile(backend="eager")
    else:
        compiled = torch.compile(module, backend="eager")
    x = torch.randn(5, 2, WIDTH)
    compiled(x, x, x)  # compiled by now
    ph.drop_in.replace_attention(compiled)
    assert runs_ours(compiled)


def test_replace_attention_that_raises_changes_nothing(monkeypatch):
    model = nn.Sequential(nn.MultiheadAttention(WIDTH, 4), nn.MultiheadAttention(WIDTH, 4))
    before = [(type(m), dict(vars(m)), dict(m._forward_pre_hooks)) for m in model]
    keep, calls = ph.drop_in.replace.keep_from_fast_path, []

    def fail_later(module):
        keep(module)
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError

    monkeypatch.setattr(ph.drop_in.replace, "keep_from_fast_path", fail_later)
    with pytest.raises(RuntimeError):
        ph.drop_in.replace_attention(model)
    assert [(type(m), dict(vars(m)), dict(m._forward_pre_hooks)) for m in model] == before
