"""What the tests of the C++ kernels share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import polyhead as ph


@pytest.fixture(scope="session")
def tensors(tensors: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Those of all tests, by default in float32 and of sizes that fill no block of a kernel."""
    return partial(tensors, T=17, S=31, D=24, dtype=torch.float32)


@pytest.fixture(scope="session")
def assert_agrees(naive_attention, assert_as_good_as_eager, gradient) -> Callable[..., None]:
    """`assert_agrees(inputs, mask=, **options)`: output and all gradients as good as eager's.

    Tensors among the options are differentiated too.
    """

    def check(inputs, mask=None, **options):
        names = [name for name, value in options.items() if isinstance(value, Tensor)]
        runs = {}
        allowed = None
        if mask is not None:
            allowed = mask.materialize(inputs[0].shape[2], inputs[1].shape[2])
        for run in ("kernel", "eager", "exact"):
            # Fresh leaves; exact ones in float64.
            leaves = [x.detach().clone() for x in (*inputs, *(options[name] for name in names))]
            leaves = [(x.double() if run == "exact" else x).requires_grad_() for x in leaves]
            given = {**options, **dict(zip(names, leaves[3:], strict=True))}
            if run == "kernel":
                output = ph.attention(*leaves[:3], mask=mask, **given, backend="cpu")
            else:
                output = naive_attention(*leaves[:3], allowed=allowed, **given)
            runs[run] = output, gradient(output, leaves)
        for kernel, eager, exact in zip(*runs.values(), strict=True):
            if eager.dtype != kernel.dtype:  # a gradient beside 16-bit inputs, joined with theirs
                eager = eager.to(kernel.dtype)
            assert_as_good_as_eager(kernel, eager, exact)

    return check
