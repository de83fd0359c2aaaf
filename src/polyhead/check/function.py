"""`check_function`: check functions with scaled_dot_product_attention's signature."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from polyhead.check.function_subject import FunctionSubject
from polyhead.check.laws import FUNCTION_LAWS
from polyhead.check.modes import own_modes
from polyhead.check.module import Progress, choose_laws, run_laws
from polyhead.check.report import Report
from polyhead.errors import ArgumentError

__all__ = ["check_function"]


def check_function(
    function: Callable[..., Any],
    *,
    mask_true: str = "attend",
    layout: str = "heads first",
    only: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a `scaled_dot_product_attention`-like function against the reference.

    Args:
        function: `function(query, key, value, ...)`. Its options are read from its signature:
            attn_mask or mask, is_causal or causal, scale, softcap, dropout_p, enable_gqa. Laws
            about a missing option are "not applicable".
        mask_true: meaning of True in a boolean mask, "attend" (as in torch's function) or "ignore".
        layout: "heads first" (B, H, T, D), or "tokens first" (B, T, H, D).
        only: names of laws; None: all.
        seed: seed of the generated calls; the same seed generates the same calls.
        dtype: dtype of the generated calls.
        timeout, progress: as in `check_module`.

    Returns:
        A `Report`. A broken law shows the smallest call found that breaks it.

    Raises:
        ArgumentError: an argument breaks a rule.

    >>> import torch.nn.functional as F
    >>> check_function(F.scaled_dot_product_attention, only=["plain_calls_are_right"]).ok
    True
    """
    if mask_true not in ("attend", "ignore"):
        raise ArgumentError(
            "mask_true", 'must be "attend" or "ignore"', repr(mask_true), "name one"
        )
    if layout not in ("heads first", "tokens first"):
        raise ArgumentError(
            "layout", 'must be "heads first" or "tokens first"', repr(layout), "name one"
        )
    laws = choose_laws(FUNCTION_LAWS, only)
    subject = FunctionSubject(function, mask_true=mask_true, layout=layout, seed=seed, dtype=dtype)
    with warnings.catch_warnings(), own_modes():
        warnings.simplefilter("ignore")
        results, stopped = run_laws(laws, subject, timeout, progress)
    facts = {"called as": "query, key, value", "layout": layout}
    facts |= {purpose: f"{name}=" for purpose, name in subject.names.items()}
    return Report(getattr(function, "__name__", "function"), facts, results, (), stopped)
