"""Is this attention right? The conformance kit, for anybody's module or function.

check_module(module, causal=True)     an nn.Module
polyhead check path/to/file.py:Name   the same from the command line
"""

# The order of the report. Importing them puts their laws into the table.
# ruff: isort: off
from polyhead.check import laws_causality  # noqa: F401
from polyhead.check import laws_positions  # noqa: F401
from polyhead.check import laws_definition  # noqa: F401
from polyhead.check import laws_masks  # noqa: F401
from polyhead.check import laws_cache  # noqa: F401
from polyhead.check import laws_heads  # noqa: F401
from polyhead.check import laws_weights  # noqa: F401
from polyhead.check import laws_batch  # noqa: F401
from polyhead.check import laws_modes  # noqa: F401
from polyhead.check import laws_dropout  # noqa: F401
from polyhead.check import laws_numbers  # noqa: F401
from polyhead.check import laws_gradients  # noqa: F401
from polyhead.check import laws_state  # noqa: F401
from polyhead.check import laws_function  # noqa: F401

# ruff: isort: on
from polyhead.check.function import check_function
from polyhead.check.law import Law, Outcome, Verdict
from polyhead.check.pytest_laws import parametrize_with_laws
from polyhead.check.report import LawResult, Report
from polyhead.check.run import check_module

__all__ = [
    "Law",
    "LawResult",
    "Outcome",
    "Report",
    "Verdict",
    "check_function",
    "check_module",
    "parametrize_with_laws",
]
