"""A text read by a model, with some of its heads switched off."""

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

# Called before each step with what it is and the share that is done; what it raises ends the work.
Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model made of a text.

    Attributes:
        report: what its heads did.
        next_token: (vocabulary,) the probability of each token to come next.
    """

    report: HeadReport
    next_token: Tensor


@dataclass(frozen=True)
class NextTokens:
    """One token that may come next, and how probable it is before and after a change."""

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
    """Read a text, and look at every head of the model while it does.

    Args:
        text: at least two tokens of it.
        loaded: the model; in one thread at a time.
        off: (layer, head) pairs that are switched off.
        how: as in `polyhead.look.ablate`.
        most: how many tokens are allowed; None: as many as the model's context.

    Raises:
        ArgumentError, ShapeError: the text is too short or too long, or there are no such heads.
    """
    ids = read_ids(text, loaded, most)
    if ids.shape[1] < 2:
        raise ShapeError(
            "TEXT", "must have at least 2 tokens, one to look at another", 1, "give more words"
        )
    transformers.register()
    logits: list[Tensor] = []
    with ExitStack() as stack:
        if off:
            stack.enter_context(ablate(loaded.model, off, how))
        stack.enter_context(_telling_layers(loaded.model, progress))
        keep = loaded.model.register_forward_hook(lambda *call: logits.append(call[-1].logits))
        stack.callback(keep.remove)
        report = capture(loaded.model, ids, tokens=token_texts(text, loaded))
    return Reading(replace(report, model=loaded.name), logits[-1][0, -1].softmax(dim=-1))


@contextmanager
def _telling_layers(model: Any, progress: Progress) -> Iterator[None]:
    """Call `progress` before each layer, for a while."""
    layers = attention_layers(model)
    with ExitStack() as stack:
        for layer in layers:
            step = f"reading: layer {layer.index + 1} of {len(layers)}"
            share = layer.index / len(layers)

            def tell(*_: Any, step: str = step, share: float = share) -> None:
                if is_probing():
                    progress("finding what each layer reads", 0.0)
                else:
                    progress(step, share)

            stack.callback(layer.module.register_forward_pre_hook(tell).remove)
        yield


def compare_next(
    before: Tensor, after: Tensor, tokenizer: Any, n: int = 8
) -> tuple[NextTokens, ...]:
    """The n most probable next tokens before and the n after, the most probable before first.

    Args:
        before, after: (vocabulary,) probabilities.
    """
    ids = {*before.topk(n).indices.tolist(), *after.topk(n).indices.tolist()}
    ranked = sorted(ids, key=lambda i: before[i].item(), reverse=True)
    return tuple(
        NextTokens(tokenizer.decode([i]), before[i].item(), after[i].item()) for i in ranked
    )
