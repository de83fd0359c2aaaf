"""Runs an installed polyhead: `python scripts/smoke_test.py`, in an environment with its wheel.

The kernels are there, every instruction set of the processor agrees with a plain softmax in
float64, forward and backward, and the process has one runtime of OpenMP.
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import torch

import polyhead as ph
from polyhead.backends.cpu import ops
from polyhead.mask import causal

ISAS = ("avx512_bf16", "avx512", "avx2", "neon_bf16", "neon", "portable")
# Of a step of a dtype, 8 times: the tests of the repository have tolerances that are derived.
TOLERANCE = {torch.float32: 8 * 2**-23, torch.bfloat16: 8 * 2**-8, torch.float16: 8 * 2**-11}


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, the last query at the last key."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    T, S = scores.shape[-2:]
    later = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ value


def largest_error(dtype: torch.dtype, tokens: int) -> float:
    """Of output and gradients, relative to the largest number of each."""
    torch.manual_seed(0)
    shapes = [(2, 6, tokens, 59), (2, 3, 131, 59), (2, 3, 131, 37)]
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output, expected = ph.attention(*inputs, mask=causal(), backend="cpu"), naive(*exact)
    weights = torch.randn(output.shape, dtype=dtype)
    pairs = [(output, expected)]
    pairs += zip(
        torch.autograd.grad(output, inputs, weights),
        torch.autograd.grad(expected, exact, weights.double()),
        strict=True,
    )
    return max(float(((got - want).abs().max() / want.abs().max()).detach()) for got, want in pairs)


def runtimes() -> set[str]:
    """Files of OpenMP runtimes in this process, on Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().split() if maps.exists() else []
    return {word for word in lines if "/libgomp" in word or "/libomp" in word or "/libiomp" in word}


def main() -> str | None:
    if ops.unavailable:
        return f"smoke test: polyhead's cpu backend {ops.unavailable}"
    best, ran = ops.isa(), []
    for isa in ISAS:
        try:
            ops.choose_isa(isa)
        except RuntimeError:
            continue
        ran.append(isa)
        for dtype, tolerance in TOLERANCE.items():
            for tokens in (1, 7, 131):  # decode, chunked prefill, prefill
                error = largest_error(dtype, tokens)
                if not error <= tolerance:
                    return f"smoke test: {isa}, {dtype}, {tokens} tokens: relative error {error}"
    if best not in ran or "portable" not in ran:
        return f"smoke test: {best} was chosen; {ran} ran"
    if len(runtimes()) > 1:
        return f"smoke test: several runtimes of OpenMP: {sorted(runtimes())}"
    print(f"smoke test: polyhead {ph.__version__}, torch {torch.__version__}: {', '.join(ran)}")
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
