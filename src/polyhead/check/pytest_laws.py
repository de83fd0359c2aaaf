"""Laws as pytest tests, one test per law."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from polyhead.check.law import Outcome
from polyhead.check.laws import MODULE_LAWS
from polyhead.check.module import check_module, choose_laws
from polyhead.check.report import Report
from polyhead.errors import DependencyError

__all__ = ["parametrize_with_laws"]


def parametrize_with_laws(
    make: Callable[[], nn.Module],
    *,
    expected_failures: Mapping[str, str] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """Decorator that runs a test once per law of modules, passed as its argument `law`.

    The test calls `law()`, which fails with the counterexample, or skips with the reason if the
    law does not apply.

    Args:
        make: creates the module. It is created and checked once for all laws.
        expected_failures: reason by name of the law. An expected failure that holds fails the
            suite, which keeps the list current.
        options: as in `check_module`.

    Raises:
        ArgumentError: expected_failures has an unknown law.
        DependencyError: pytest is not installed.

    >>> import polyhead as ph
    >>> mha = lambda: ph.MultiHeadAttention(12, 12, context_length=16, dropout=0.0, num_heads=3)
    >>> @parametrize_with_laws(mha, causal=True)
    ... def test_my_attention(law):
    ...     law()
    """
    try:
        import pytest
    except ImportError:
        raise DependencyError("parametrize_with_laws needs pytest: pip install pytest") from None
    expected = dict(expected_failures or {})
    only = options.get("only")
    choose_laws(MODULE_LAWS, list(expected))

    @functools.cache
    def report() -> Report:
        return check_module(make(), make=make, **options)

    def run(name: str) -> None:
        verdict = next(r.verdict for r in report().results if r.law == name)
        if verdict.outcome is Outcome.BROKEN:
            pytest.fail("\n".join([verdict.message, *report().diagnosis]), pytrace=False)
        if verdict.outcome in (Outcome.NOT_APPLICABLE, Outcome.NOT_RUN):
            pytest.skip(verdict.message)

    parameters = []
    for law in choose_laws(MODULE_LAWS, only):
        marks = (
            [pytest.mark.xfail(reason=expected[law.name], strict=True)]
            if law.name in expected
            else []
        )
        parameters.append(pytest.param(functools.partial(run, law.name), id=law.name, marks=marks))
    return pytest.mark.parametrize("law", parameters)
