"""Generated attention calls: drawn from a seed, and shrunk if they fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Case", "draw", "shrink"]

_SIZES = (1, 2, 3, 5, 7, 11, 17)


@dataclass(frozen=True)
class Case:
    """One call. B, H, G, T, S, D, E as in `polyhead.call`.

    Attributes:
        causal: None, or the key that query 0 is aligned with: "start", or "end" for S - T.
        mask: None, "boolean" (True = may attend), "additive", or "empty": boolean, with an empty
            first row.
        scale: factor on the scores; None: 1 / sqrt(D).
        softcap: softcap, or None.
        size: factor on query and key, 1 or large.
        seed: seed of the inputs.
    """

    B: int = 1
    H: int = 1
    G: int = 1
    T: int = 1
    S: int = 1
    D: int = 1
    E: int = 1
    causal: str | None = None
    mask: str | None = None
    scale: float | None = None
    softcap: float | None = None
    size: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        options = {name: getattr(self, name) for name in ("causal", "mask", "scale", "softcap")}
        shown = [f"{name}={getattr(self, name)}" for name in "BHGTSDE"]
        shown += [f"{name}={value}" for name, value in options.items() if value is not None]
        if self.size != 1.0:
            shown.append(f"inputs times {self.size:g}")
        return " ".join(shown)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        query = self.size * randn(self.B, self.H, self.T, self.D)
        key = self.size * randn(self.B, self.G, self.S, self.D)
        value = randn(self.B, self.G, self.S, self.E)
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def allowed(self) -> Tensor | None:
        """(B, 1, T, S) mask of the case alone; True = may attend."""
        if self.mask is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        allowed = torch.rand(self.B, 1, self.T, self.S, generator=generator) < 0.7
        # Each query keeps its own position, so that only intended rows are empty.
        places = (torch.arange(self.T) + max(self.S - self.T, 0)).clamp(max=self.S - 1)
        allowed[:, :, torch.arange(self.T), places] = True
        if self.causal == "start":
            allowed[..., 0] = True
        if self.mask == "empty":
            allowed[:, :, 0] = False
        return allowed


def draw(seed: int, count: int, **fixed: object) -> Iterator[Case]:
    """Yield cases of random sizes. A `fixed` entry is a value, or a function of the drawn case."""
    numbers = random.Random(seed)
    for index in range(count):
        G = numbers.choice((1, 2, 3))
        S = numbers.choice(_SIZES)
        D = numbers.choice(_SIZES)
        case = Case(
            B=numbers.choice((1, 2, 3)), H=G, G=G, T=S, S=S, D=D, E=D, seed=seed * 1000 + index
        )
        for name, value in fixed.items():
            chosen = value(case, numbers) if callable(value) else value
            case = replace(case, **{name: chosen})  # type: ignore[arg-type]
        yield case


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Return the smallest nearby case that still fails, shrinking one size at a time."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if fails(candidate):
                case, smaller = candidate, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for name in ("mask", "softcap", "scale", "causal"):
        if getattr(case, name) is not None:
            yield replace(case, **{name: None})  # type: ignore[arg-type]
    group = case.H // case.G
    if case.G > 1:
        yield replace(case, G=1, H=group)
    if group > 1:
        yield replace(case, H=case.G)
    if case.T == case.S and case.T > 1:
        for size in (1, case.T // 2, case.T - 1):
            yield replace(case, T=size, S=size)
    if case.D == case.E and case.D > 1:
        for size in (1, case.D // 2, case.D - 1):
            yield replace(case, D=size, E=size)
    for name in ("B", "T", "S", "D", "E"):
        value = getattr(case, name)
        for size in sorted({1, value // 2, value - 1} & set(range(1, value))):
            yield replace(case, **{name: size})
