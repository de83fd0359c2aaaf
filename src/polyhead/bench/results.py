"""What a run of the benchmark found: plain numbers and texts, as they go into the JSON file."""

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
    """One peer on one case. Without a time: `refused` says why.

    Attributes:
        name: the peer.
        ours: whether it is polyhead.
        backend: which kernel ran, where the peer chooses by itself.
        refused: why there is no time: it cannot run the case, or was wrong.
        wrong: whether it was wrong.
        milliseconds, lower, upper: median and quartiles of a call (of a token, for a decoder).
        samples: how many samples these are of.
        rate: work per second, in the case's unit.
        share: of the case's ceiling; 1 is all of it.
        memory_mib: the most memory held beyond inputs, weights and masks; None: not measured.
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
    """Something wanted of a case, and what was got: None where there is nothing to judge by."""

    what: str
    wanted: float
    got: float | None
    met: bool | None


@dataclass(frozen=True)
class CaseResult:
    """One case: its peers, and what came of it.

    Attributes:
        id, what: the case, and its sizes in words.
        tokens: T, which a plot against length needs.
        unit, ceiling: of the rates, and which ceiling the shares are of.
        gate: what the peers were held to.
        others_share: other processes' share of the processors meanwhile; None: not known.
        variants: the peers, polyhead first.
        targets: what was wanted.
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
        """Polyhead, if it was timed: the first of what is ours."""
        first = next((v for v in self.variants if v.ours), None)
        return first if first is not None and first.milliseconds else None

    @property
    def best_peer(self) -> VariantResult | None:
        """The fastest of the others."""
        timed = [v for v in self.variants if not v.ours and v.milliseconds]
        return min(timed, key=lambda v: v.milliseconds or 0.0, default=None)

    def speedup_over(self, name: str) -> float | None:
        """How many times as fast as this peer ("best": the best of them) polyhead is."""
        peer = self.best_peer
        if name != "best":
            peer = next((v for v in self.variants if v.name == name), None)
        if self.ours is None or peer is None or not peer.milliseconds:
            return None
        assert self.ours.milliseconds is not None
        return peer.milliseconds / self.ours.milliseconds


@dataclass(frozen=True)
class BenchResult:
    """A whole run.

    Attributes:
        machine: where.
        ceilings: the most this machine did, in the same run.
        cases: what was measured.
        warnings: what a reader of any number here must know.
        left_out: beginnings of the names of peers that were not asked.
        refusal: why the run stopped before its end, if it did.
    """

    machine: Machine
    ceilings: tuple[Ceiling, ...]
    cases: tuple[CaseResult, ...]
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether polyhead itself was wrong somewhere."""
        return any(v.ours and v.wrong for case in self.cases for v in case.variants)

    def to_json(self) -> str:
        """Everything, as one JSON object; `schema` counts its changes."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n"
