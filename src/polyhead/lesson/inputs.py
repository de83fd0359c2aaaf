"""What a lesson is of: tokens and their numbers, the lecture's or one's own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import ArgumentError, DtypeError, ShapeError

__all__ = ["LECTURE_TOKENS", "LECTURE_X", "MOST", "check_input", "check_size", "read_file", "words"]

LECTURE_TOKENS = ("Your", "journey", "starts", "with", "one", "step")
LECTURE_X = (
    (0.43, 0.15, 0.89),
    (0.55, 0.87, 0.66),
    (0.57, 0.85, 0.64),
    (0.22, 0.58, 0.33),
    (0.77, 0.25, 0.10),
    (0.05, 0.80, 0.55),
)
# A page shows every number, and stays one to read.
MOST = {"tokens": 12, "features": 4, "num_heads": 4, "d_out": 4}


def check_size(name: str, size: object) -> None:
    """Raise unless `size` is an integer from 1 to what the page can show."""
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MOST[name]:
        raise ShapeError(
            name, f"must be an integer from 1 to {MOST[name]}", repr(size), "choose one of these"
        )


def check_input(x: Any, tokens: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """x as (T, features) in float64, and a text for each token.

    Args:
        x: (T, features) numbers, a tensor or lists; None: the lecture's.
        tokens: T texts; None: the lecture's for its x, and the tokens' numbers for another.
    """
    if x is None and tokens is None:
        tokens = LECTURE_TOKENS
    numbers = _tensor(LECTURE_X if x is None else x)
    T, features = numbers.shape
    for name, size in (("tokens", T), ("features", features)):
        if not 1 <= size <= MOST[name]:
            raise ShapeError(
                "x", f"must have 1 to {MOST[name]} {name}", size, "cut it: every number is shown"
            )
    if not numbers.isfinite().all():
        raise ArgumentError("x", "must be finite", "nan or inf", "replace it")
    if tokens is None:
        tokens = [str(at) for at in range(T)]
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise DtypeError("tokens", "must be a list of strings", repr(tokens), "give one a token")
    if len(tokens) != T:
        raise ShapeError(
            "tokens", f"must be {T}, one for each row of x", len(tokens), "give one a row"
        )
    return numbers, tuple(tokens)


def _tensor(x: Any) -> Tensor:
    try:
        numbers = torch.as_tensor(x, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(
            "x", "must be numbers", f"{type(x).__name__} ({error})", "give rows of equal length"
        ) from error
    if numbers.ndim == 3 and numbers.shape[0] == 1:
        numbers = numbers[0]
    if numbers.ndim != 2:
        raise ShapeError(
            "x", "must be (tokens, features)", tuple(numbers.shape), "give one text's rows"
        )
    return numbers


def words(text: str, seed: int) -> tuple[Tensor, tuple[str, ...]]:
    """The words of a text, each with 3 numbers drawn for it: the same word has the same."""
    tokens = tuple(text.split())
    if not 1 <= len(tokens) <= MOST["tokens"]:
        raise ShapeError("--text", f"must have 1 to {MOST['tokens']} words", len(tokens), "cut it")
    generator = torch.Generator().manual_seed(seed)
    distinct = dict.fromkeys(tokens)
    drawn = torch.randint(0, 100, (len(distinct), 3), generator=generator).double() / 100
    row_of = dict(zip(distinct, drawn, strict=True))
    return torch.stack([row_of[token] for token in tokens]), tokens


def read_file(path: str | os.PathLike[str]) -> tuple[Any, list[str] | None]:
    """x and tokens of a JSON file: rows of numbers, or {"x": rows, "tokens": texts}."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(
            "--file", "must be JSON", f"{os.fspath(path)} ({error})", "write rows of numbers"
        ) from error
    rows = found.get("x") if isinstance(found, dict) else found
    extra = set(found) - {"x", "tokens"} if isinstance(found, dict) else set()
    if not isinstance(rows, list) or extra:
        raise ArgumentError(
            "--file",
            'must be rows of numbers, or {"x": rows, "tokens": texts}',
            f"{os.fspath(path)} with {', '.join(sorted(extra)) or type(rows).__name__}",
            "write [[0.43, 0.15], [0.55, 0.87]]",
        )
    return rows, found.get("tokens") if isinstance(found, dict) else None
