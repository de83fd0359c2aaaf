"""Is this attention right? The conformance kit, for anybody's module or function.

check_module(module, causal=True)     an nn.Module
polyhead check path/to/file.py:Name   the same from the command line
"""

# The order of the report. Importing them puts their laws into the table.
# ruff: isort: off
from polyhead.check.laws import causality as laws_causality
from polyhead.check.laws import positions as laws_positions
from polyhead.check.laws import reference as laws_definition
from polyhead.check.laws import masks as laws_masks
from polyhead.check.laws import cache as laws_cache
from polyhead.check.laws import heads as laws_heads
from polyhead.check.laws import weights as laws_weights
from polyhead.check.laws import batch as laws_batch
from polyhead.check.laws import modes as laws_modes
from polyhead.check.laws import dropout as laws_dropout
from polyhead.check.laws import numerics as laws_numbers
from polyhead.check.laws import gradients as laws_gradients
from polyhead.check.laws import state as laws_state
from polyhead.check.laws import function as laws_function

# ruff: isort: on
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
