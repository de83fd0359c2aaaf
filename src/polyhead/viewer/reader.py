"""Reading a text with a model, optionally with some heads switched off."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ShapeError
from polyhead.integrations import transformers
from polyhead.look import HeadReport, ablate, attention_layers, capture
from polyhead.look.ablate import How
from polyhead.look.layers import Head
from polyhead.look.sources import is_probing
from polyhead.models.load import LoadedModel
from polyhead.models.text import read_ids, token_texts

__all__ = ["NextTokens", "Progress", "Reading", "compare_next", "read"]

# Called before each step with its description and the fraction done; an exception ends the work.
Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Reading:
    """Result of reading a text.

    Attributes:
        report: the per-head report.
        next_token: (vocabulary,) the probability of each next token.
    """

    report: HeadReport
    next_token: Tensor


@dataclass(frozen=True)
class NextTokens:
    """A next-token candidate, and its probability before and after a change."""

    text: str
    before: float
    after: float


@torch.no_grad()
def read(
    text: str,
    loaded: LoadedModel,
    *,
    off: Collection[Head] = (),
    how: How = "zero",
    most: int | None = None,
    progress: Progress = lambda step, share: None,
) -> Reading:
    """Read a text with a model and capture all of its heads.

    Args:
        text: a text of at least two tokens.
        loaded: the model; used by one thread at a time.
        off: (layer, head) pairs that are switched off.
        how: as in `polyhead.look.ablate`.
        most: the most tokens allowed; None: the model's context length.

    Raises:
        ArgumentError, ShapeError: the text is too short or too long, or there are no such heads.
    """
    ids = read_ids(text, loaded, most)
    if ids.shape[1] < 2:
        raise ShapeError(
            "TEXT", "must have at least 2 tokens, one to attend to another", 1, "give more words"
        )
    transformers.register()
    logits: list[Tensor] = []
    with ExitStack() as stack:
        if off:
            stack.enter_context(ablate(loaded.model, off, how))
        stack.enter_context(_reporting_layers(loaded.model, progress))
        keep = loaded.model.register_forward_hook(lambda *call: logits.append(call[-1].logits))
        stack.callback(keep.remove)
        report = capture(loaded.model, ids, tokens=token_texts(text, loaded))
    return Reading(replace(report, model=loaded.name), logits[-1][0, -1].softmax(dim=-1))


@contextmanager
def _reporting_layers(model: Any, progress: Progress) -> Iterator[None]:
    """Call `progress` before each layer within the block."""
    layers = attention_layers(model)
    with ExitStack() as stack:
        for layer in layers:
            step = f"reading: layer {layer.index + 1} of {len(layers)}"
            share = layer.index / len(layers)

            def report_step(*_: Any, step: str = step, share: float = share) -> None:
                if is_probing():
                    progress("finding what each layer reads", 0.0)
                else:
                    progress(step, share)

            stack.callback(layer.module.register_forward_pre_hook(report_step).remove)
        yield


def compare_next(
    before: Tensor, after: Tensor, tokenizer: Any, n: int = 8
) -> tuple[NextTokens, ...]:
    """Return the union of the n most probable tokens before and after, sorted by `before`.

    Args:
        before, after: (vocabulary,) probabilities.
    """
    ids = {*before.topk(n).indices.tolist(), *after.topk(n).indices.tolist()}
    ranked = sorted(ids, key=lambda i: before[i].item(), reverse=True)
    return tuple(
        NextTokens(tokenizer.decode([i]), before[i].item(), after[i].item()) for i in ranked
    )
