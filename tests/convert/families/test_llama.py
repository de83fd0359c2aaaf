"""Llama's layout inside running models, with every kind of rope."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.convert import from_transformers
from polyhead.errors import ConversionError
from polyhead.positions import LinearScaling

transformers = pytest.importorskip("transformers")

T, WINDOW = 11, 4
SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 37,
    "attention_dropout": 0.125,
}
MODELS = {
    "llama": ("Llama", {"head_dim": 8}),
    "llama with bias": ("Llama", {"head_dim": 8, "attention_bias": True}),
    "llama, other theta": ("Llama", {"head_dim": 8, "rope_theta": 500.0}),
    "mistral with a window": ("Mistral", {"head_dim": 8, "sliding_window": WINDOW}),
    "mistral without": ("Mistral", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with a window": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,  # layer 0 is full, layer 1 slides
        },
    ),
}

# Where a scaling grows with the text, its context is shorter than the T tokens of the tests.
SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 30},
    "yarn, all said": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 300,
        "beta_fast": 9.0,
        "beta_slow": 0.5,
        "attention_factor": 1.5,
        "mscale": 2.0,  # without effect beside attention_factor
        "mscale_all_dim": 3.0,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 30,
        "mscale": 2.0,
        "mscale_all_dim": 5.0,
    },
    "yarn, one mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 30,
        "mscale": 2.0,  # without effect alone
    },
    "yarn, factor by the contexts": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 2,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 20,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 4,
    },
    "longrope, all said": {
        "rope_type": "longrope",
        "factor": 3.0,
        "attention_factor": 1.2,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 20,
    },
}
for kind, rope_parameters in SCALED.items():
    MODELS[f"llama, {kind}"] = (
        "Llama",
        {
            "head_dim": 8,
            "max_position_embeddings": 8 if "dynamic" in kind else 37,
            "rope_parameters": {**rope_parameters, "rope_theta": 500.0},
        },
    )
PLAIN = [name for name in MODELS if name.removeprefix("llama, ") not in SCALED]


def build(name, **more):
    family, options = MODELS[name]
    options = {**SIZES, **options, **more}
    if "rope_theta" in options:
        options["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": options.pop("rope_theta"),
        }
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}Model")._from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.shape != (options["hidden_size"],):
            nn.init.normal_(parameter)  # biases, which start at zero
    return model


@pytest.mark.parametrize("implementation", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_llama_same_output_in_a_running_model(name, implementation, is_transformers_4):
    if is_transformers_4 and name == "llama, yarn, factor by the contexts":
        pytest.skip("transformers 4 wants a factor")
    model = build(name, attn_implementation=implementation)
    layers = [layer.self_attn for layer in model.layers]
    seen = []

    def remember(module, args, kwargs, output):
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    for layer in layers:
        layer.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        model(torch.randint(31, (2, T)))
        for layer, (x, y) in zip(layers, seen, strict=True):
            torch.testing.assert_close(from_transformers(layer)(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_llama_same_output_in_float64(name):
    """Computed here, because transformers computes angles in float32 for any dtype."""
    model = build(name, attn_implementation="sdpa").double()
    layer = model.layers[1].self_attn
    head_dim, x = layer.head_dim, torch.randn(2, T, layer.q_proj.in_features).double()
    theta = 500.0 if "theta" in name else 10_000.0
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.arange(T, dtype=torch.float64)[:, None] / theta**steps
    angles = torch.cat([angles, angles], dim=-1)[None].expand(2, -1, -1)
    query, key = torch.arange(T)[:, None], torch.arange(T)
    window = WINDOW if "with a window" in name else T
    allowed = (key <= query) & (key > query - window)
    with torch.no_grad():
        expected, _ = layer(
            x,
            position_embeddings=(angles.cos(), angles.sin()),
            attention_mask=allowed.expand(2, 1, T, T),
        )
        got = from_transformers(layer)(x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_llama_options_are_kept_and_input_is_unchanged():
    layer = build("mistral with a window").layers[0].self_attn.train()
    layer.requires_grad_(False)
    random_state = torch.get_rng_state()
    mha = from_transformers(layer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (mha.num_heads, mha.num_kv_heads, mha.head_dim, mha.d_in) == (6, 2, 8, 24)
    assert (mha.context_length, mha.dropout.p, mha.training) == (37, 0.125, True)
    assert mha.mask == ph.mask.causal() & ph.mask.window(before=WINDOW - 1)
    assert not any(parameter.requires_grad for parameter in mha.parameters())
    assert torch.equal(mha.W_key.weight, layer.k_proj.weight)
    nn.init.zeros_(mha.W_key.weight)
    assert layer.k_proj.weight.any()


def test_llama_converted_layer_becomes_stacked_heads():
    layer = build("qwen2").layers[0].self_attn.eval()
    split = from_transformers(layer).double()
    x = torch.randn(2, T, 24, dtype=torch.float64)
    stacked = ph.convert.split_to_stacked(split)
    torch.testing.assert_close(stacked(x), split(x), rtol=0, atol=1e-11)


def test_llama_unknown_rope_raises():
    layer = build("llama").layers[0].self_attn
    layer.config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10_000.0}
    known = '"default", "linear", "dynamic", "yarn", "longrope", "llama3"'
    with pytest.raises(ConversionError, match=f'^rope of type {known} can .*; got "proportional"$'):
        from_transformers(layer)


@pytest.mark.parametrize(
    ("kind", "context_length"),
    [("linear", 92), ("dynamic", 20), ("yarn", 120), ("llama3", 160), ("longrope", 37)],
)
def test_llama_scaled_rope_extends_context_length(kind, context_length):
    layer = build(f"llama, {kind}").layers[0].self_attn
    assert from_transformers(layer).context_length == context_length


def test_llama_rope_options_of_transformers_4():
    layer = build("llama").layers[0].self_attn
    layer.config = SimpleNamespace(
        **{**SIZES, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    )
    want = ph.Rope(theta=500.0, scaling=LinearScaling(2.5))
    assert from_transformers(layer).rope == want
    layer.config.rope_scaling = None
    assert from_transformers(layer).rope == ph.Rope(theta=500.0)


def test_llama_adapter_raises():
    layer = build("llama").layers[0].self_attn
    layer.v_proj = nn.Sequential(layer.v_proj)
    with pytest.raises(ConversionError, match=r"v_proj must be a plain nn\.Linear.*Sequential"):
        from_transformers(layer)


def test_llama_requires_grad_is_kept():
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1
    )
    layer = transformers.models.llama.modeling_llama.LlamaAttention(config, layer_idx=0)
    layer.k_proj.requires_grad_(False)
    mha = from_transformers(layer)
    frozen = {name for name, parameter in mha.named_parameters() if not parameter.requires_grad}
    assert frozen == {"W_key.weight"}
