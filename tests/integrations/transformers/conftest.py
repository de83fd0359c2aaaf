"""Tiny models of every family, with random weights, with eager and polyhead attention."""

import pytest
import torch

import polyhead as ph

transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS = 31, 2
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "max_position_embeddings": 37,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": LAYERS, "n_head": 6, "n_positions": 37}
WITHOUT_EOS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
# The kernel of experts requires rows of 16 bytes.
EXPERTS = DECODER | {"hidden_size": 48, "intermediate_size": 32, "experts_implementation": "eager"}

FAMILIES = {
    "GPT2": ("LMHeadModel", GPT2 | WITHOUT_EOS),
    "Llama": ("ForCausalLM", DECODER | {"num_key_value_heads": 2}),
    "Mistral": ("ForCausalLM", DECODER | {"num_key_value_heads": 3, "sliding_window": 4}),
    "Qwen2": (
        "ForCausalLM",
        DECODER
        | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4}
        | {"max_window_layers": 1},
    ),
    "Qwen2Moe": (  # whose window is off, and of 0
        "ForCausalLM",
        EXPERTS
        | {"num_key_value_heads": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, "num_experts": 3, "num_experts_per_tok": 2},
    ),
    "Qwen3": ("ForCausalLM", DECODER | {"num_key_value_heads": 2, "head_dim": 10}),
    "Gemma2": (
        "ForCausalLM",
        DECODER | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 4},
    ),
    "Gemma3Text": (
        "ForCausalLM",
        DECODER
        | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi": ("ForCausalLM", DECODER | {"partial_rotary_factor": 0.5}),
    "Phi3": ("ForCausalLM", DECODER | {"num_key_value_heads": 2}),
    "Olmo": ("ForCausalLM", DECODER),
    "GPTNeoX": ("ForCausalLM", DECODER),
    "OPT": (
        "ForCausalLM",
        DECODER | {"ffn_dim": 29, "word_embed_proj_dim": 24},
    ),
    "SmolLM3": ("ForCausalLM", DECODER | {"num_key_value_heads": 2, "no_rope_layer_interval": 2}),
    "GptOss": (
        "ForCausalLM",
        EXPERTS
        | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 4}
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "rope_parameters": None},
    ),
    "DeepseekV3": (
        "ForCausalLM",
        EXPERTS
        | {"num_key_value_heads": 6, "q_lora_rank": 7, "kv_lora_rank": 8, "v_head_dim": 5}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "moe_intermediate_size": 32}
        | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        | {"first_k_dense_replace": 1},
    ),
    "Bert": ("Model", DECODER),
    "Roberta": ("Model", DECODER),
    "ModernBert": (
        "Model",
        DECODER
        | {"global_attn_every_n_layers": 2, "local_attention": 4}
        | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 5, "d_ff": 29, "num_layers": LAYERS}
        | {"num_heads": 6, "decoder_start_token_id": 3}
        | WITHOUT_EOS,
    ),
    "Bart": (
        "ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 24, "max_position_embeddings": 37}
        | {"encoder_layers": LAYERS, "encoder_attention_heads": 6, "encoder_ffn_dim": 29}
        | {"decoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 23}
        | {"decoder_start_token_id": 3, "forced_eos_token_id": None}
        | WITHOUT_EOS,
    ),
    "ViT": (
        "Model",
        {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": LAYERS}
        | {"num_attention_heads": 6, "image_size": 12, "patch_size": 4},
    ),
    "CLIPText": ("Model", DECODER | {"projection_dim": 7, "eos_token_id": 2}),
}
# Before transformers 5 these compute their own attention, and are refused.
OWN_BEFORE_5 = ("Bert", "Roberta", "ModernBert", "T5")
IS_4 = transformers.__version__.startswith("4.")
ENCODER_DECODERS = ("T5", "Bart")
DECODERS = tuple(
    name for name, (kind, _) in FAMILIES.items() if kind in ("ForCausalLM", "LMHeadModel")
)
# Between them: no grouping and grouping, windows, softcap, sinks, a bias, cross-attention, ALiBi,
# an encoder with windows.
QUICK = ("GPT2", "Llama", "Gemma2", "GptOss", "ModernBert", "T5")
FIXTURES = {
    "family": tuple(FAMILIES),
    "decoder": DECODERS,
    "generator": (*DECODERS, *ENCODER_DECODERS),
}


def pytest_generate_tests(metafunc):
    for fixture, names in FIXTURES.items():
        if fixture in metafunc.fixturenames:
            marks = {name: () if name in QUICK else pytest.mark.slow for name in names}
            metafunc.parametrize(
                fixture, [pytest.param(name, marks=mark) for name, mark in marks.items()]
            )


@pytest.fixture(autouse=True)
def registered():
    ph.integrations.transformers.register()


@pytest.fixture(autouse=True)
def finite_eager(monkeypatch):
    """Eager attention with finite outputs in float64 too.

    It forbids with the dtype's smallest number and takes the softmax in float32, where that of
    float64 is -inf: rows of padding become NaN, and spread.
    """
    masking = transformers.masking_utils

    def eager_mask(dtype=torch.float32, **given):
        wide = dtype == torch.float64
        mask = masking.eager_mask(dtype=torch.float32 if wide else dtype, **given)
        return mask if mask is None else mask.to(dtype)

    monkeypatch.setitem(masking.AttentionMaskInterface._global_mapping, "eager", eager_mask)


def build(family, attention, dtype=torch.float32, **settings):
    """A model with fixed random weights."""
    if IS_4 and family in OWN_BEFORE_5:
        pytest.skip(f"before transformers 5 {family} computes its own attention, and is refused")
    if IS_4 and dtype == torch.float64 and family in ("DeepseekV3", "CLIPText", "OPT"):
        pytest.skip(
            f"transformers 4 cannot run {family} in float64, which is what is compared with"
        )
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(
        **(sizes | settings), attn_implementation=attention
    )
    cls = getattr(transformers, f"{family}{kind}", None)
    cls = cls or getattr(transformers, f"{family.removesuffix('Text')}{kind}")
    torch.manual_seed(3)
    model = cls._from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


@pytest.fixture(name="build")
def _build():
    return build


@pytest.fixture
def inputs():
    """`inputs(family, side, T=9)`: the model's inputs, and the mask of its unpadded outputs."""

    def make(family, side="none", T=9):
        generator = torch.Generator().manual_seed(5)
        if family == "ViT":
            return {"pixel_values": torch.rand(3, 3, 12, 12, generator=generator)}, ...
        tokens = torch.randint(3, VOCABULARY, (3, T), generator=generator)
        real = torch.ones(3, T, dtype=torch.int64)
        for row, padding in enumerate((0, 2, 5)):
            if side == "left":
                real[row, :padding] = 0
            elif side == "right":
                real[row, T - padding :] = 0
        given = {"input_ids": tokens}
        if side != "no mask":
            given["attention_mask"] = real
        if family in ENCODER_DECODERS:
            return given | {"decoder_input_ids": tokens[:, :7].flip(1)}, ...
        return given, real.bool()

    return make


@pytest.fixture
def calls(monkeypatch):
    """Arguments of polyhead's attention, per call."""
    from polyhead.integrations.transformers import forward

    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return ph.attention(*args, **kwargs)

    monkeypatch.setattr(forward, "attention", spy)
    return seen
