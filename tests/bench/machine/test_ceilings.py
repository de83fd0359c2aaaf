"""Machine ceilings: the best of several loops, each at its own best."""

import pytest
import torch

from polyhead.backends.cpu import ops
from polyhead.bench.machine.ceilings import Loop, ceiling_loops, measure_ceilings


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def loop(self, source, work, *seconds):
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Loop(source, work, call)


def test_ceiling_is_the_best_loops_shortest_time():
    clock = Clock()
    # The first call only warms up, however fast it was.
    slow = clock.loop("slow", 8e9, 0.1, 4.0)
    fast = clock.loop("fast", 6e9, 0.1, 3.0, 1.0, 2.0)
    ceiling = measure_ceilings({"bfloat16": (slow, fast)}, seconds=5.0, clock=clock)["bfloat16"]
    assert ceiling.giga_per_second == pytest.approx(6.0)
    assert str(ceiling) == "bfloat16 6 GFLOP/s (fast)"


@pytest.fixture(params=["with kernels", "without"])
def registers(request, monkeypatch):
    """Sources of the loops in our kernels, if these are built."""
    if request.param == "without":
        monkeypatch.setattr(ops, "unavailable", "was not built")
    return [] if ops.unavailable else ["registers"]


def test_ceiling_loops_count_their_work(registers):
    loops = ceiling_loops(("avx2", "amx_bf16"), size=8, megabytes=2, steps=3)
    assert {name: [loop.source for loop in some] for name, some in loops.items()} == {
        "float32": ["float32 matmul", *registers],
        "bfloat16": ["bfloat16 matmul", "float32 matmul", *registers],
        "read": ["sum", "dot"],
    }
    assert {loop.work for loop in loops["bfloat16"] if "matmul" in loop.source} == {2 * 8**3}
    assert {loop.work for loop in loops["read"]} == {2 * 2**20}
    ceilings = measure_ceilings(loops, seconds=0.0)
    assert {ceiling.unit for ceiling in ceilings.values()} == {"GFLOP/s", "GB/s"}
    assert all(ceiling.giga_per_second > 0 for ceiling in ceilings.values())


def test_ceiling_without_bf16_products_is_float32():
    loops = ceiling_loops(("avx2", "fma"), size=8, megabytes=2, steps=3)
    assert loops["bfloat16"] == loops["float32"]


@pytest.mark.skipif(bool(ops.unavailable), reason="the kernels were not built")
def test_register_loop_counts_steps_threads_and_lanes():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.multiply_add(False, 1)
        assert ops.multiply_add(False, 7) == 7 * alone
        torch.set_num_threads(2)
        assert ops.multiply_add(False, 1) == 2 * alone
    finally:
        torch.set_num_threads(threads)
    isa = ops.isa()
    narrow = {"avx2": (8, 12), "neon": (4, 24), "neon_bf16": (4, 24), "portable": (4, 12)}
    lanes, sums = narrow.get(isa, (16, 24))
    assert alone == 2 * lanes * sums
    pairs = ops.multiply_add(True, 1) / ops.multiply_add(False, 1)
    assert pairs == (2 if isa.endswith("_bf16") else 1)
