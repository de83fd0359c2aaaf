"""Attention layers of transformers; configs of transformers 4 written as those of 5."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import polyhead as ph

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "GptOss", "Phi3")
FAMILIES += ("GPTNeoX", "Falcon", "DeepseekV3")


@pytest.fixture(autouse=True)
def rope_parameters(monkeypatch, is_transformers_4):
    """Make configs of transformers 4 accept `rope_parameters` too."""
    if not is_transformers_4:
        return
    import transformers

    for family in FAMILIES:
        config = getattr(transformers, f"{family}Config")
        monkeypatch.setattr(config, "__init__", taking_rope_parameters(config.__init__, family))


@pytest.fixture(scope="session")
def is_transformers_4():
    transformers = pytest.importorskip("transformers")
    return transformers.__version__.startswith("4.")


def taking_rope_parameters(init, family):
    neox = family == "GPTNeoX"

    @functools.wraps(init)
    def with_rope_parameters(self, *arguments, rope_parameters=None, **options):
        ropes = dict(rope_parameters or {})
        if local := ropes.pop("sliding_attention", None):
            options["rope_local_base_freq"] = local["rope_theta"]
            ropes = dict(ropes["full_attention"])
        if ropes:
            options["rotary_emb_base" if neox else "rope_theta"] = ropes.pop("rope_theta")
            share = ropes.pop("partial_rotary_factor", None)
            if share is not None:
                options["rotary_pct" if neox else "partial_rotary_factor"] = share
            options["rope_scaling"] = None if ropes["rope_type"] == "default" else ropes
        if ropes.get("rope_type") == "longrope" and "factor" not in ropes:
            self.original_max_position_embeddings = ropes["original_max_position_embeddings"]
        init(self, *arguments, **options)

    return with_rope_parameters


H, G, D, WINDOW, THETA = 6, 2, 8, 4, 500.0
SEPARATE = {  # d_in is not H * D
    "hidden_size": 42,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": D,
    "num_hidden_layers": 3,
    "max_position_embeddings": 37,
    "attention_dropout": 0.125,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}
SQUARE = {
    "hidden_size": H * D,
    "num_attention_heads": H,
    "num_hidden_layers": 3,
    "max_position_embeddings": 37,
}
FALCON = {**SQUARE, "rope_parameters": SEPARATE["rope_parameters"], "attention_dropout": 0.125}
SLIDING = ["full_attention", "sliding_attention", "full_attention"]
BOTH_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 90.0},
    "sliding_attention": SEPARATE["rope_parameters"],
}
BERT = {**SQUARE, "attention_probs_dropout_prob": 0.125}
T5 = {"d_model": 42, "d_kv": D, "num_heads": H, "relative_attention_num_buckets": 8}
DEEPSEEK = {
    **{name: SEPARATE[name] for name in SEPARATE if name not in {"head_dim"}},
    "num_key_value_heads": H,
    "kv_lora_rank": 14,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": D,
    "v_head_dim": 7,
    "attention_bias": True,
}


@dataclass(frozen=True)
class Case:
    """A class of transformers, its config, and how tests call it."""

    layer: str
    options: dict[str, Any]
    module: str = ""  # where the class is, if not in the folder of its config's name
    arguments: tuple = ((), {"layer_idx": 1})
    mask: ph.mask.Mask | None = ph.mask.causal()
    rotary: int | None = D  # rotary features
    theta: float = THETA


WINDOWED = ph.mask.causal() & ph.mask.window(before=WINDOW - 1)
AROUND = ph.mask.window(before=WINDOW - 1, after=WINDOW - 1)
PLAIN = ((), {})
GLOBAL = ["full_attention"] * 3


def partial(share):
    return {"rope_parameters": {**SEPARATE["rope_parameters"], "partial_rotary_factor": share}}


LAYER_CASES = {
    "llama": Case("Llama", SEPARATE),
    "llama, biases": Case("Llama", {**SEPARATE, "attention_bias": True}),
    "mistral": Case("Mistral", {**SEPARATE, "sliding_window": WINDOW}, mask=WINDOWED),
    "qwen2": Case("Qwen2", SEPARATE),
    "qwen3": Case("Qwen3", SEPARATE),
    "qwen3, window": Case(
        "Qwen3",
        {**SEPARATE, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING},
        mask=WINDOWED,
    ),
    "gemma2": Case("Gemma2", {**SEPARATE, "attn_logit_softcapping": 1.5, "layer_types": GLOBAL}),
    "gemma2, window": Case(
        "Gemma2",
        {**SEPARATE, "sliding_window": WINDOW, "query_pre_attn_scalar": 5, "layer_types": SLIDING},
        mask=WINDOWED,
    ),
    "gemma3": Case(
        "Gemma3",
        {**SEPARATE, "rope_parameters": BOTH_ROPES, "layer_types": GLOBAL},
        theta=90.0,
    ),
    "gemma3, window": Case(
        "Gemma3",
        {
            **SEPARATE,
            "rope_parameters": BOTH_ROPES,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "layer_types": SLIDING,
        },
        mask=WINDOWED,
    ),
    "gemma3, both ways": Case(
        "Gemma3",
        {
            **SEPARATE,
            "rope_parameters": BOTH_ROPES,
            "sliding_window": 2 * WINDOW - 2,  # the config halves it, and adds 1
            "use_bidirectional_attention": True,
            "layer_types": SLIDING,
        },
        mask=AROUND,
    ),
    "gpt-oss": Case(
        "GptOss",
        {**SEPARATE, "sliding_window": WINDOW, "layer_types": SLIDING},
        mask=WINDOWED,
    ),
    "phi3": Case(
        "Phi3",
        {
            **{name: SEPARATE[name] for name in SEPARATE if name != "head_dim"},
            "hidden_size": H * D,
            "pad_token_id": 0,
            **partial(0.5),
        },
        rotary=D // 2,
    ),
    "gpt2": Case("GPT2", {**SQUARE, "attn_pdrop": 0.125}, rotary=None),
    "gpt2, scaled by layer": Case(
        "GPT2", {**SQUARE, "scale_attn_by_inverse_layer_idx": True}, rotary=None
    ),
    "gpt2, not scaled": Case("GPT2", {**SQUARE, "scale_attn_weights": False}, rotary=None),
    "neox": Case(
        "GPTNeoX",
        {
            **SQUARE,
            "attention_dropout": 0.125,
            **partial(0.25),
        },
        rotary=D // 4,
    ),
    "neox, no biases": Case(
        "GPTNeoX",
        {**SQUARE, "attention_bias": False, **partial(1.0)},
    ),
    "bloom": Case(
        "Bloom", {"hidden_size": H * D, "n_head": H, "attention_dropout": 0.125}, rotary=None
    ),
    "falcon, one group": Case("Falcon", {**FALCON, "multi_query": True}),
    "falcon, groups": Case(
        "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": G, "bias": True}
    ),
    "falcon, no groups": Case("Falcon", {**FALCON, "multi_query": False}),
    "falcon, alibi": Case("Falcon", {**FALCON, "multi_query": False, "alibi": True}, rotary=None),
    "opt": Case("OPT", {**SQUARE, "attention_dropout": 0.125}, rotary=None),
    "opt, no biases": Case("OPT", {**SQUARE, "enable_bias": False}, rotary=None),
    "bert, alone": Case("BertSelf", BERT, "bert", PLAIN, None, None),
    "bert": Case("Bert", BERT, "", PLAIN, None, None),
    "bert, a decoder": Case("Bert", BERT, "", ((), {"is_causal": True}), rotary=None),
    "vit": Case("ViT", BERT, "", PLAIN, None, None),
    "vit, no biases": Case("ViT", {**BERT, "qkv_bias": False}, "", PLAIN, None, None),
    "t5": Case("T5", {**T5, "is_decoder": False}, "", ((True,), {}), None, None),
    "t5, a decoder": Case("T5", {**T5, "is_decoder": True}, "", ((True, 1, True), {}), rotary=None),
    "t5, no table": Case("T5", {**T5, "is_decoder": False}, "", PLAIN, None, None),
    "deepseek": Case("DeepseekV3", DEEPSEEK),
    "deepseek, no latent of queries": Case("DeepseekV3", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek, halves": Case("DeepseekV3", {**DEEPSEEK, "rope_interleave": False}),
}
FOLDERS = {"GptOss": "gpt_oss", "GPTNeoX": "gpt_neox", "DeepseekV3": "deepseek_v3"}


@pytest.fixture(params=LAYER_CASES)
def layer_name(request):
    """The names of `layer_cases`, one per test."""
    return request.param


@pytest.fixture(scope="session")
def layer_cases():
    """Every supported attention layer of transformers: a `Case` by name."""
    return LAYER_CASES


@pytest.fixture(scope="session")
def modeling():
    """`modeling(case)`: the module of transformers that its class is in."""

    def find(case):
        folder = case.module or FOLDERS.get(case.layer, case.layer.lower())
        return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")

    return find


@pytest.fixture
def build_layer(modeling):
    """`build_layer(name)`: transformers' layer, in float64, with fixed random weights."""
    transformers = pytest.importorskip("transformers")

    def build(name):
        case = LAYER_CASES[name]
        module = modeling(case)
        config_name = {"Gemma3": "Gemma3Text", "BertSelf": "Bert"}.get(case.layer, case.layer)
        config = getattr(transformers, f"{config_name}Config")(
            **case.options, attn_implementation="eager"
        )
        torch.manual_seed(3)
        positional, named = case.arguments
        layer = getattr(module, f"{case.layer}Attention")(config, *positional, **named)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        return layer.double().eval()

    return build
