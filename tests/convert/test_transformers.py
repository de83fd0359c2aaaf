"""Every attention layer of transformers that is known: the same function, the same bits back."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.convert import from_transformers, to_transformers
from polyhead.errors import ConversionError

transformers = pytest.importorskip("transformers")

IS_4 = transformers.__version__.startswith("4.")
B, T, H, G, D, WINDOW, THETA = 2, 11, 6, 2, 8, 4, 500.0
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
    """A class of transformers, its config, and how a test of ours calls it."""

    layer: str
    options: dict[str, Any]
    module: str = ""  # where the class is, if not in the folder of its config's name
    arguments: tuple = ((), {"layer_idx": 1})
    mask: ph.mask.Mask | None = ph.mask.causal()
    rotary: int | None = D  # how many features turn
    theta: float = THETA


WINDOWED = ph.mask.causal() & ph.mask.window(before=WINDOW - 1)
AROUND = ph.mask.window(before=WINDOW - 1, after=WINDOW - 1)
PLAIN = ((), {})
GLOBAL = ["full_attention"] * 3


def partial(share):
    return {"rope_parameters": {**SEPARATE["rope_parameters"], "partial_rotary_factor": share}}


CASES = {
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


def modeling(case):
    folder = case.module or FOLDERS.get(case.layer, case.layer.lower())
    return __import__(f"transformers.models.{folder}.modeling_{folder}", fromlist=["_"])


def build(name):
    case = CASES[name]
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


def in_float64(layer):
    """Theirs with norms that do not compute in float32 whatever they are given."""
    layer = copy.deepcopy(layer)
    for parent in list(layer.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape, getattr(norm, "eps", 1e-6)).double()
                offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
                exact.weight = nn.Parameter(norm.weight.detach() + offset)
                setattr(parent, name, exact)
    return layer


def turns(case):
    """cos and sin by hand, in float64: transformers computes angles in float32."""
    steps = torch.arange(0, case.rotary, 2, dtype=torch.float64) / case.rotary
    angles = torch.arange(T, dtype=torch.float64)[:, None] / case.theta**steps
    if case.layer != "GptOss":
        angles = torch.cat([angles, angles], dim=-1)
    angles = angles[None].expand(B, -1, -1)
    return angles.cos(), angles.sin()


def exact_softmax(scores, dim, dtype=None):
    """In the dtype of what it is given: most of theirs compute it in float32."""
    return torch.softmax(scores, dim)


def output_of(case, layer, x, allowed):
    """What theirs gives for x where `allowed` (B, 1, T, T) says who may attend."""
    numbers = torch.zeros(B, 1, T, T).double().masked_fill(~allowed, -math.inf)
    named = {} if case.rotary is None else {"position_embeddings": turns(case)}
    if case.layer == "T5":
        positions = {"cache_position": torch.arange(T)} if IS_4 else {}
        return layer(x, mask=numbers, **positions)[0]
    if case.layer == "Falcon":
        alibi = None
        if case.rotary is None:
            ones = torch.ones(B, T, dtype=torch.long)
            alibi = modeling(case).build_alibi_tensor(ones, H, x.dtype)
        return layer(x, alibi, numbers, **named)[0]
    if case.layer == "Bloom":
        alibi = (ph.alibi_slopes(H)[:, None] * torch.arange(T)).double().repeat(B, 1)[:, None]
        return layer(x, torch.zeros_like(x), alibi, numbers)[0]
    if case.layer == "ViT" and IS_4:
        return layer(x)  # which takes no mask
    if case.layer == "Bert":
        seen = []
        layer.output.dense.register_forward_hook(lambda module, args, y: seen.append(y))
        layer(x, attention_mask=numbers)
        return seen[0]
    return layer(x, attention_mask=numbers, **named)[0]


@pytest.mark.parametrize("name", CASES)
def test_same_output_in_float64_and_the_same_bits_back(name, monkeypatch):
    if IS_4 and name in ("bert, a decoder", "t5, a decoder"):
        pytest.skip("in transformers 4 these do not say that they are causal, and are refused")
    case, layer = CASES[name], build(name)
    ours = from_transformers(layer)
    assert ours.mask == case.mask
    assert not ours.training

    x = torch.randn(B, T, ours.d_in, dtype=torch.float64)
    padding = ph.mask.lengths([T, T - 2])  # shorter than a window: nobody is left without a key
    if case.layer == "ViT" and IS_4:
        padding = ph.mask.lengths([T, T])
    rule = padding if case.mask is None else case.mask & padding
    allowed = rule.materialize(T, T).expand(B, 1, T, T)
    with torch.no_grad(), monkeypatch.context() as patch:
        got = ours(x, mask=padding)
        patch.setattr(nn.functional, "softmax", exact_softmax)
        want = output_of(case, in_float64(layer), x, allowed)
    digits = 1e-5 if IS_4 and case.layer == "T5" else 1e-12  # scores are float32 there
    torch.testing.assert_close(got, want, rtol=digits, atol=digits * want.abs().max().item())

    other = build(name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for parameter in other.parameters():
        nn.init.constant_(parameter, math.nan)
    for key in ("LayerNorm.weight", "LayerNorm.bias"):  # stays with the model
        if case.layer == "Bert":
            other.output.get_parameter(key).data = layer.output.get_parameter(key).detach()
    assert to_transformers(ours, other) is other
    assert before.keys() == other.state_dict().keys()
    for key, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    again = from_transformers(other).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("unknown", [nn.Linear(3, 3), nn.MultiheadAttention(4, 2)])
def test_unknown_module_says_what_is_known(unknown):
    known = r"one of .*LlamaAttention, MistralAttention, Qwen2Attention"
    message = known + rf".*; got {type(unknown).__name__}; pass .*layers\[0\]\.self_attn"
    with pytest.raises(ConversionError, match=message):
        from_transformers(unknown)


@pytest.mark.parametrize("name", ["gpt2", "neox", "phi3", "deepseek", "bert", "t5"])
def test_dropout_training_and_what_is_frozen_are_carried(name):
    layer = build(name).train().requires_grad_(False)
    random_state = torch.get_rng_state()
    ours = from_transformers(layer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert ours.training
    assert ours.dropout.p == {"t5": 0.1}.get(name, 0.125)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    to_transformers(ours.requires_grad_(True), layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    copies = [parameter.untyped_storage().data_ptr() for parameter in ours.parameters()]
    assert own.isdisjoint(copies)
    assert len(set(copies)) == len(copies)


def test_what_was_trained_here_runs_there():
    layer = build("neox")
    ours = from_transformers(layer)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    want = layer.query_key_value.weight * 1.5
    to_transformers(ours.fuse(), layer)
    assert ours.fused
    assert torch.equal(layer.query_key_value.weight, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"the mask of the layer .*causal\(\); got None"),
        ({"rope": ph.Rope(7.0)}, r"the rope of the layer .*theta=500.0.*; got Rope\(theta=7.0"),
        ({"scale": 0.5}, r"the scale of the layer .*0.35.*; got 0.5"),
        ({"softcap": 2.0}, r"the softcap of the layer .*None; got 2.0"),
        ({"num_heads": 2, "num_kv_heads": 2}, r"the num_heads of the layer .*6; got 2"),
        ({"qk_norm": nn.RMSNorm}, r"the qk_norm of the layer .*'None'; got 'RMSNorm"),
        ({"position_bias": nn.Identity()}, r"the position_bias .*'None'; got 'Identity"),
        ({"dropout": 0.5}, r"the dropout of the layer .*0.125; got 0.5"),
        ({"out_bias": True}, r"the layer has; o_proj.bias is in one"),
        ({"sinks": True}, r"layout llama has no place for sinks"),
        ({"output_gate": True}, r"layout llama has no place for W_gate.weight"),
        ({"dtype": torch.float32}, r"q_proj.weight must be torch.float64.*; got torch.float32"),
    ],
)
def test_a_layer_does_not_take_weights_for_another_function(change, message):
    layer = build("llama")
    before = copy.deepcopy(layer.state_dict())
    options = {
        "d_in": 42,
        "d_out": 42,
        "context_length": 37,
        "dropout": 0.125,
        "num_heads": H,
        "num_kv_heads": G,
        "head_dim": D,
        "out_bias": False,
        "rope": ph.Rope(THETA),
        "dtype": torch.float64,
    }
    to_transformers(ph.MultiHeadAttention(**options), copy.deepcopy(layer))
    with pytest.raises(ConversionError, match=message):
        to_transformers(ph.MultiHeadAttention(**{**options, **change}), layer)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_latent_heads_go_into_latent_layers_only():
    latent, plain = build("deepseek"), build("llama")
    with pytest.raises(
        ConversionError, match=r"must be a MultiHeadAttention .*got MultiHeadLatent"
    ):
        to_transformers(from_transformers(latent), plain)
    options = {**DEEPSEEK, "kv_lora_rank": 13, "rope_parameters": SEPARATE["rope_parameters"]}
    config = transformers.DeepseekV3Config(**options)
    other = modeling(CASES["deepseek"]).DeepseekV3Attention(config, 0)
    with pytest.raises(ConversionError, match=r"the kv_rank of the layer .*13; got 14"):
        to_transformers(from_transformers(latent), other)


def test_t5_s_later_layers_share_the_first_s_table():
    first, later = build("t5"), build("t5, no table")
    ours = [from_transformers(layer) for layer in (first, later)]
    ours[1].position_bias = ours[0].position_bias
    x = torch.randn(B, T, 42, dtype=torch.float64)
    with torch.no_grad():
        bias = first.compute_bias(T, T)
        positions = {"cache_position": torch.arange(T)} if IS_4 else {}
        want = later(x, position_bias=bias, **positions)[0]
        digits = 1e-5 if IS_4 else 1e-12
        torch.testing.assert_close(ours[1](x), want, rtol=digits, atol=digits)


def test_a_running_bloom_and_its_slopes():
    """Their slopes are powers in float32, ours are rounded to it once."""
    config = transformers.BloomConfig(
        vocab_size=31, hidden_size=H * D, n_head=H, n_layer=1, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.BloomModel(config).eval()
    seen = {}

    def remember(module, args, kwargs, output):
        seen["x"], seen["residual"], seen["y"] = args[0], args[1], output[0]

    layer = model.h[0].self_attention
    nn.init.normal_(layer.query_key_value.weight, std=0.3)
    layer.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(31, (B, T)))
        ours = from_transformers(layer)(seen["x"])
    torch.testing.assert_close(ours, seen["y"] - seen["residual"], rtol=1e-5, atol=1e-5)


def test_a_decoder_s_layer_that_does_not_say_whether_it_is_causal():
    """As in transformers 4, where self- and cross-attention are of one class."""
    layer = build("t5").train()
    layer.is_causal, layer.is_decoder = None, True
    with pytest.raises(ConversionError, match="a T5Attention of a decoder must say whether"):
        from_transformers(layer)
    layer.is_decoder = False
    assert from_transformers(layer).mask is None


def test_what_cannot_be_moved_says_why():
    gpt2 = modeling(CASES["gpt2"]).GPT2Attention
    config = transformers.GPT2Config(**SQUARE)
    with pytest.raises(ConversionError, match="attend to its own tokens; got one for cross"):
        from_transformers(gpt2(config, is_cross_attention=True, layer_idx=0))
    gemma = build("gemma2")
    gemma.config.use_bidirectional_attention = True
    with pytest.raises(ConversionError, match="use_bidirectional_attention must be off; got True"):
        from_transformers(gemma)
    bert = build("bert, alone")
    bert.position_embedding_type = "relative_key"
    with pytest.raises(ConversionError, match='must be "absolute"; got "relative_key"'):
        from_transformers(bert)
    neox = build("neox")
    neox.query_key_value = nn.Sequential(neox.query_key_value)
    with pytest.raises(ConversionError, match=r"query_key_value must be a plain nn\.Linear"):
        from_transformers(neox)
    bias = build("qwen3")
    bias.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConversionError, match="layout qwen3 has no place for extra; it holds k_"):
        from_transformers(bias)
