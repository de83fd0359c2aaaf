"""Conformance checks for attention: laws that any module or function can be tested against.

check_module(module, causal=True)     an nn.Module
polyhead check path/to/file.py:Name   the same from the command line
"""

from polyhead.check.function import check_function
from polyhead.check.law import Law, Outcome, Verdict
from polyhead.check.module import check_module
from polyhead.check.pytest_laws import parametrize_with_laws
from polyhead.check.report import LawResult, Report

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
