"""`polyhead bench`: polyhead beside its peers, on this machine, in one run.

Each peer is held to float64 before it is timed; peers take turns; times are told with the share of
this machine's ceilings, measured in the same run. Nothing is told when other processes were busy.
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
