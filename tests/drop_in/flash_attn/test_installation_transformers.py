"""transformers' own calls of flash-attn, run on these functions; and its refusal on a CPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from polyhead.drop_in.flash_attn import install

transformers = pytest.importorskip("transformers")

B, T, VOCABULARY = 2, 7, 31


@pytest.fixture
def flash_in_transformers(monkeypatch):
    """transformers as on a machine with CUDA: its test for flash-attn passes, and it imports it."""
    from transformers import modeling_flash_attention_utils as utils

    if not hasattr(utils, "_process_with_kvcache_kwargs_fn"):
        pytest.skip("this release of transformers loads flash-attn in another way")
    for name in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
    ):
        monkeypatch.setattr(utils, name, None)
    for name in (
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
        "_process_with_kvcache_kwargs_fn",
    ):
        monkeypatch.setattr(utils, name, getattr(utils, name))
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda **_: True)
    with install():
        yield


@pytest.fixture
def model():
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        sliding_window=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


def logits(model, tokens, implementation, **arguments):
    model.config._attn_implementation = implementation
    with torch.no_grad():
        return model(tokens, **arguments).logits


CALLS = {
    "rows": {},
    "left padding": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * T])},
    "right padding": {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * T])},
}


@pytest.mark.parametrize("call", CALLS)
def test_flash_calls_of_a_model_equal_eager(call, model, flash_in_transformers):
    tokens = torch.arange(B * T).view(B, T)
    expected = logits(model, tokens, "eager", **CALLS[call])
    output = logits(model, tokens, "flash_attention_2", **CALLS[call])
    real = CALLS[call].get("attention_mask", torch.ones(B, T)).bool()
    torch.testing.assert_close(output[real], expected[real], atol=1e-4, rtol=1e-4)


def test_flash_calls_of_packed_rows_equal_eager(model, flash_in_transformers):
    """One row of two documents, found by positions that restart."""
    tokens = torch.arange(T)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    output = logits(model, tokens, "flash_attention_2", position_ids=positions)
    expected = [logits(model, part, "eager") for part in tokens.split([3, 4], dim=1)]
    torch.testing.assert_close(output, torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4)


def test_flash_calls_of_generate_equal_eager(model, flash_in_transformers):
    tokens = torch.arange(B * T).view(B, T)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * T])
    texts = []
    for implementation in ("eager", "flash_attention_2"):
        model.config._attn_implementation = implementation
        texts.append(
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0
            )
        )
    assert torch.equal(texts[0], texts[1])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_transformers_refuses_flash_on_a_cpu():
    """By its own rule, whatever is installed: docs/flash-attn.md says so."""
    code = """
        import polyhead as ph
        ph.drop_in.flash_attn.install()
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(hidden_size=24, num_attention_heads=6, num_hidden_layers=1)
        try:
            LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "FlashAttention2 is not available on CPU" in done.stdout
