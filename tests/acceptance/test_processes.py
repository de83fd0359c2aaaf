"""Backend `cpu` called by many threads at once, and by a child forked after its parent called."""

from __future__ import annotations

import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import polyhead as ph

pytestmark = pytest.mark.usefixtures("kernels", "two_threads")

PATIENCE = 60  # seconds, of a machine that has other things to do


def inputs(T, S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 6, T, 16), (2, 3, S, 16), (2, 3, S, 24)]
    return [torch.randn(size, generator=generator) for size in sizes]


def attend(query, key, value):
    request = ph.AuxRequest(weights=True, lse=True, stats=True)
    mask = ph.mask.causal() & ph.mask.lengths([key.shape[2], 5])
    with torch.no_grad():
        output, aux = ph.attention(query, key, value, mask=mask, backend="cpu", return_aux=request)
    return [output, aux.weights, aux.lse, aux.stats.entropy]


def are_equal(ours, theirs):
    # By numpy: torch.equal of many numbers would hang in a child.
    return all((a.numpy() == b.numpy()).all() for a, b in zip(ours, theirs, strict=True))


def test_many_threads_at_once():
    """Each with its own sizes, so that memory shared by mistake would show."""
    cases = [inputs(T=1 + 37 * (i % 4), S=300 + i, seed=i) for i in range(8)]
    wanted = [attend(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda case: attend(*case), cases * 8))
    assert all(are_equal(*pair) for pair in zip(results, wanted * 8, strict=True))


def test_gradients_in_many_threads_at_once():
    def gradients(case):
        leaves = [x.clone().requires_grad_() for x in case]
        return torch.autograd.grad(ph.attention(*leaves, backend="cpu").sin().sum(), leaves)

    cases = [inputs(T=20 + i, S=90, seed=i) for i in range(4)]
    wanted = [gradients(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(gradients, cases * 2))
    assert all(are_equal(*pair) for pair in zip(results, wanted * 2, strict=True))


def is_right_in_a_child(work):
    """Whether `work()` is true in a forked child. Torch's own parallel operations hang there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
@pytest.mark.parametrize("T", [1, 150])
def test_a_child_forked_after_a_call_goes_on(T):
    case = inputs(T, S=400)
    wanted = attend(*case)

    def work():
        return are_equal(attend(*case), wanted)

    def work_twice_and_in_a_grandchild():
        return work() and work() and is_right_in_a_child(work)

    assert is_right_in_a_child(work_twice_and_in_a_grandchild)
    assert work()
