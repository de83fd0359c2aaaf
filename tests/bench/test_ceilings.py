"""Ceilings: the best of several loops, each at its own best."""

import pytest

from polyhead.bench.ceilings import Loop, ceiling_loops, measure_ceilings


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


def test_the_best_loop_at_its_shortest_time():
    clock = Clock()
    # The first call only warms up, however fast it was.
    slow = clock.loop("slow", 8e9, 0.1, 4.0)
    fast = clock.loop("fast", 6e9, 0.1, 3.0, 1.0, 2.0)
    ceiling = measure_ceilings({"bfloat16": (slow, fast)}, seconds=5.0, clock=clock)["bfloat16"]
    assert ceiling.giga_per_second == pytest.approx(6.0)
    assert str(ceiling) == "bfloat16 6 GFLOP/s (fast)"


def test_the_loops_here_count_their_work():
    loops = ceiling_loops(("avx2", "amx_bf16"), size=8, megabytes=2)
    assert {name: [loop.source for loop in some] for name, some in loops.items()} == {
        "float32": ["float32 matmul"],
        "bfloat16": ["bfloat16 matmul", "float32 matmul"],
        "read": ["sum", "dot"],
    }
    assert {loop.work for loop in loops["bfloat16"]} == {2 * 8**3}
    assert {loop.work for loop in loops["read"]} == {2 * 2**20}
    ceilings = measure_ceilings(loops, seconds=0.0)
    assert {ceiling.unit for ceiling in ceilings.values()} == {"GFLOP/s", "GB/s"}
    assert all(ceiling.giga_per_second > 0 for ceiling in ceilings.values())


def test_without_products_of_bfloat16_float32_bounds_it():
    loops = ceiling_loops(("avx2", "fma"), size=8, megabytes=2)
    assert loops["bfloat16"] == loops["float32"]
