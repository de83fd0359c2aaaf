"""What `polyhead check` does, between its options and its output."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polyhead.check.function import check_function
from polyhead.check.law import FUNCTION_LAWS, MODULE_LAWS
from polyhead.check.report import Report
from polyhead.check.run import check_module
from polyhead.check.target import build, load, parse_arguments
from polyhead.errors import ArgumentError

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
    **claims: Any,
) -> Report:
    """Load a target, make an instance of it and check it.

    Args:
        target: see `polyhead.check.target.load`.
        pairs: NAME=VALUE arguments of its constructor.
        timeout: seconds in all; what is known by then is reported.
        mask_true, only, seed, progress, claims: as in `check_module`.
        float32: whether laws run in float32.
    """
    common: dict[str, Any] = {
        "only": only or None,
        "seed": seed,
        "timeout": timeout,
        "progress": progress,
    }
    with _alarm(timeout):
        module, guessed, make = build(load(target), parse_arguments(pairs))
        if not isinstance(module, nn.Module):
            report = check_function(module, mask_true=mask_true or "show", **common)
        else:
            dtype = torch.float32 if float32 else torch.float64
            report = check_module(
                module, make=make, mask_true=mask_true, dtype=dtype, **claims, **common
            )
    facts = dict(report.facts)
    if guessed:
        values = ", ".join(f"{name}={value}" for name, value in guessed.items())
        facts = {"guessed": f"{values} (--arg says otherwise)"} | facts
    return replace(report, target=target, facts=facts)


def list_laws() -> str:
    """Every law and what it requires."""
    lines = []
    for heading, laws in (("Of modules", MODULE_LAWS), ("Of functions", FUNCTION_LAWS)):
        lines.append(heading)
        for law in laws.values():
            lines.append(f"  {law.name}")
            lines.append(textwrap.indent(textwrap.fill(law.required, 92), " " * 6))
    return "\n".join(lines)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after so many seconds, as Ctrl-C would: a law may not come back."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"time was up after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:  # before the first law
        raise ArgumentError(
            "TARGET",
            "must load and answer a first call in time",
            f"stopped within {seconds:g} s",
            "give a larger --timeout",
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
