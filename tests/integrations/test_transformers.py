"""`attn_implementation="polyhead"` gives the logits that "eager" gives."""

import sys

import pytest
import torch

import polyhead as ph
from polyhead.errors import DependencyError
from polyhead.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

T = 9
SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 37,
}
FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 3, "sliding_window": 4},
}


@pytest.fixture(autouse=True)
def registered():
    ph.integrations.transformers.register()


def pair(family):
    """The same model twice: with eager attention, and with ours."""
    models = []
    for implementation in ("eager", "polyhead"):
        config = getattr(transformers, f"{family}Config")(
            **SIZES, **FAMILIES[family], attn_implementation=implementation
        )
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        models.append(model)
    return models


@pytest.fixture
def calls(monkeypatch):
    """What polyhead's attention was asked for, call by call."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return ph.attention(*args, **kwargs)

    monkeypatch.setattr(integration, "attention", spy)
    return seen


@pytest.mark.parametrize("side", ["left", "right", "none", "no mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_where_nothing_is_padded(family, side, calls):
    eager, ours = pair(family)
    tokens = torch.randint(31, (3, T))
    allowed = torch.ones(3, T, dtype=torch.int64)
    for row, padding in enumerate((0, 2, 5)):
        if side == "left":
            allowed[row, :padding] = 0
        elif side == "right":
            allowed[row, T - padding :] = 0
    given = {} if side == "no mask" else {"attention_mask": allowed}
    with torch.no_grad():
        expected, got = eager(tokens, **given).logits, ours(tokens, **given).logits
    real = allowed.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(got).all()
    assert len(calls) == 2  # one a layer: it was ours that ran


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(family, calls):
    eager, ours = pair(family)
    tokens = torch.randint(2, 31, (2, T))
    allowed = torch.ones(2, T, dtype=torch.int64)
    allowed[1, :3] = 0
    asked = {"attention_mask": allowed, "max_new_tokens": 6, "do_sample": False}
    asked |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(tokens, **asked), eager.generate(tokens, **asked))
    assert len(calls) == 2 * 6


def test_gradients_are_those_of_eager():
    eager, ours = pair("Llama")
    tokens = torch.randint(31, (2, T))
    for model in (eager, ours):
        model(tokens, labels=tokens).loss.backward()
    theirs = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


def test_the_models_dropout_reaches_the_call(calls):
    _, ours = pair("Llama")
    for layer in ours.model.layers:
        layer.self_attn.attention_dropout = 0.25
    tokens = torch.randint(31, (2, T))
    ours.train()(tokens)
    assert [call["dropout"] for call in calls] == [0.25, 0.25]
    ours.eval()(tokens)
    assert [call["dropout"] for call in calls[2:]] == [0.0, 0.0]


def module_like(is_causal):
    module = torch.nn.Module()
    module.is_causal = is_causal
    return module


@pytest.mark.parametrize("is_causal", [True, False])
def test_mask_none_bool_and_numbers(is_causal):
    query, key, value = torch.randn(2, 6, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    allowed = torch.rand(2, 1, 3, 5) > 0.4
    numbers = torch.zeros(2, 1, 3, 5).masked_fill(~allowed, -torch.inf)

    def run(mask, **options):
        output, weights = integration.attention_forward(
            module_like(is_causal), query, key, value, mask, **options
        )
        assert weights is None
        assert output.is_contiguous()
        return output.transpose(1, 2)

    own = ph.mask.causal() if is_causal else None
    assert torch.equal(run(None), ph.attention(query, key, value, mask=own))
    expected = ph.attention(query, key, value, mask=ph.mask.dense(allowed))
    assert torch.equal(run(allowed), expected)
    torch.testing.assert_close(run(numbers), expected)
    # What the call says wins over what the module says.
    assert torch.equal(run(None, is_causal=False), ph.attention(query, key, value))
    options = {"softcap": 5.0, "s_aux": torch.randn(6), "scaling": 0.3}
    asked = {"softcap": 5.0, "sinks": options["s_aux"], "scale": 0.3}
    assert torch.equal(run(None, **options), ph.attention(query, key, value, mask=own, **asked))


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r'pip install "polyhead\[hf\]"'):
        ph.integrations.transformers.register()
