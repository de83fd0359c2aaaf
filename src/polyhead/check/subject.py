"""Module under check: its calling convention and claims, each with its origin."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.check.law import OutOfTime
from polyhead.check.probe.invocation import Calling, Result
from polyhead.check.probe.sight import Pattern, band
from polyhead.check.tolerance import allowed_difference, response

_CASTS: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
    torch.float64: nn.Module.double,
    torch.float32: nn.Module.float,
    torch.bfloat16: nn.Module.bfloat16,
    torch.float16: nn.Module.half,
}

__all__ = ["Claims", "Subject", "by", "copied", "difference", "seeded"]


@dataclass
class Claims:
    """Claims that the module is held to. `how` has the origin of each.

    Attributes:
        d_in: features of the input.
        causal: True if a token may attend only to itself and earlier tokens.
        window: number of tokens a token attends to, including itself; None: no window.
        pattern: another sparse attention pattern; None: there is none.
        positions: source of positions ("rope", ...), or None.
        num_heads: H.
        max_tokens: the most tokens it accepts, or None.
        scale: factor on the scores; None: 1 / sqrt(head_dim).
        features: other features that exclude some laws ("sinks", ...).
        tokens: sequence length of most laws.
    """

    d_in: int
    causal: bool
    window: int | None = None
    pattern: Pattern | None = None
    positions: str | None = None
    num_heads: int | None = None
    max_tokens: int | None = None
    scale: float | None = None
    features: frozenset[str] = frozenset()
    tokens: int = 7
    how: dict[str, str] = field(default_factory=dict)

    def shown(self, T: int) -> Tensor:
        """(T, T) mask of these claims; True = may attend."""
        seen = band(T, self.causal, self.window)
        return seen if self.pattern is None else seen & self.pattern.shown(T)

    def lengths(self) -> list[int]:
        """Sequence lengths to try, the best first: longer than the window, and prime; then others,
        for modules that accept few lengths.
        """
        small_window = self.window is not None and self.window <= 12
        best = max(7, self.window + 4) if self.window is not None and small_window else 7
        wanted = (best, best + 1, best - 1, 16, self.max_tokens or best, 4, 2)
        most = self.max_tokens or 16
        return list(dict.fromkeys(min(n, most) for n in wanted))


class seeded:  # noqa: N801  (a context manager, named as one)
    """Run the block with seeded torch generators, then restore them."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.devices = [device] if device.type == "cuda" else []

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=self.devices)
        self._fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exception: Any) -> None:
        self._fork.__exit__(*exception)


class Subject:
    """Module as laws see it. The given module is never modified: laws work on copies.

    Args:
        module: the module under check.
        calling: how to call it.
        claims: the claims to check.
        seed: seed of every random number.
        dtype: dtype of most laws; float64 if the module supports it, to expose errors in any digit.
        compile: also check the compiled module.
        make: creates another instance with other weights, or None.
        weights: returns its weights by role, if the layout is not recognized.

    Attributes:
        runs_in_float64: True if it runs in float64.
        precision: dtype whose rounding error is allowed; not `dtype` if it computes in a narrower
            one internally, as many rotary embeddings do.
        longest: the most tokens of any call so far.
        unfilled: names of parameters that its constructor leaves uninitialized.
        deadline: `time.monotonic` after which no further call starts; None: no limit.
    """

    def __init__(
        self,
        module: nn.Module,
        calling: Calling,
        claims: Claims,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        compile: bool = False,
        make: Callable[[], nn.Module] | None = None,
        weights: Callable[[nn.Module], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.module = module
        self.calling = calling
        self.claims = claims
        self.seed = seed
        self.dtype = dtype
        self.compile = compile
        self.make = make
        self.weights = weights
        self.runs_in_float64 = True
        self.precision = dtype
        self.longest = 0
        self.deadline: float | None = None
        self.unfilled: Sequence[str] = ()
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))

    # Inputs and copies

    @property
    def T(self) -> int:
        """Sequence length of most laws."""
        return self.claims.tokens

    def input(self, B: int = 1, T: int | None = None, *, salt: int = 0) -> Tensor:
        """Random tokens (B, T, d_in) in `dtype`, the same for the same sizes and salt."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + salt)
        shape = (B, self.T if T is None else T, self.claims.d_in)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(self.device, self.dtype)

    def copy(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Copy of the module in evaluation mode."""
        # Not .to(dtype), which casts complex buffers (rotary tables) to real.
        cast = _CASTS[self.dtype if dtype is None else dtype]
        return cast(copied(self.module)).eval()

    @cached_property
    def exact(self) -> nn.Module:
        """Copy in evaluation mode that most laws call."""
        return self.copy()

    # Calls

    def call(self, module: nn.Module, x: Tensor, *, salt: int = 0, **options: Any) -> Result:
        """Call a copy, with a seeded torch generator so that dropout repeats."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime("its calls are too slow for the time limit of a law")
        # Other strides and modified inputs are tested by one law each.
        x = x if options.pop("as_it_is", False) else x.clone(memory_format=torch.contiguous_format)
        self.longest = max(self.longest, x.shape[1])
        with seeded(self.seed + salt, self.device):
            return self.calling(module, x, **options)

    def run(self, x: Tensor, **options: Any) -> Tensor:
        """Output of the copy in evaluation mode, without gradients."""
        with torch.no_grad():
            return self.call(self.exact, x, **options).output

    def takes(self, T: int) -> bool:
        """True if it accepts T tokens."""
        try:
            return self.run(self.input(1, T)).shape[1] == T
        except OutOfTime:
            raise
        except Exception:  # of unknown code
            return False

    def allowed(self, x: Tensor, dtype: torch.dtype | None = None) -> float:
        """Tolerance between two equal computations of the output for x."""
        dtype = self.precision if dtype is None else dtype
        return allowed_difference(self._response(x.shape[1], x.abs().max().item()), dtype)

    def _response(self, T: int, size: float) -> float:
        key = (T, round(size, 1))
        if key not in self._responses:
            x = self.input(1, T)
            x = x * (size / max(x.abs().max().item(), 1e-300))
            module, widest = self.exact, self.dtype
            if self.runs_in_float64 and self.dtype != torch.float64:
                module, widest = self._in_float64, torch.float64
            x = x.to(widest)
            self._responses[key] = response(lambda: self.call(module, x).output, self.seed, widest)
        return self._responses[key]

    @cached_property
    def _responses(self) -> dict[tuple[int, float], float]:
        return {}

    @cached_property
    def _in_float64(self) -> nn.Module:
        return self.copy(torch.float64)

    def forget(self) -> None:
        """Drop cached results after a change of dtype or calling convention."""
        for name in ("exact", "influence", "sees", "notes", "_responses"):
            self.__dict__.pop(name, None)

    # Shared by laws

    @cached_property
    def notes(self) -> dict[str, Any]:
        """Findings of helpers, by name, computed once."""
        return {}

    @cached_property
    def influence(self) -> Tensor:
        """(T, T) change of the output at token t when token s changes."""
        return self.influence_in(self.exact, torch.no_grad)

    def influence_in(
        self, module: nn.Module, grad_mode: Callable[[], Any], size: float = 1.0
    ) -> Tensor:
        """`influence` of a copy, in a gradient mode (torch.no_grad or torch.enable_grad), for
        inputs of a given size.
        """
        x, other = size * self.input(), size * self.input(salt=1)
        with grad_mode():
            before = self.call(module, x).output.detach()
            columns = []
            for s in range(x.shape[1]):
                changed = x.clone()
                changed[:, s] = other[:, s]
                after = self.call(module, changed).output.detach()
                columns.append(difference(after, before).amax(dim=(0, 2)))
        return torch.stack(columns, dim=1)

    @cached_property
    def sees(self) -> Tensor:
        """(T, T) True if the output at token t depends on token s, beyond rounding."""
        x = self.input()
        seen = self.influence > self.visible(x)
        ones = torch.ones_like(seen)
        if torch.equal(seen, ones) or torch.equal(seen, ones.tril()):
            return seen
        # Large scores put all weight on one token: smaller inputs reveal the others.
        small = self.influence_in(self.exact, torch.no_grad, 2**-5)
        return seen | (small > self.visible(2**-5 * x))

    def sees_in(self, T: int) -> Tensor:
        """`sees` for a sequence of T tokens."""
        x, other = self.input(1, T), self.input(1, T, salt=1)
        changed = torch.where(torch.eye(T, dtype=torch.bool, device=x.device)[..., None], other, x)
        before = self.run(x)
        after = torch.cat([self.run(rows) for rows in changed.split(17)])
        apart = difference(after, before).amax(dim=-1).T
        return apart > self.visible(x)

    def visible(self, x: Tensor) -> float:
        """Smallest change of an output that counts as dependence on another token.

        A masked token changes no bit. Therefore 0 works for modules that compute in half precision,
        where rounding error is as large as the influence of a token.
        """
        coarse = torch.finfo(self.precision).eps > torch.finfo(torch.float32).eps
        return 0.0 if coarse else self.allowed(x)

    def showing(self, hidden: Tensor) -> Tensor:
        """Mask (B, 1, T, T) that excludes these tokens, (B, T) True, for every query."""
        T = hidden.shape[1]
        shown = torch.ones(T, T, dtype=torch.bool)
        if self.claims.causal:
            shown = shown.tril()
        return (shown & ~hidden[:, None, None, :].cpu()).to(self.device)


def copied(module: nn.Module) -> nn.Module:
    """Deep copy, also of modules that keep tensors of earlier calls with their graph, or that
    were created in inference mode.
    """
    kept = [value for part in module.modules() for value in vars(part).values()]
    kept += [item for value in kept if isinstance(value, (list, tuple)) for item in value]
    memo: dict[int, Any] = {
        id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf
    }
    memo |= {id(t): t.clone() for t in (*kept, *module.buffers()) if _inferred(t)}
    memo |= {
        id(p): nn.Parameter(p.detach().clone(), p.requires_grad)
        for p in module.parameters()
        if _inferred(p)
    }
    return copy.deepcopy(module, memo)


def _inferred(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_inference()


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|; NaN equals NaN, and differs from every number by infinity."""
    far = torch.where(a.isnan() == b.isnan(), 0.0, float("inf")).to(a.dtype)
    return torch.where(a.isnan() | b.isnan(), far, (a - b).abs().nan_to_num(0.0, float("inf")))


def by(apart: Tensor) -> str:
    """Largest of several differences, formatted for "by 0.88"; NaN if one is not a number."""
    largest = apart.max().item()
    return f"{largest:.2g}" if largest < float("inf") else "NaN"
