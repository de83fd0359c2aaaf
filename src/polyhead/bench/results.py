"""Benchmark results: plain numbers and strings, as in the JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from polyhead.bench.machine.ceilings import Ceiling
from polyhead.bench.machine.describe import Machine

__all__ = ["SCHEMA", "BenchResult", "CaseResult", "Target", "VariantResult"]

SCHEMA = 1


@dataclass(frozen=True)
class VariantResult:
    """Result of one peer on one case; without a time, `refused` has the reasons.

    Attributes:
        name: the peer.
        ours: True for polyhead.
        backend: the kernel that ran, where the peer chooses between several.
        refused: reasons for not measuring it: it cannot run the case, or was wrong.
        wrong: True if it was wrong.
        milliseconds, lower, upper: median and quartiles per call (per token, for a decoder).
        samples: the number of samples.
        rate: work per second, in the case's unit.
        share: of the case's ceiling; 1 is all of it.
        memory_mib: peak memory beyond inputs, weights and masks; None: not measured.
    """

    name: str
    ours: bool
    backend: str = ""
    refused: tuple[str, ...] = ()
    wrong: bool = False
    milliseconds: float | None = None
    lower: float | None = None
    upper: float | None = None
    samples: int = 0
    rate: float | None = None
    share: float | None = None
    memory_mib: float | None = None


@dataclass(frozen=True)
class Target:
    """One target of a case and the value got; None if it was not measured."""

    what: str
    wanted: float
    got: float | None
    met: bool | None


@dataclass(frozen=True)
class CaseResult:
    """Results of one case.

    Attributes:
        id, what: the case, and its description with sizes.
        tokens: T, for plots against length.
        unit, ceiling: the unit of the rates, and the ceiling of the shares.
        gate: the scope of the correctness gate.
        others_share: other processes' share of the processors meanwhile; None: not known.
        variants: the peers, polyhead first.
        targets: the targets, with the values got.
    """

    id: str
    what: str
    tokens: int
    unit: str | None
    ceiling: str | None
    gate: str
    others_share: float | None
    variants: tuple[VariantResult, ...]
    targets: tuple[Target, ...]

    @property
    def ours(self) -> VariantResult | None:
        """The first variant that is polyhead's, if it was timed."""
        first = next((v for v in self.variants if v.ours), None)
        return first if first is not None and first.milliseconds else None

    @property
    def best_peer(self) -> VariantResult | None:
        """The fastest peer."""
        timed = [v for v in self.variants if not v.ours and v.milliseconds]
        return min(timed, key=lambda v: v.milliseconds or 0.0, default=None)

    def speedup_over(self, name: str) -> float | None:
        """Speed-up of polyhead over this peer ("best": the fastest)."""
        peer = self.best_peer
        if name != "best":
            peer = next((v for v in self.variants if v.name == name), None)
        if self.ours is None or peer is None or not peer.milliseconds:
            return None
        assert self.ours.milliseconds is not None
        return peer.milliseconds / self.ours.milliseconds


@dataclass(frozen=True)
class BenchResult:
    """Results of a whole run.

    Attributes:
        machine: the machine.
        ceilings: its measured maxima, in the same run.
        cases: the results of each case.
        warnings: caveats that apply to every number here.
        left_out: names of peers that were left out.
        refusal: the reason why the run stopped early, if it did.
        interrupted: True if it was Ctrl-C.
    """

    machine: Machine
    ceilings: tuple[Ceiling, ...]
    cases: tuple[CaseResult, ...]
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    refusal: str | None = None
    interrupted: bool = False

    @property
    def wrong(self) -> bool:
        """True if polyhead was wrong in any case."""
        return any(v.ours and v.wrong for case in self.cases for v in case.variants)

    def to_json(self) -> str:
        """Return all results as one JSON object; `schema` is its version."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n"
