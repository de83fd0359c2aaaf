"""Round-robin timing, medians and quartiles, with a fake clock."""

import pytest

from polyhead.bench.machine.measure import Timing, interleave
from polyhead.errors import ArgumentError


class Clock:
    """Clock that is advanced by calls, not by reading it."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """A call that takes these seconds one after the other, then the last repeatedly."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_interleave_rotates_the_order_of_calls():
    clock = Clock()
    calls = {name: clock.call(name, 1.0) for name in "abc"}
    interleave(calls, rounds=5, seconds=0.0, clock=clock)
    assert "".join(clock.log) == "aabbcc" + "abc" + "bca" + "cab" + "abc" + "bca"


def test_timing_has_median_and_quartiles():
    clock = Clock()
    warm = (9.0, 9.0)  # warm-up calls are not sampled
    calls = {"a": clock.call("a", *warm, 5.0, 1.0, 2.0, 90.0, 3.0)}
    timing = interleave(calls, rounds=5, seconds=0.0, clock=clock)["a"]
    assert timing.samples == (5.0, 1.0, 2.0, 90.0, 3.0)
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 5.0)


def test_interleave_runs_at_least_rounds_and_seconds():
    for seconds, expected in ((0.0, 7), (20.0, 20)):
        clock = Clock()
        calls = {"a": clock.call("a", 1.0)}
        timing = interleave(calls, rounds=7, seconds=seconds, clock=clock)["a"]
        assert len(timing.samples) == expected


def test_interleave_repeats_short_calls_after_a_warm_up():
    clock = Clock()
    calls = {"short": clock.call("short", 2.0**-9), "long": clock.call("long", 1.0)}
    timings = interleave(calls, rounds=5, seconds=0.0, clock=clock)
    repeats = 6  # of 2 ms, to reach 10 ms
    assert clock.log.count("short") == 2 + 5 * (1 + repeats)
    assert clock.log.count("long") == 2 + 5
    assert timings["short"].median == 2.0**-9


def test_interleave_progress_ends_at_one():
    clock, done = Clock(), []
    calls = {"a": clock.call("a", 1.0)}
    interleave(calls, rounds=5, seconds=9.5, clock=clock, progress=done.append)
    assert done == sorted(done)
    assert done[-2:] == [9 / 9.5, 1.0]


def test_interleave_without_calls_is_empty():
    assert interleave({}, rounds=5, seconds=1.0) == {}


def test_interleave_fewer_than_five_rounds_raises():
    with pytest.raises(ArgumentError, match="rounds must be at least 5; got 4; measure more"):
        interleave({"a": lambda: None}, rounds=4, seconds=0.0)


def test_timing_of_equal_samples():
    assert Timing((2.0,) * 5).quartiles == (2.0, 2.0)
