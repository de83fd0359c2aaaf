"""Benchmark cases with their targets, and the suites that contain them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polyhead.bench.cases import Case
from polyhead.errors import ArgumentError, did_you_mean

__all__ = ["CASES", "SUITES", "Suite", "find_cases"]


def _cases() -> tuple[Case, ...]:
    half, bf16 = torch.float16, torch.bfloat16
    p1: dict[str, Any] = {"B": 8, "H": 12, "G": 12, "T": 1024, "S": 1024, "D": 64}
    p2 = p1 | {"B": 1, "T": 4096, "S": 4096}
    p3: dict[str, Any] = {"B": 1, "H": 32, "G": 8, "T": 2048, "S": 2048, "D": 128}
    small = p1 | {"B": 1}
    d3: dict[str, Any] = {"B": 1, "H": 32, "G": 8, "T": 1, "S": 8192, "D": 128}
    d1 = d3 | {"dtype": bf16}
    d2 = d1 | {"B": 8, "S": 4096}
    chunk = d3 | {"T": 32, "S": 32768, "causal": False}
    d4 = small | {"T": 1, "dtype": bf16, "in_cache": True}
    train = small | {"train": True}
    module: dict[str, Any] = p1 | {"kind": "module"}
    e1: dict[str, Any] = d1 | {"S": 4096, "D": 64, "kind": "generate"}
    smollm2 = e1 | {"H": 9, "G": 3, "decoder": "SmolLM2"}

    def best(ratio: float) -> dict[str, float]:
        return {"best": ratio}

    # These targets are speed-ups over SDPA only: other peers are bound by the same memory, and a
    # ratio to them can be out of any kernel's reach.
    def sdpa(ratio: float) -> dict[str, float]:
        return {"sdpa": ratio}

    def cached(row: str, sizes: dict[str, Any]) -> tuple[Case, ...]:
        """The same case with an int8 or paged KV cache; int8 is half the bytes, or a quarter."""
        return (
            Case(f"{row}/int8", **sizes, codes=True, targets={"side by side": 1.0}),
            Case(f"{row}/blocks", **sizes, blocks=16, targets={"side by side": 1 / 1.15}),
            Case(
                f"{row}/int8-blocks",
                **sizes,
                codes=True,
                blocks=16,
                targets={"side by side": 1 / 1.15},
            ),
        )

    return (
        Case("P1", **p1, targets=best(1.7), target_share=0.75),
        Case("P2", **p2, targets=best(1.5), target_share=0.85),
        Case("P3", **p3, targets=best(1.55), target_share=0.88),
        Case("P4", **p1, dtype=bf16, targets=best(2.2) | sdpa(3.0), target_share=0.65),
        Case("P5", **p2, dtype=bf16, targets=best(2.6), target_share=0.75),
        Case("P6", **p3, dtype=bf16, targets=best(2.8), target_share=0.78),
        Case("P7/f32", **small, causal=False, targets=best(1.2)),
        Case("P7/bf16", **small, causal=False, dtype=bf16, targets=best(1.4)),
        Case("P8", **small, dtype=half, targets=best(2.5)),
        Case("W1", **(p2 | {"T": 8192, "S": 8192}), window=511, targets=sdpa(25)),
        Case("D1", **d1, targets=sdpa(25), target_share=0.85),
        *cached("D1", d1),
        Case("D2", **d2, targets=sdpa(25), target_share=0.85),
        *cached("D2", d2),
        Case("D3", **d3, targets=sdpa(4), target_share=0.85),
        *cached("D3", d3),
        Case("D4", **d4, targets=sdpa(8)),
        *cached("D4", d4),
        # With one key there is no work for a kernel: this measures the overhead of a call.
        Case("D4/call", **(d4 | {"S": 1}), target_us=15),
        Case("D5", **d3, dtype=half, targets=sdpa(50)),
        # DeepSeek's latent, of 512 and 64 features, shared by 16 heads.
        Case("D6", B=1, H=16, G=1, T=1, S=8192, D=576, latent=512, dtype=bf16, targets=sdpa(25)),
        Case("C1/f32", **chunk, targets=best(1.2)),
        Case("C1/bf16", **chunk, dtype=bf16, targets=best(1.2)),
        Case("T1", **train, targets=best(1.8)),
        Case("T2", **train, dtype=bf16, targets=best(2.5)),
        Case("T3", **train, dtype=half, targets=best(12)),
        Case("T4", **train, dropout=0.1, targets=sdpa(4)),
        Case(
            "S1",
            **(small | {"T": 16384, "S": 16384}),
            statistics=True,
            targets={"output only": 1 / 1.5},
        ),
        Case("M1", **module, targets=best(1.3) | {"book: split heads": 3.0}),
        Case("M2", **module, train=True, targets=best(1.5)),
        Case("E1", **e1, targets={"transformers sdpa": 5.0}),
        Case("E1/prompt", **(e1 | {"T": 4096}), targets={"transformers sdpa": 1.15}),
        Case("E1/SmolLM2", **smollm2, targets={"transformers sdpa": 5.0}),
        Case("E1/SmolLM2-prompt", **(smollm2 | {"T": 4096}), targets={"transformers sdpa": 1.15}),
        *(
            Case(f"N1/{name}", **sizes, kind="model", targets={"as it is": 1.0})
            for name, sizes in _models().items()
        ),
        *(
            Case(f"L{2**power}", B=1, H=2, G=2, T=2**power, S=2**power, D=64)
            for power in range(8, 18)
        ),
    )


def _models() -> dict[str, dict[str, Any]]:
    """Sizes of the attention in models of other libraries, none of which may become slower."""

    def sizes(model: str, B: int, H: int, T: int, S: int, D: int, **more: Any) -> dict[str, Any]:
        return {"model": model, "B": B, "H": H, "G": H, "T": T, "S": S, "D": D, **more}

    full: dict[str, Any] = {"causal": False}
    return {
        "vit": sizes("timm ViT-S", 1, 6, 577, 577, 64, **full),
        "vit-train": sizes("timm ViT-S", 1, 6, 577, 577, 64, train=True, **full),
        "window": sizes("dense window", 1, 6, 2304, 2304, 64, **full),
        "unet": sizes("diffusers UNet block", 1, 8, 1024, 1024, 16, **full),
        "whisper-encoder": sizes("Whisper encoder", 1, 6, 1500, 1500, 64, **full),
        "whisper-decoder": sizes("Whisper decoder", 1, 6, 448, 1500, 64),
    }


CASES: tuple[Case, ...] = _cases()


@dataclass(frozen=True)
class Suite:
    """Cases that run together, by id or by the letter of their kind, and the peers left out."""

    cases: tuple[str, ...]
    without: tuple[str, ...] = ()
    rounds: int = 7
    seconds: float = 10.0

    def select(self) -> tuple[Case, ...]:
        return tuple(c for c in CASES if c.id in self.cases or c.id[0] in self.cases)


SUITES: Mapping[str, Suite] = {
    # Compiling flex takes longer than the whole suite.
    "quick": Suite(
        ("P2", "P5", "D1", "D4", "D4/call", "T1", "M1"),
        ("flex", "book: flex"),
        rounds=5,
        seconds=2.0,
    ),
    "full": Suite(("P", "W", "D", "C", "T", "S", "M", "E")),
    "decode": Suite(("D",)),
    "train": Suite(("T",)),
    "module": Suite(("M",)),
    "scale": Suite(("L",), rounds=5, seconds=2.0),
    "models": Suite(("N",), rounds=5, seconds=3.0),
    "hf": Suite(("E",), rounds=5, seconds=2.0),  # a prompt of 4096 tokens is slow
}


def find_cases(asked: tuple[str, ...]) -> tuple[Case, ...]:
    """Return the cases of these ids, in the order of the table; `P7` means all of its variants.

    Raises:
        ArgumentError: there is no such case.

    >>> [case.id for case in find_cases(("P7", "D1"))]
    ['P7/f32', 'P7/bf16', 'D1']
    """
    known = {name for case in CASES for name in (case.id, case.id.partition("/")[0])}
    for name in asked:
        if name not in known:
            ids = ", ".join(case.id for case in CASES)
            remedy = did_you_mean(name, known, "choose one of these")
            raise ArgumentError("--case", f"must be one of {ids}", name, remedy)
    rows = set(asked) - {case.id for case in CASES}
    return tuple(case for case in CASES if case.id in asked or case.id.partition("/")[0] in rows)
