"""Attention layers of transformers from the command line: right ones pass."""

import json

import pytest
from click.testing import CliRunner

from polyhead.check.probe.target import build, load
from polyhead.check.probe.transformers import scale_of_its_class
from polyhead.cli import main

pytest.importorskip("transformers")

# One per kind: rotary, learned and no positions, ALiBi, windows, sinks, latent keys, QK norms;
# fused, grouped and interleaved weights; encoders, decoders, cross attention.
RIGHT = [
    "llama:LlamaAttention",
    "mistral:MistralAttention",
    "qwen3:Qwen3Attention",
    "gemma2:Gemma2Attention",
    "gemma3:Gemma3Attention",
    "gpt2:GPT2Attention",
    "gpt_neox:GPTNeoXAttention",
    "codegen:CodeGenAttention",
    "falcon:FalconAttention",
    "bloom:BloomAttention",
    "opt:OPTAttention",
    "phi:PhiAttention",
    "phi3:Phi3Attention",
    "bert:BertSelfAttention",
    "bert:BertCrossAttention",
    "roberta:RobertaAttention",
    "vit:ViTAttention",
    "clip:CLIPAttention",
    "mpt:MptAttention",
    "modernbert:ModernBertAttention",
    "swin:SwinAttention",
    "whisper:WhisperAttention",
    "gpt_oss:GptOssAttention",
    "olmo2:Olmo2Attention",
    "cohere:CohereAttention",
    "deepseek_v3:DeepseekV3Attention",
    "stablelm:StableLmAttention",
    "mllama:MllamaTextCrossAttention",
    "deberta_v2:DisentangledSelfAttention",
    "idefics:IdeficsAttention",
    "nemotron:NemotronAttention",
    "bridgetower:BridgeTowerResidualAttention",
    "gpt_neo:GPTNeoAttention",
    "t5:T5LayerSelfAttention",
]
QUICK = ["llama:LlamaAttention", "mpt:MptAttention", "swin:SwinAttention", "bloom:BloomAttention"]


def check(target, *args):
    result = CliRunner().invoke(main, ["check", target, "--json", *args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, json.loads(result.stdout)


def of(name):
    return f"transformers.models.{name.replace(':', '.modeling_' + name.split(':')[0] + ':')}"


def broken(report):
    return {law["law"]: law["message"] for law in report["laws"] if law["verdict"] == "broken"}


@pytest.mark.parametrize("name", QUICK)
def test_transformers_layer_breaks_no_law(name):
    code, report = check(of(name))
    assert code == 0, broken(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RIGHT if name not in QUICK])
def test_transformers_layers_of_every_kind_break_no_law(name):
    code, report = check(of(name))
    assert code == 0, broken(report)
    assert sum(law["seconds"] for law in report["laws"]) < 60


@pytest.mark.parametrize(
    ("name", "args", "mask"),
    [
        ("t5:T5Attention", ["is_causal=True"], "mask, form full, added to the scores"),
        ("longt5:LongT5Attention", ["is_causal=True"], "mask, form full, added"),
        ("mpt:MptAttention", [], "attention_mask, form full, True means ignore"),
        (
            "deberta_v2:DisentangledSelfAttention",
            [],
            "attention_mask, form full, True means attend",
        ),
        ("swin:SwinAttention", [], "attention_mask, form batch, added to the scores"),
        ("modernbert:ModernBertAttention", ["layer_idx=1"], "attention_mask, form full, added"),
    ],
)
def test_transformers_mask_is_found_by_trying(name, args, mask):
    pairs = [word for pair in args for word in ("--arg", pair)]
    laws = ["past_is_used", "hidden_tokens_have_no_influence", "shown_tokens_keep_their_influence"]
    code, report = check(of(name), *pairs, *(word for law in laws for word in ("--only", law)))
    assert code == 0, broken(report)
    assert report["facts"]["mask"].startswith(mask)
    assert [law["verdict"] for law in report["laws"]] == ["holds"] * 3


def test_transformers_two_sided_window_is_passed():
    target = of("modernbert:ModernBertAttention")
    code, report = check(target, "--arg", "layer_idx=1", "--only", "past_is_used")
    assert code == 0, broken(report)
    fact = "5 (attribute sliding_window; the check passes the mask as attention_mask=)"
    assert report["facts"]["window"] == fact


def test_transformers_alibi_comes_from_its_model():
    _, report = check(of("bloom:BloomAttention"), "--only", "output_matches_reference")
    assert report["facts"]["called as"] == "transformers with alibi=its model computes"
    assert [law["verdict"] for law in report["laws"]] == ["holds"]


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("gpt_neo.modeling_gpt_neo:GPTNeoAttention", (1.0, "its code has no scale")),
        ("t5.modeling_t5:T5LayerSelfAttention", (1.0, "attribute scaling")),
        ("gpt2.modeling_gpt2:GPT2Attention", (0.25, "attribute scaling")),
        ("bert.modeling_bert:BertAttention", (0.25, "attribute scaling")),
    ],
)
def test_scale_comes_from_a_layer_or_one_inside_it(name, scale):
    assert scale_of_its_class(build(load(f"transformers.models.{name}"), {})[0]) == scale


def test_fixed_number_of_tokens_is_reported():
    """An image window has 16 tokens; no law is judged with another number."""
    _, report = check(of("swin:SwinAttention"), "--only", "odd_sizes_run")
    assert report["facts"]["tokens"].startswith("16 only")
    assert [law["verdict"] for law in report["laws"]] == ["not applicable"]


def test_long_window_is_checked_quickly():
    name = of("mistral:MistralAttention")
    laws = ("window_counts_its_tokens", "calls_are_stateless")
    only = [word for law in laws for word in ("--only", law)]
    code, report = check(name, "--arg", "config.sliding_window=4096", *only)
    assert code == 0
    assert "its window of 4096 is long" in report["laws"][0]["message"]
    assert sum(law["seconds"] for law in report["laws"]) < 15


CHANGED = """
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention

class NoMask(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None,
                past_key_values=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, None, past_key_values)

class Right(GPT2Attention):
    pass

class MaskIgnoredByKeysOnly(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None,
                past_key_values=None, **kwargs):
        if attention_mask is not None:
            attention_mask = attention_mask.mT
        return super().forward(hidden_states, position_embeddings, attention_mask)
"""


@pytest.mark.parametrize(
    ("name", "code"), [("NoMask", 1), ("Right", 0), ("MaskIgnoredByKeysOnly", 1)]
)
def test_subclasses_of_transformers_layers_are_judged(tmp_path, name, code):
    (tmp_path / "changed.py").write_text(CHANGED)
    laws = ("no_future_leak", "past_is_used", "hidden_tokens_have_no_influence")
    only = [word for law in laws for word in ("--only", law)]
    found, report = check(f"{tmp_path / 'changed.py'}:{name}", *only)
    assert found == code, report
