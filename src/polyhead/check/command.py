"""`polyhead check` without its options and output."""

from __future__ import annotations

import contextlib
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polyhead.check.function import check_function
from polyhead.check.law import first_line
from polyhead.check.laws import FUNCTION_LAWS, MODULE_LAWS
from polyhead.check.module import check_module
from polyhead.check.probe.target import build, load, parse_arguments
from polyhead.check.report import Report
from polyhead.errors import ArgumentError, PolyheadError

__all__ = ["check_target", "list_laws"]


def check_target(
    target: str,
    *,
    pairs: tuple[str, ...] = (),
    mask_true: str | None = None,
    only: tuple[str, ...] = (),
    seed: int = 0,
    timeout: float | None = None,
    progress: Callable[[str, float], None] | None = None,
    float32: bool = False,
    tokens_first: bool = False,
    **claims: Any,
) -> Report:
    """Load a target, construct an instance and check it.

    Args:
        target: see `polyhead.check.probe.target.load`.
        pairs: NAME=VALUE arguments of its constructor.
        timeout: seconds in all; laws judged by then are reported.
        mask_true, only, seed, progress, claims: as in `check_module`.
        float32: run the laws in float32.
        tokens_first: a function takes (batch, tokens, heads, size).

    Raises:
        PolyheadError: it cannot be judged; the message is one line.
        KeyboardInterrupt: the user stopped it before the first law.
    """
    common: dict[str, Any] = {
        "only": only or None,
        "seed": seed,
        "timeout": timeout,
        "progress": progress,
    }
    # Keep output of the target out of the report.
    with _one_line(), _alarm(timeout), contextlib.redirect_stdout(sys.stderr):
        module, guessed, make = build(load(target), parse_arguments(pairs))
        if not isinstance(module, nn.Module):
            _refuse(claims | {"float32": float32 or None})
            layout = "tokens first" if tokens_first else "heads first"
            report = check_function(
                module, mask_true=mask_true or "attend", layout=layout, **common
            )
        else:
            dtype = torch.float32 if float32 else torch.float64
            report = check_module(
                module, make=make, mask_true=mask_true, dtype=dtype, **claims, **common
            )
    facts = dict(report.facts)
    if guessed:
        values = ", ".join(f"{name}={value}" for name, value in guessed.items())
        facts = {"guessed": f"{values} (override with --arg)"} | facts
    return replace(report, target=target, facts=facts)


def list_laws() -> str:
    """Return the name and requirement of every law."""
    lines = []
    for heading, laws in (("Of modules", MODULE_LAWS), ("Of functions", FUNCTION_LAWS)):
        lines.append(heading)
        for law in laws.values():
            lines.append(f"  {law.name}")
            lines.append(textwrap.indent(textwrap.fill(law.required, 92), " " * 6))
    return "\n".join(lines)


def _refuse(claims: dict[str, Any]) -> None:
    """Refuse claims for a function: it is compared with the reference for every argument it has."""
    for name, value in claims.items():
        if value not in (None, False):
            option = "--" + name.replace("_", "-")
            raise ArgumentError(option, "is for modules", "a function", f"leave out {option}")


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn any exception outside a law into a one-line ArgumentError."""
    try:
        yield
    except PolyheadError as error:
        error.args = (" ".join(str(error).split()),)
        raise
    except (Exception, SystemExit) as error:  # of unknown code
        raise ArgumentError(
            "TARGET",
            "must run a first call",
            f"{type(error).__name__}: {first_line(error)}",
            "call it in python to see where it raises",
        ) from error


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after this time, as Ctrl-C would: a law may hang."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return
    rung = False

    def ring(number: int, frame: object) -> None:
        nonlocal rung
        rung = True
        raise KeyboardInterrupt(f"time limit of {seconds:g} s reached")

    before = signal.signal(signal.SIGALRM, ring)
    # Repeated: the target may catch it, and the diagnosis calls the target again.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    except KeyboardInterrupt:  # before the first law, or during the diagnosis
        if not rung:
            raise
        raise ArgumentError(
            "TARGET",
            "must load and run a first call",
            f"time limit of {seconds:g} s reached",
            "give a larger --timeout",
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
