"""Tokenized text: token ids, the text of each token, the most likely next tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, ShapeError
from polyhead.models.load import LoadedModel

__all__ = ["PART", "NextToken", "check_text", "most_likely", "read_ids", "token_texts"]

# Shown for all but the first of several tokens that encode one character.
PART = "⋯"


@dataclass(frozen=True)
class NextToken:
    text: str
    probability: float


def read_ids(text: str, loaded: LoadedModel, most: int | None = None) -> Tensor:
    """Return the token ids of a text, (1, T).

    Args:
        most: the most tokens allowed; None: the model's context, if it is known.

    Raises:
        ArgumentError, ShapeError: the text is empty or too long.
    """
    check_text(text)
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    ids = torch.tensor([loaded.tokenizer(text, verbose=False)["input_ids"]])
    limits = [limit for limit in (most, context) if limit is not None]
    if limits and ids.shape[1] > min(limits):
        why = f", the context of {loaded.name}" if min(limits) == context else ""
        rule = f"must have at most {min(limits)} tokens{why}"
        raise ShapeError("TEXT", rule, ids.shape[1], "shorten it")
    return ids


def check_text(text: str) -> None:
    """Raise ArgumentError for an empty or invalid text, before a model is loaded for it."""
    if not text.strip():
        raise ArgumentError("TEXT", "must not be empty", repr(text), "give some words to read")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of an argument, or half a character of JSON
        rule = "must be whole characters of Unicode"
        got = f"{text[error.start]!r} at {error.start}"
        raise ArgumentError("TEXT", rule, got, "give it as UTF-8") from error


def token_texts(text: str, loaded: LoadedModel) -> tuple[str, ...]:
    """Return the text of each token; concatenated they are the text.

    A token without text, such as a start of sentence, has its name. If several tokens encode one
    character, the first has the character and the others have `PART`.
    """
    tokenizer = loaded.tokenizer
    if not tokenizer.is_fast:  # without offsets
        return tuple(tokenizer.decode([i]) for i in tokenizer(text, verbose=False)["input_ids"])
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    shown = []
    done = 0
    for token, (start, stop) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if start == stop:
            part = tokenizer.decode([token])
            shown.append(part)
            if part.isspace() and text.startswith(part, done):  # its offsets were trimmed
                done += len(part)
        elif stop <= done:
            shown.append(PART)
        else:  # from the end of the last one, as some tokenizers leave out spaces
            shown.append(text[done:stop])
            done = stop
    return tuple(shown)


def most_likely(logits: Tensor, tokenizer: Any, n: int = 3) -> tuple[NextToken, ...]:
    """Return the n most likely next tokens.

    Args:
        logits: (1, T, vocabulary); those of the last token are used.
    """
    probabilities, ids = logits[0, -1].softmax(dim=-1).topk(n)
    return tuple(
        NextToken(tokenizer.decode([i]), p)
        for p, i in zip(probabilities.tolist(), ids.tolist(), strict=True)
    )
