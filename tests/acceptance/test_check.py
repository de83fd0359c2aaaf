"""polyhead check has no false alarms: right attentions of many styles pass."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.check import check_module
from polyhead.check.probe.target import build, load

RIGHT = Path(__file__).parents[1] / "check/right"


def styles(file):
    """Modules defined in one of the files of right attentions, by name."""
    found = load(f"{RIGHT / file}.py:__dict__")
    kinds = {n: k for n, k in found.items() if inspect.isclass(k) and n[0] != "_"}
    own = {n: k for n, k in kinds.items() if k.__module__ == found["__name__"]}
    return {n: k for n, k in own.items() if issubclass(k, nn.Module)}


def ours(**options):
    return ph.MultiHeadAttention(20, 20, context_length=24, dropout=0.1, num_heads=4, **options)


def layer(name, kind=None, **options):
    """Attention of a tiny random model of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "intermediate_size": 16,
    }
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    config._attn_implementation = "sdpa"
    source = inspect.getmodule(getattr(transformers, f"{name}Model"))
    kind = getattr(source, kind or KINDS.get(name, f"{name}Attention"))
    indexed = "layer_idx" in inspect.signature(kind).parameters
    return kind(config, **({"layer_idx": 0} if indexed else {}))


KINDS = {"Bert": "BertSelfAttention"}


MLA = {
    "kv_rank": 6,
    "nope_head_dim": 4,
    "rope_head_dim": 2,
    "value_head_dim": 5,
    "rope": ph.Rope(interleaved=True),
}
GEMMA3 = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

CASES = {
    **{
        name: (lambda kind=kind: build(kind, {})[0], getattr(kind, "flags", {}))
        for file in ("styles", "others", "teaching", "around")
        for name, kind in styles(file).items()
    },
    "nn.MultiheadAttention": (partial(nn.MultiheadAttention, 20, 4, batch_first=True), {}),
    "nn.MultiheadAttention, causal": (
        partial(nn.MultiheadAttention, 20, 4, batch_first=True, dropout=0.1),
        {"causal": True},
    ),
    "nn.MultiheadAttention, tokens first": (partial(nn.MultiheadAttention, 20, 4), {}),
    "polyhead": (ours, {}),
    "polyhead, one head": (partial(ph.CausalAttention, 10, 6, 24, 0.1), {}),
    "polyhead, stacked": (
        partial(ph.MultiHeadAttentionWrapper, 10, 6, 24, 0.1, 3, out_proj=True),
        {},
    ),
    "polyhead, encoder": (partial(ours, mask=None), {}),
    "polyhead, grouped, rope, norms": (
        partial(ours, num_kv_heads=2, head_dim=6, rope=ph.Rope(), qk_norm=nn.RMSNorm),
        {},
    ),
    "polyhead, window": (
        partial(ours, mask=ph.mask.causal() & ph.mask.window(before=3)),
        {"window": 4},
    ),
    "polyhead, sinks, softcap": (partial(ours, sinks=True, softcap=5.0), {}),
    "polyhead, alibi, gate": (partial(ours, alibi=True, output_gate=True), {}),
    "polyhead, fused": (lambda: ours().fuse(), {}),
    "polyhead, latent": (partial(ph.MultiHeadLatentAttention, 20, 20, 24, 0.1, 4, **MLA), {}),
    "Llama": (partial(layer, "Llama", **GROUPED), {}),
    "Mistral, window": (partial(layer, "Mistral", sliding_window=4, **GROUPED), {}),
    "Qwen3": (partial(layer, "Qwen3", **GROUPED), {}),
    "GPT2": (partial(layer, "GPT2"), {}),
    "Bert": (partial(layer, "Bert"), {"causal": False}),
    "Bert, with its norm": (partial(layer, "Bert", kind="BertAttention"), {"causal": False}),
    "Olmo2, norms over all heads": (partial(layer, "Olmo2", num_key_value_heads=2), {}),
    "Phi3": (partial(layer, "Phi3", num_key_value_heads=2, pad_token_id=0), {}),
    "GPT-NeoX": (partial(layer, "GPTNeoX"), {}),
    "Gemma3, window": (partial(layer, "Gemma3Text", kind="Gemma3Attention", **GEMMA3), {}),
    "ViT": (partial(layer, "ViT"), {}),
}


def checked(name, seed):
    make, flags = CASES[name]
    torch.manual_seed(seed)
    return check_module(make(), seed=seed, **flags)


QUICK = [name for name in CASES if name != "Flex"]  # compiles for seconds


# Two seeds, round-robin; 20 seeds each in the slow test.
@pytest.mark.parametrize(("name", "seed"), [(name, i % 2) for i, name in enumerate(QUICK)])
def test_right_attention_passes(name, seed):
    report = checked(name, seed)
    assert report.ok, report


def test_enough_right_attentions():
    assert len(CASES) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_right_attention_passes_for_any_seed(name):
    for seed in range(20):
        report = checked(name, seed)
        assert report.ok, report
