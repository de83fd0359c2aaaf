"""`polyhead bench`: polyhead and its peers, measured on this machine in one run.

Each peer is checked against float64 before it is timed; peers run round-robin; rates are reported
as shares of this machine's ceilings, measured in the same run. Nothing is reported if other
processes were busy.
"""

from polyhead.bench.cases import Case
from polyhead.bench.machine.system_load import DisturbedError
from polyhead.bench.results import BenchResult, CaseResult, VariantResult
from polyhead.bench.run import Settings, run_bench
from polyhead.bench.suites import CASES, SUITES, Suite, find_cases

__all__ = [
    "CASES",
    "SUITES",
    "BenchResult",
    "Case",
    "CaseResult",
    "DisturbedError",
    "Settings",
    "Suite",
    "VariantResult",
    "find_cases",
    "run_bench",
]
