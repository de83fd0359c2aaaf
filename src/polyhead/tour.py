"""Tour (`polyhead run`): both mechanisms of the lecture on a real model, compared with float64."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.convert import from_transformers, split_to_stacked
from polyhead.errors import ArgumentError, ModelError
from polyhead.functional import explain
from polyhead.integrations import transformers
from polyhead.look import stats
from polyhead.models.load import load_model
from polyhead.models.text import NextToken, check_text, most_likely, read_ids
from polyhead.modules import MultiHeadAttention, MultiHeadAttentionWrapper

__all__ = ["HeadRow", "MechanismRow", "NextToken", "RunReport", "run"]

# The reference materializes T x S scores per head in float64, so longer texts are compared on
# their first tokens; statistics and next tokens always use the whole text.
COMPARED_TOKENS = 1024
_ROUNDS = 7


@dataclass(frozen=True)
class MechanismRow:
    """One mechanism's time in milliseconds, and its error against float64."""

    mechanism: str
    backend: str
    median_ms: float
    speedup: float  # over stacked heads
    largest_error: float
    difference: float  # the largest difference from the output of stacked heads
    query_weights: tuple[int, ...]  # shape; of stacked heads (H, head_dim, d_in)
    output: tuple[int, ...]  # shape


@dataclass(frozen=True)
class HeadRow:
    """Statistics of one head, averaged over the text: weight fractions, tokens, nats."""

    head: int
    mass_first: float
    mass_previous: float
    mass_self: float
    mean_distance: float
    entropy: float


@dataclass(frozen=True)
class RunReport:
    """Results of `polyhead run`."""

    model: str
    layer: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    tokens: int
    compared_tokens: int
    threads: int
    mechanisms: tuple[MechanismRow, ...]
    heads: tuple[HeadRow, ...]
    next_polyhead: tuple[NextToken, ...]  # polyhead in every layer
    next_own: tuple[NextToken, ...]  # the model's own attention


@torch.no_grad()
def run(
    text: str,
    *,
    model: str | None = None,
    layer: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> RunReport:
    """Compute one layer of a model on a text by both mechanisms, and its next tokens by polyhead.

    Args:
        text: input text.
        model: a folder, a GGUF file or a hub id; None: SmolLM2-135M-Instruct from its package.
        layer: index of the attention layer, from 0; None: the middle one.
        progress: called with a line of text before each long step.

    Raises:
        ArgumentError: the text is empty or too long, or the layer does not exist.
        ModelError, DependencyError, ConversionError: the model cannot be read or converted.
    """
    check_text(text)
    progress("loading the model")
    check = None if layer is None else functools.partial(_check_layer, layer)
    loaded = load_model(model, before_weights=check)
    layers = _attention_layers(loaded.model)
    if layer is not None:
        _check_layer(layer, loaded.model)
    layer = len(layers) // 2 if layer is None else layer
    mha = from_transformers(layers[layer]).eval()
    if not isinstance(mha, MultiHeadAttention):
        raise ModelError(
            f"{loaded.name} must have heads that can be stacked; got {type(mha).__name__}, whose "
            "keys and values share a latent; choose a decoder such as Llama, Mistral or Qwen2"
        )
    ids = read_ids(text, loaded, mha.context_length)
    progress("reading the text with the model's own attention")
    hidden, own_logits = _hidden_states(loaded.model, layers[layer], ids)
    progress("reading the text with polyhead in every layer")
    with _attention_of(loaded.model, "polyhead"):
        logits = loaded.model(ids, use_cache=False, logits_to_keep=1).logits
    progress("comparing the mechanisms")
    return RunReport(
        model=loaded.name,
        layer=layer,
        num_layers=len(layers),
        num_heads=mha.num_heads,
        num_kv_heads=mha.num_kv_heads,
        tokens=ids.shape[1],
        compared_tokens=min(ids.shape[1], COMPARED_TOKENS),
        threads=torch.get_num_threads(),
        mechanisms=compare_mechanisms(mha, hidden[:, :COMPARED_TOKENS]),
        heads=_head_rows(mha, hidden),
        next_polyhead=most_likely(logits, loaded.tokenizer),
        next_own=most_likely(own_logits, loaded.tokenizer),
    )


@torch.no_grad()
def compare_mechanisms(mha: MultiHeadAttention, x: Tensor) -> tuple[MechanismRow, ...]:
    """Compare stacked heads, weight split and the best backend on one input, timed round-robin.

    Args:
        mha: weight-split module; stacked heads are converted from it.
        x: (B, T, d_in).
    """
    reference = copy.deepcopy(mha)
    reference.backend = "reference"
    exact = copy.deepcopy(reference).double()
    expected = exact(x.double())
    query, key, value = mha.project_qkv(x)
    chosen = explain(query, key, value, mask=mha.mask, scale=mha.scale, backend=mha.backend).chosen
    candidates: list[tuple[str, str, MultiHeadAttention | MultiHeadAttentionWrapper]] = [
        ("stacked heads (3.6.1)", "reference", split_to_stacked(reference)),
        ("weight split (3.6.2)", "reference", reference),
        ("weight split, best backend", str(chosen), mha),
    ]
    outputs = [module(x).double() for _, _, module in candidates]
    medians = _interleaved_medians([module for _, _, module in candidates], x)
    return tuple(
        MechanismRow(
            mechanism,
            backend,
            1e3 * median,
            medians[0] / median,
            (output - expected).abs().max().item(),
            (output - outputs[0]).abs().max().item(),
            _query_weights(module),
            tuple(output.shape),
        )
        for (mechanism, backend, module), median, output in zip(
            candidates, medians, outputs, strict=True
        )
    )


def _query_weights(module: MultiHeadAttention | MultiHeadAttentionWrapper) -> tuple[int, ...]:
    if isinstance(module, MultiHeadAttention):
        return (module.num_heads * module.head_dim, module.d_in)
    head: Any = module.heads[0]
    return (module.num_heads, head.d_out, head.d_in)


def _interleaved_medians(modules: list[Any], x: Tensor) -> list[float]:
    """Median seconds of each module, measured round-robin, so that load affects all of them."""
    seconds: list[list[float]] = [[] for _ in modules]
    for _ in range(_ROUNDS):
        for module, measured in zip(modules, seconds, strict=True):
            start = time.perf_counter()
            module(x)
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]


def _check_layer(layer: int, model: nn.Module) -> None:
    most = len(_attention_layers(model)) - 1
    if not 0 <= layer <= most:
        raise ArgumentError("layer", f"must be from 0 to {most}", layer, "choose one of these")


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
    ]
    if not layers:
        raise ModelError(
            f"the model must have attention layers of transformers' kind; got "
            f"{type(model).__name__}; choose a decoder such as Llama, Mistral or Qwen2"
        )
    return layers


def _hidden_states(model: Any, layer: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of the attention layer, (1, T, d_in), and the last logits (1, 1, vocab)."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
    finally:
        handle.remove()
    return seen[0], logits


@contextmanager
def _attention_of(model: Any, name: str) -> Iterator[None]:
    """Switch the attention implementation of a model temporarily."""
    transformers.register()
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _head_rows(mha: MultiHeadAttention, hidden: Tensor) -> tuple[HeadRow, ...]:
    query, key, _ = mha.project_qkv(hidden)
    means = stats(query, key, mask=mha.mask, scale=mha.scale).per_head()
    names = ("mass_first", "mass_previous", "mass_self", "mean_distance", "entropy")
    return tuple(
        HeadRow(h, *(means[name][h].item() for name in names)) for h in range(mha.num_heads)
    )
