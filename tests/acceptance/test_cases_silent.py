"""Models, files and modules of others that once gave a wrong answer, and no error.

Each test names the public thread that shows what people do.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import ArgumentError, ConversionError, PolyheadError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def registered():
    ph.integrations.transformers.register()


def tiny_llama(name="polyhead", **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=name,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def ids(rows, tokens, seed=1):
    return torch.randint(31, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_cross_attention_without_a_mask_sees_all_keys():
    """transformers#48172: no mask was taken for a causal one."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    outputs = []
    for name in ("eager", "polyhead"):
        config = MllamaTextConfig(
            hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2
        )
        config._attn_implementation = name
        torch.manual_seed(0)
        layer = MllamaTextCrossAttention(config, layer_idx=1).eval()
        x, image = torch.randn(1, 4, 24), torch.randn(1, 7, 24)
        with torch.no_grad():
            outputs.append(layer(x, cross_attention_states=image, attention_mask=None)[0])
    close(outputs[1], outputs[0])


def test_compiled_graph_that_drops_queries_keeps_their_positions():
    """mobius#350: in a traced graph no mask meant causal from the first query."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=31,
        sliding_window=64,
        max_position_embeddings=64,
    )
    model = Gemma4ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids(1, 9), logits_to_keep=2).logits
        model.set_attn_implementation("polyhead")
        close(model(ids(1, 9), logits_to_keep=2).logits, expected)
        compiled = torch.compile(model, backend="eager")
        close(compiled(ids(1, 9), logits_to_keep=2).logits, expected)


def test_window_that_comes_without_a_mask_is_applied():
    """A wrapper that drops the mask, as sequence parallelism does, kept no window."""
    config = transformers.MistralConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, sliding_window=3
    )
    from transformers.models.mistral.modeling_mistral import MistralAttention

    config._attn_implementation = "polyhead"
    torch.manual_seed(0)
    layer = MistralAttention(config, layer_idx=0).eval()
    ours = ph.convert.from_transformers(layer)
    x = torch.randn(1, 9, 24)
    rope = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding(config)
    turns = rope(x, torch.arange(9)[None])
    with torch.no_grad(), contextlib.suppress(ArgumentError):  # a refusal by name is right, too
        close(layer(x, position_embeddings=turns, attention_mask=None)[0], ours(x))


def test_packed_rows_named_by_cu_seq_lens_do_not_mix():
    """trl#3910, trl#3705."""
    model = tiny_llama().train()
    row = ids(1, 12)
    cu = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(5), torch.arange(3), torch.arange(4)])[None]
    packed = model(
        row,
        position_ids=positions,
        use_cache=False,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=5,
        max_length_k=5,
    ).logits
    alone = [model(row[:, i:j], use_cache=False).logits for i, j in ((0, 5), (5, 8), (8, 12))]
    close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("width", [16, 48, 768])
def test_checkpoint_of_the_other_layout_is_refused(width):
    """MDI-LLM#6: nanoGPT keeps (out, in) under GPT-2's names."""
    state = {
        "h.0.attn.c_attn.weight": torch.randn(3 * width, width),
        "h.0.attn.c_proj.weight": torch.randn(width, width),
    }
    with pytest.raises(ConversionError, match=r"c_attn\.weight"):
        ph.convert.state_dict(state, source="gpt2", target="polyhead", num_heads=4)


def llama_state(layers=1):
    state = {}
    for layer in range(layers):
        for name, rows in (("q", 24), ("k", 8), ("v", 8), ("o", 24)):
            state[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = torch.randn(rows, 24)
    return state


def test_quantized_weights_do_not_move():
    """gemma.cpp#533: codes moved, and their scales stayed."""
    q = "model.layers.0.self_attn.q_proj.weight"
    nf4 = llama_state() | {
        q: torch.zeros(288, 1, dtype=torch.uint8),
        f"{q}.absmax": torch.ones(9),
        f"{q}.quant_map": torch.ones(16),
        f"{q}.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }
    int8 = llama_state() | {
        q: torch.zeros(24, 24, dtype=torch.int8),
        "model.layers.0.self_attn.q_proj.SCB": torch.ones(24),
    }
    for state in (nf4, int8):
        with pytest.raises(ConversionError, match="q_proj"):
            ph.convert.state_dict(state, source="llama", target="polyhead")


def test_layer_that_is_not_whole_is_refused():
    state = llama_state(2)
    del state["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ConversionError, match=r"layers\.1.*k_proj"):
        ph.convert.state_dict(state, source="llama", target="polyhead")


@pytest.mark.parametrize("source", ["gemma3", "llama", "qwen3"])
def test_norms_over_all_heads_are_no_norms_per_head(source):
    state = llama_state()
    for name, size in (("q_norm", 24), ("k_norm", 8)):
        state[f"model.layers.0.self_attn.{name}.weight"] = torch.ones(size)
    with pytest.raises(ConversionError, match="norm"):
        ph.convert.state_dict(state, source=source, target="polyhead", num_heads=6, num_kv_heads=2)


def test_offloaded_model_is_read_or_refused():
    """TransformerLens#1615."""
    model = tiny_llama()
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    layer, theirs = model.model.layers[0].self_attn, away.model.layers[0].self_attn
    ours = ph.convert.from_transformers(theirs)
    for name, tensor in ph.convert.from_transformers(layer).state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    with pytest.raises(ConversionError, match=r"offloaded; take its hooks off"):
        ph.convert.to_transformers(ours, theirs)
    text = ids(1, 12)
    expected = ph.look.capture(model, text).layers[0].stats["contribution"]
    close(ph.look.capture(away, text).layers[0].stats["contribution"], expected)
    with pytest.raises(ConversionError, match="meta"):
        ph.convert.state_dict(away.state_dict(), source="llama", target="polyhead")
    before = dict(away.named_modules())
    with pytest.raises(PolyheadError, match="remove_hook_from"):
        ph.look.prune(away, [(0, 1)])
    assert dict(away.named_modules()) == before


def test_remedy_of_an_offloaded_model_works():
    from accelerate.hooks import remove_hook_from_module

    model = tiny_llama()
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    remove_hook_from_module(away, recurse=True)
    layer = away.model.layers[0].self_attn
    ours = ph.convert.from_transformers(layer)
    with torch.no_grad():
        ours.W_query.weight += 1
    ph.convert.to_transformers(ours, layer)
    assert torch.equal(layer.q_proj.weight, ours.W_query.weight)


def test_replaced_attention_runs_under_hooks():
    """A forward on the instance, as accelerate's hooks set, was torch's own still."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    expected = ph.drop_in.MultiheadAttention(24, 3, batch_first=True).eval()
    expected.load_state_dict(theirs.state_dict())
    model = nn.ModuleDict({"attention": add_hook_to_module(theirs, AlignDevicesHook("cpu"))})
    replacement = ph.drop_in.replace_attention(model)
    x = torch.randn(2, 5, 24)
    if replacement.replaced:
        with torch.no_grad():
            y, _ = model["attention"](x, x, x, is_causal=True)
            close(y, expected(x, x, x, is_causal=True)[0])
    else:
        assert "forward" in replacement.left["attention"]


def test_encoder_and_decoder_of_equal_lengths_keep_their_texts():
    """bertviz#133."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=31, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation("polyhead")
    repeated = torch.tensor([[3, 7, 8] * 4])
    report = ph.look.capture(model, ids(1, 12), decoder_input_ids=repeated)
    for layer in report.layers:
        if "decoder" in layer.name and "EncDec" not in layer.name:
            same = layer.stats.get("mass_same_token")
            assert same is None or not torch.all(same == 0)
        if "EncDec" in layer.name:
            assert (
                layer.stats.get("mass_same_token") is None
                or torch.isnan(layer.stats["mass_same_token"]).all()
            )


def test_norms_per_head_stop_pruning_before_it_changes_a_model():
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        qk_layernorm=True,
        max_position_embeddings=64,
    )
    model = transformers.StableLmForCausalLM(config).eval()
    model.set_attn_implementation("polyhead")
    text, heads = ids(1, 9), [(0, 1), (1, 4)]
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        with ph.look.ablate(model, heads, how="zero"):
            ablated = model(text).logits
        try:
            ph.look.prune(model, heads)
        except ArgumentError:
            after = model.state_dict()
            assert after.keys() == before.keys()
            assert all(torch.equal(after[name], before[name]) for name in before)
        else:
            close(model(text).logits, ablated)
