"""Small cases, and handmade results."""

from __future__ import annotations

import pytest
import torch

from polyhead.bench.cases import Case
from polyhead.bench.machine.ceilings import Ceiling
from polyhead.bench.machine.describe import describe_machine
from polyhead.bench.results import BenchResult, CaseResult, Target, VariantResult


@pytest.fixture
def small():
    """`small(**changes)`: 6 query heads over 2 KV heads, 17 tokens of 5 features."""

    def build(**changes):
        sizes = {"B": 3, "H": 6, "G": 2, "T": 17, "S": 17, "D": 5}
        return Case("X", **{**sizes, **changes})

    return build


@pytest.fixture
def timed():
    """`timed(name, milliseconds)`: a peer that was measured; polyhead is ours."""

    def build(name, milliseconds, **more):
        spread = {"lower": milliseconds * 0.9, "upper": milliseconds * 1.1, "samples": 5}
        return VariantResult(
            name, name == "polyhead", milliseconds=milliseconds, **{**spread, **more}
        )

    return build


@pytest.fixture
def case_result(timed):
    """`case_result(id)`: polyhead 2 ms, sdpa 3 ms, eager 8 ms, one wrong, one that cannot run."""

    def build(id="P2", **changes):
        variants = (
            timed("polyhead", 2.0, backend="reference", rate=100.0, share=0.5),
            timed("sdpa", 3.0, rate=66.6, share=0.33),
            timed("eager", 8.0, rate=25.0, share=0.125),
            VariantResult("flex", False, refused=("output is off by 1",), wrong=True),
            VariantResult("OpenVINO", False, refused=("openvino is not installed",)),
        )
        fields = {
            "what": "forward 1, 2/2, 256, 256, 64, causal(), float32",
            "tokens": 256,
            "unit": "GFLOP/s",
            "ceiling": "float32",
            "gate": "all of it",
            "others_share": 0.012,
            "variants": variants,
            "targets": (
                Target("times as fast as the best peer", 1.2, 1.5, True),
                Target("of the ceiling (float32)", 0.85, 0.5, False),
            ),
        }
        return CaseResult(id, **{**fields, **changes})

    return build


@pytest.fixture
def bench_result(case_result):
    """`bench_result(*cases, **changes)`."""

    def build(*cases, **changes):
        ceilings = (Ceiling("float32", 200.0, "GFLOP/s", "float32 matmul"),)
        return BenchResult(describe_machine(), ceilings, cases or (case_result(),), **changes)

    return build


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param
