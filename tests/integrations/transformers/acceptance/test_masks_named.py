"""Masks are never guessed: other arguments of models and callers that mask are used or refused."""

import itertools

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ModelError

transformers = pytest.importorskip("transformers", minversion="5", reason="the models came with 5")

TINY = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = TINY | {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}
# Four of nine keys are selected per query.
SPARSE = SIZES | {
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "v_head_dim": 6},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6},
    **{"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
    **{"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "max_position_embeddings": 64},
    **{"experts_implementation": "eager"},
}
GEMMA_4 = SIZES | {
    **{"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2},
    **{"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"sliding_window": 4, "head_dim": 10, "global_head_dim": 12},
    **{"hidden_size_per_layer_input": 5, "vocab_size_per_layer_input": 31},
}
BOUNDS = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 5, "max_length_k": 5}

COMPILED = pytest.param(True, marks=pytest.mark.slow)


@pytest.fixture
def tokens():
    return torch.randint(1, 31, (1, 12))


def pair(cls, config, sizes):
    """The same random model with eager and with polyhead attention."""
    models = []
    for attention in ("eager", "polyhead"):
        torch.manual_seed(3)
        model = cls._from_config(config(**sizes), attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        models.append(model.eval())
    return models


def test_mask_cross_attention_without_flag_sees_all_keys():
    """transformers#48172: it was causal, and token 0 saw only key 0."""
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    config = transformers.MllamaTextConfig(
        **(SIZES | {"num_attention_heads": 6, "num_key_value_heads": 2}), cross_attention_layers=[1]
    )
    layer = MllamaTextCrossAttention(config, layer_idx=1).eval()
    x, image = torch.randn(1, 4, 48), torch.randn(1, 7, 48)
    config._attn_implementation = "eager"
    expected, _ = layer(x, image, attention_mask=None)
    config._attn_implementation = "polyhead"
    got, _ = layer(x, image, attention_mask=None)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("compiled", [False, COMPILED])
def test_mask_remaining_queries_are_the_last(compiled, tokens):
    """mobius#350: layers that share keys compute only the queries whose logits are kept."""
    eager, ours = pair(transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig, GEMMA_4)
    run = torch.compile(ours, backend="eager") if compiled else ours
    with torch.no_grad():
        expected = eager(tokens).logits[:, -2:]
        torch.testing.assert_close(run(tokens, logits_to_keep=2).logits, expected)


@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "GptOss", "ModernBert"])
def test_mask_dropped_by_a_wrapper_keeps_windows(name, build, inputs):
    """As in sequence parallelism: positions and flags remain."""
    given, _ = inputs(name, "no mask", T=12)
    eager, ours = build(name, "eager"), build(name, "polyhead")
    for module in ours.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
            )
    with torch.no_grad():
        torch.testing.assert_close(ours(**given)[0], eager(**given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": True}, {"attention_mask": torch.ones(1, 12, dtype=int)}],
    ids=["plain", "with a cache", "with a mask of ones"],
)
@pytest.mark.parametrize("compiled", [False, COMPILED])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_mask_packed_by_cu_seq_lens_equals_separate_rows(name, compiled, options, build, tokens):
    """trl#3910: the documents attended to each other."""
    model = build(name, "polyhead").train()
    alone = [
        model(tokens[:, start:stop], use_cache=False).logits
        for start, stop in itertools.pairwise(BOUNDS)
    ]
    run = torch.compile(model, backend="eager") if compiled else model
    packed = run(tokens, **(PACKED | {"use_cache": False} | options)).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_mask_cu_seq_lens_of_other_rows_raise(build, tokens):
    model = build("Llama", "polyhead")
    with pytest.raises(ArgumentError, match=r"cu_seq_lens_q must begin with 0.* = 1 \* 11 = 11"):
        model(tokens[:, :11], use_cache=False, **PACKED)


@pytest.mark.parametrize(
    "name",
    [
        "DeepseekV32",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("GlmMoeDsa", "HYV4", "AXK2")),
    ],
)
def test_mask_sparse_attention_sees_selected_keys(name, tokens):
    """Their layers build a mask for "eager" and "sdpa", and pass key indices to others."""
    cls = getattr(transformers, f"{name}ForCausalLM", None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    eager, ours = pair(cls, getattr(transformers, f"{name}Config"), SPARSE)
    tokens = tokens.view(2, 6).repeat(1, 2)[:, :9]
    real = torch.ones(2, 9, dtype=int)
    real[0, :3] = 0
    with torch.no_grad():
        got, expected = (model(tokens, attention_mask=real).logits for model in (ours, eager))
    torch.testing.assert_close(got[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": real}
    assert torch.equal(ours.generate(tokens, **options), eager.generate(tokens, **options))
    report = ph.integrations.transformers.status(ours)
    assert all(layer.attends_through_polyhead for layer in report.layers)


def test_mask_layers_with_unknown_arguments_raise():
    if not hasattr(transformers, "MiniMaxM3VLTextConfig"):
        pytest.skip("this transformers has no MiniMax M3")
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLAttention

    config = transformers.MiniMaxM3VLTextConfig(
        **SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    )
    layer = torch.nn.ModuleDict({"self_attn": MiniMaxM3VLAttention(config, layer_idx=0)})
    config._attn_implementation = "polyhead"
    (status,) = ph.integrations.transformers.status(layer).layers
    assert status.runs == "nothing"
    assert status.reason == 'passes block_indices, which polyhead does not support; keep "eager"'
    cls = transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLTextModel
    with pytest.raises(ModelError, match=r"MiniMaxM3VLAttention \(.*it passes block_indices"):
        cls._from_config(config, attn_implementation="polyhead")
