"""System load: wait while other processes are busy, retry, then refuse."""

import pytest

from polyhead.bench.machine.system_load import (
    CpuTimes,
    DisturbedError,
    check_quiet,
    others_share,
    quietly,
    read_cpu_times,
)


class Machine:
    """Two processors, ten seconds per measurement; others take these shares one by one."""

    def __init__(self, *shares):
        self.times = []
        for i, share in enumerate(shares):
            start = CpuTimes(100.0 * i, 1000.0 * i, 50.0 * i)
            end = CpuTimes(start.busy + 8 + 20 * share, start.total + 20, start.own + 8)
            self.times += [start, end]
        self.waits = []
        self.measured = 0

    def measure(self):
        self.measured += 1
        return self.measured

    def quietly(self, **options):
        times = iter(self.times)
        return quietly(self.measure, read=lambda: next(times), sleep=self.waits.append, **options)


@pytest.mark.parametrize(
    ("shares", "waits"), [((0.0,), [0.5]), ((0.3, 0.01), [0.5, 1.5]), ((0.0, 0.9), [0.5])]
)
def test_check_quiet_passes_after_one_quiet_sample(shares, waits):
    machine = Machine(*shares)
    times = iter(machine.times)
    check_quiet(lambda: next(times), machine.waits.append)
    assert machine.waits == waits


def test_check_quiet_on_a_busy_machine_raises_in_two_seconds():
    machine = Machine(0.3, 0.25)
    times = iter(machine.times)
    with pytest.raises(DisturbedError, match=r"at most 5%.*got 30%, 25% in 2 tries"):
        check_quiet(lambda: next(times), machine.waits.append)
    assert sum(machine.waits) == 2.0


def test_check_quiet_passes_where_the_load_is_not_known():
    check_quiet(lambda: None, lambda seconds: None)


def test_others_share_excludes_own_and_idle_time():
    before = CpuTimes(busy=100, total=1000, own=50)
    assert others_share(before, CpuTimes(busy=112, total=1020, own=60)) == pytest.approx(0.1)
    # Ticks are coarse: slightly negative differences count as zero.
    assert others_share(before, CpuTimes(busy=109.9, total=1020, own=60)) == 0.0
    assert others_share(before, before) == 0.0


def test_quietly_measures_once_on_a_quiet_machine():
    machine = Machine(0.05)
    result, share = machine.quietly()
    assert (result, machine.waits) == (1, [])
    assert share == pytest.approx(0.05)


def test_quietly_waits_for_a_disturbance_to_pass():
    machine = Machine(0.5, 0.06, 0.01)
    result, share = machine.quietly()
    assert result == 3
    assert share == pytest.approx(0.01)
    assert machine.waits == [5.0, 20.0]


def test_quietly_lasting_disturbance_raises_with_shares():
    machine = Machine(0.5, 0.25, 0.06)
    with pytest.raises(DisturbedError, match=r"at most 5%.*got 50%, 25%, 6% in 3 tries.*--anyway"):
        machine.quietly()
    assert machine.measured == 3


def test_quietly_anyway_returns_first_result_and_share():
    machine = Machine(0.5)
    result, share = machine.quietly(anyway=True)
    assert result == 1
    assert share == pytest.approx(0.5)


def test_quietly_without_cpu_times_has_no_share():
    assert quietly(lambda: "done", read=lambda: None) == ("done", None)


def test_read_cpu_times_from_proc_stat(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 50 1000 40 5 5 30 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    times = read_cpu_times(stat)
    hertz = 1240 / times.total  # user is 100 ticks, guests are part of it
    assert times.busy == pytest.approx(200 / hertz)
    assert times.own > 0
    assert read_cpu_times(tmp_path / "none") is None
