"""Axes of the input, found by trying: tokens first, a fixed number of tokens, a single row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from polyhead.check.law import NotApplicable, first_line
from polyhead.check.probe.transformers import is_transformers_own
from polyhead.check.subject import Subject, difference
from polyhead.errors import ArgumentError

__all__ = ["find_axes"]


def find_axes(subject: Subject) -> None:
    """Find the token axis, and a fixed number of tokens if there is one.

    Raises:
        ArgumentError: a layer of transformers takes one row only.
    """
    _turn(subject)
    _fix_length(subject)
    _need_rows(subject)


def _turn(subject: Subject) -> None:
    """Put tokens first if the module expects that: if batch rows influence each other and tokens
    of a row do not, and the reverse holds once they are transposed.
    """
    calling = subject.calling
    told = calling.style == "yours" or hasattr(subject.module, "batch_first")
    if told or not calling.batch_first or _across(subject) != (True, False):
        return
    subject.calling = replace(calling, batch_first=False, told="tokens first")
    if _across(subject) == (False, True):
        subject.claims.how["layout"] = "(tokens, batch, features), found by trying"
    else:
        subject.calling = calling


def _across(subject: Subject) -> tuple[bool, bool]:
    """True if a token's output depends on another batch row; and on another token of its row."""
    x, other = subject.input(2), subject.input(2, salt=1)
    row, token = x.clone(), x.clone()
    row[0], token[:, 0] = other[0], other[:, 0]
    try:
        before, by_row, by_token = (subject.run(tokens) for tokens in (x, row, token))
    except Exception:  # of unknown code
        return False, False
    rounding = subject.allowed(x)
    rows = difference(by_row, before)[1].max() > rounding
    tokens = difference(by_token, before)[:, 1:].max() > rounding
    return bool(rows), bool(tokens)


def _need_rows(subject: Subject) -> None:
    """Require two rows: a layer of transformers that takes only one was called wrongly."""
    if not is_transformers_own(subject.module):
        return
    try:
        subject.run(subject.input(2))
    except Exception as error:  # of unknown code
        raise ArgumentError(
            "call",
            "must be given for a layer that accepts one row, but not two",
            f"{type(error).__name__}: {first_line(error)}",
            "pass, in Python, call=lambda module, x: ...",
        ) from error


def _fix_length(subject: Subject) -> None:
    """Exclude other lengths from all laws if the module accepts one only, as image windows do."""
    T = subject.T
    if "tokens" not in subject.claims.how or any(
        subject.takes(n) for n in (1, T - 1, T + 1, 2 * T)
    ):
        return
    run = subject.calling.run

    def only(module: nn.Module, x: Tensor, keywords: dict[str, Any]) -> Any:
        tokens = x.shape[1 if subject.calling.batch_first else 0]
        if tokens != T:
            raise NotApplicable(f"it accepts {T} tokens only")
        return run(module, x, keywords)

    subject.calling = replace(subject.calling, run=only)
    subject.claims.window = None
    subject.claims.how["tokens"] = f"{T} only ({subject.claims.how['tokens']})"
