"""The attention function, called directly."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.integrations.transformers.forward import attention_forward
from polyhead.integrations.transformers.structured_mask import StructuredMask

B, H, G, T, S, D = 2, 6, 2, 3, 5, 4


@pytest.fixture
def qkv():
    return torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)


def layer(is_causal):
    module = torch.nn.Module()
    module.is_causal = is_causal
    return module


def run(qkv, mask, *, is_causal=True, **options):
    output, weights = attention_forward(layer(is_causal), *qkv, mask, **options)
    assert output.is_contiguous()
    return output.transpose(1, 2), weights


@pytest.mark.parametrize("is_causal", [True, False])
def test_forward_without_mask_uses_the_layers_flag(qkv, is_causal):
    rule = ph.mask.causal() if is_causal else None
    assert torch.equal(run(qkv, None, is_causal=is_causal)[0], ph.attention(*qkv, mask=rule))
    # The call's argument takes precedence over the layer's flag.
    flag = {"is_causal": not is_causal}
    output, _ = attention_forward(layer(is_causal), *qkv, None, **flag)
    other = None if is_causal else ph.mask.causal()
    assert torch.equal(output.transpose(1, 2), ph.attention(*qkv, mask=other))


def test_forward_without_mask_one_query_sees_all_keys(qkv):
    query, key, value = qkv
    one = query[:, :, :1], key, value
    assert torch.equal(run(one, None)[0], ph.attention(*one))


def test_forward_bool_and_additive_masks(qkv):
    allowed = torch.rand(B, 1, T, S) > 0.4
    numbers = torch.zeros(B, 1, T, S).masked_fill(~allowed, -torch.inf)
    expected = ph.attention(*qkv, mask=ph.mask.dense(allowed))
    assert torch.equal(run(qkv, allowed)[0], expected)
    torch.testing.assert_close(run(qkv, numbers)[0], expected)


def test_forward_structured_mask_is_passed_as_mask(qkv, calls):
    rule = ph.mask.causal() & ph.mask.left_padding([0, 2])
    run(qkv, StructuredMask(rule, batch=B, T=T, S=S, device="cpu"))
    assert calls[0]["mask"] is rule


def test_forward_structured_mask_of_another_size_raises(qkv):
    mask = StructuredMask(ph.mask.causal(), batch=B, T=T, S=S + 1, device="cpu")
    with pytest.raises(ShapeError, match=r"T or 1, S = 5\); got \(2, 1, 3, 6\)"):
        run(qkv, mask)


def test_forward_head_mask_raises(qkv):
    """ViT of transformers 4 passes a multiplicative head_mask as attention_mask."""
    with pytest.raises(
        ShapeError, match=r"attention_mask must be .*got \(1, 6, 1, 1\); .*look.ablate"
    ):
        run(qkv, torch.ones(1, H, 1, 1))


def test_forward_options_reach_the_call(qkv, calls):
    sinks = torch.randn(H)
    run(qkv, None, softcap=5.0, s_aux=sinks, scaling=0.3, dropout=0.25)
    requested = calls[0]
    assert (requested["softcap"], requested["scale"], requested["dropout"]) == (5.0, 0.3, 0.25)
    assert requested["sinks"] is sinks


def test_forward_autocast_casts_to_one_dtype(qkv):
    query, key, value = qkv
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = run((query, key, value.bfloat16()), None, is_causal=False)
        doubles, _ = run([x.double() for x in qkv], None, is_causal=False)
    expected = ph.attention(*(x.bfloat16() for x in qkv))
    assert torch.equal(output, expected)
    assert doubles.dtype == torch.float64  # autocast leaves it alone


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_forward_position_bias_is_added_to_scores(qkv, kind):
    position_bias = torch.randn(1, H, T, S)
    allowed = torch.rand(B, 1, T, S) > 0.4
    numbers = torch.randn(B, 1, T, S)
    mask = {"none": None, "bool": allowed, "float": numbers}[kind]
    expected = ph.attention(
        *qkv,
        mask=ph.mask.dense(allowed) if kind == "bool" else None,
        bias=position_bias + numbers if kind == "float" else position_bias,
    )
    got, _ = run(qkv, mask, is_causal=False, position_bias=position_bias)
    torch.testing.assert_close(got, expected)


def test_forward_weights_match_reference(qkv):
    output, weights = run(qkv, None, output_attentions=True)
    expected, aux = ph.attention(
        *qkv, mask=ph.mask.causal(), return_aux=ph.AuxRequest(weights=True)
    )
    assert torch.equal(output, expected)
    assert torch.equal(weights, aux.weights)
    assert run(qkv, None)[1] is None


def test_forward_unknown_option_raises(qkv):
    with pytest.raises(ArgumentError, match=r"block_indices must not .*got Tensor; use .*eager"):
        run(qkv, None, block_indices=torch.ones(H))


@pytest.mark.parametrize("name", ["head_mask", "layer_head_mask", "cross_attn_head_mask"])
def test_forward_head_mask_remedy_works(qkv, name):
    """Eager attention ignores it."""
    with pytest.raises(ArgumentError, match=r"off with polyhead\.look\.ablate\(model, heads\)$"):
        run(qkv, None, **{name: torch.ones(H)})


def test_forward_harmless_options_are_accepted(qkv):
    given = {"cache_position": torch.arange(T), "use_cache": True, "head_mask": None}
    assert torch.equal(run(qkv, None, **given)[0], run(qkv, None)[0])


# Of transformers 4, which knows no other implementation that returns them.
@pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported:UserWarning")
def test_forward_weights_have_gradients_with_reference():
    """The reference computes the output from them; others compute them separately."""
    transformers = pytest.importorskip("transformers")
    ph.integrations.transformers.register()
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=6, num_key_value_heads=2, attn_implementation="polyhead"
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(31, (1, 9))

    def gradients():
        answer = model(ids, labels=ids, output_attentions=True)
        return torch.autograd.grad(answer.loss, answer.attentions, allow_unused=True)

    assert gradients() == (None, None)
    with ph.use_backend("reference"):
        got = gradients()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(got, gradients(), rtol=1e-4, atol=1e-6)
