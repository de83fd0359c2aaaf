"""polyhead check cries no wolf: right attentions of many styles pass."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.check import check_module
from polyhead.check.target import build, load

STYLES = load(f"{Path(__file__).parents[1] / 'check/right/styles'}.py:__dict__")


def ours(**options):
    return ph.MultiHeadAttention(20, 20, context_length=24, dropout=0.1, num_heads=4, **options)


def layer(name, **options):
    """The attention of a tiny random model of transformers."""
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
    kind = source.BertSelfAttention if name == "Bert" else getattr(source, f"{name}Attention")
    return kind(config, layer_idx=0)


MLA = {
    "kv_rank": 6,
    "nope_head_dim": 4,
    "rope_head_dim": 2,
    "value_head_dim": 5,
    "rope": ph.Rope(interleaved=True),
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}

CASES = {
    **{
        name: (lambda kind=kind: build(kind, {})[0], getattr(kind, "flags", {}))
        for name, kind in STYLES.items()
        if inspect.isclass(kind) and kind.__module__ == STYLES["__name__"]
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
}


def checked(name, seed):
    make, flags = CASES[name]
    torch.manual_seed(seed)
    return check_module(make(), seed=seed, **flags)


QUICK = [name for name in CASES if name != "Flex"]  # it compiles for seconds


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", QUICK)
def test_right_attention_passes(name, seed):
    report = checked(name, seed)
    assert report.ok, report


def test_there_are_enough_of_them():
    assert len(CASES) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_right_attention_passes_whatever_the_seed(name):
    for seed in range(20):
        report = checked(name, seed)
        assert report.ok, report
