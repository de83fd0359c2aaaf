"""Configurations of constructors: classes are found, sizes are guessed."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from polyhead.check.probe.configurations import Config, configurations, is_configuration
from polyhead.check.probe.target import build, load
from polyhead.errors import ArgumentError

SOURCE = """
from dataclasses import dataclass
from torch import nn

@dataclass
class ModelArgs:
    dim: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    norm_eps: float = 1e-5

class Annotated(nn.Module):
    def __init__(self, args: "ModelArgs"):
        super().__init__()
        self.args = args

class Bare(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.args = config

class Dict(nn.Module):
    def __init__(self, cfg: dict):
        super().__init__()
        self.size = cfg["emb_dim"] + cfg.get("nothing", 0) + ("n_heads" in cfg)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "configured.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("name", ["Annotated", "Bare"])
def test_configuration_class_from_annotation_or_file(file, name):
    """Sizes are guessed; other values, and None, keep their defaults."""
    parameter = "args" if name == "Annotated" else "config"
    module, guessed, _ = build(load(f"{file}:{name}"), {f"{parameter}.n_heads": 3})
    assert dataclasses.asdict(module.args) == {
        "dim": 48,
        "n_heads": 3,
        "n_kv_heads": None,
        "norm_eps": 1e-5,
    }
    assert guessed == {parameter: "ModelArgs(n_heads=3, dim=48)"}


def test_stand_in_configuration_is_an_object_and_a_dict(file):
    assert build(load(f"{file}:Dict"), {})[0].size == 49
    assert Config(n_embd=3).n_embd == 3


@pytest.mark.parametrize("name", ["config", "cfg", "model_args", "vision_config", "hparams"])
def test_is_configuration_accepts_usual_names(name):
    assert is_configuration(name)


def test_is_configuration_rejects_other_names():
    assert not any(is_configuration(name) for name in ("arguments_of_x", "conv", "reconfigure"))


def test_arg_before_the_dot_must_be_a_configuration(file):
    with pytest.raises(ArgumentError, match=r"must name a parameter of Bare: config; got cfg\.dim"):
        build(load(f"{file}:Bare"), {"cfg.dim": 3})


def layer(name, **given):
    pytest.importorskip("transformers")
    return build(load(f"transformers.models.{name}"), given)


def test_transformers_configuration_has_guessed_sizes():
    module, guessed, make = layer("llama.modeling_llama:LlamaAttention", layer_idx=0)
    config = module.config
    assert type(config).__name__ == "LlamaConfig"
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (
        64,
        4,
        2,
    )
    assert guessed["config"].startswith("LlamaConfig(hidden_size=64, num_attention_heads=4, ")
    assert make() is not module


def test_configuration_value_overrides_a_guess():
    module = layer("mistral.modeling_mistral:MistralAttention", **{"config.sliding_window": 7})[0]
    assert module.config.sliding_window == 7
    with pytest.raises(ArgumentError, match=r"config\.windo must be an attribute of MistralConfig"):
        layer("mistral.modeling_mistral:MistralAttention", **{"config.windo": 7})


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2.modeling_gpt2:GPT2Attention", "GPT2Config"),  # not annotated
        ("clip.modeling_clip:CLIPAttention", "CLIPVisionConfig"),  # one of two
        ("whisper.modeling_whisper:WhisperAttention", "WhisperConfig"),  # optional
        ("deepseek_v3.modeling_deepseek_v3:DeepseekV3Attention", "DeepseekV3Config"),
        ("nemotron.modeling_nemotron:NemotronAttention", "NemotronConfig"),  # None for KV heads
        ("modernbert.modeling_modernbert:ModernBertAttention", "ModernBertConfig"),
        ("swin.modeling_swin:SwinAttention", "SwinConfig"),
        ("idefics.modeling_idefics:IdeficsAttention", "IdeficsConfig"),
    ],
)
def test_transformers_layers_are_constructed(name, config):
    module, guessed, _ = layer(name)
    assert guessed["config"].startswith(config)
    assert all(p.isfinite().all() for p in module.parameters())


def test_parameters_left_to_the_model_are_initialized():
    """Sinks are initialized by GptOssPreTrainedModel, not by the layer."""
    module, _, make = layer("gpt_oss.modeling_gpt_oss:GptOssAttention")
    assert module.sinks.isfinite().all()
    torch.manual_seed(3)
    first = make().sinks
    torch.manual_seed(3)
    assert torch.equal(first, make().sinks)


class Unfilled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3))


def test_uninitialized_parameters_are_nan():
    """NaN instead of arbitrary memory: the same seed gives the same report."""
    assert build(Unfilled, {})[0].weight.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_class_with_unknown_required_argument_is_skipped():
    class Config:
        def __init__(self, shape_of_things):
            raise AssertionError

    def make(config: Config):
        """Takes one."""

    parameter = inspect.signature(make).parameters["config"]
    assert [words for _, words in configurations(make, parameter, {})] == [
        "an object with the usual names for sizes"
    ]
