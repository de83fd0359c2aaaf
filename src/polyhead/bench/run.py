"""Benchmark run: ceilings, then each case; its peers are checked, timed round-robin, compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from polyhead.bench.cases import Case
from polyhead.bench.gate import Gate, gate
from polyhead.bench.machine.ceilings import Ceiling, ceiling_loops, measure_ceilings
from polyhead.bench.machine.describe import describe_machine
from polyhead.bench.machine.measure import Timing, interleave
from polyhead.bench.machine.system_load import DisturbedError, check_quiet, quietly
from polyhead.bench.memory import peak_mebibytes
from polyhead.bench.peers.attention import Peer, Run
from polyhead.bench.peers.registry import peers_of
from polyhead.bench.results import BenchResult, CaseResult, Target, VariantResult

__all__ = ["Settings", "run_bench"]

# A peer that is this many times slower than the fastest, and takes this long, is not measured.
_HOPELESS = 20
_HOPELESS_SECONDS = 1.0

# Called with the current step, and the fraction of the whole run that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark run.

    Attributes:
        rounds: the minimum number of rounds per case.
        seconds: the minimum seconds per case.
        threads: for every peer; None: torch's setting.
        memory: True to measure peak memory too, each peer in a separate process.
        anyway: measure although other processes are busy.
        shrink: divide batch, heads and tokens by this: a trial of the benchmark itself.
        without: names of peers that are left out.
        seed: of the inputs.
    """

    rounds: int = 7
    seconds: float = 10.0
    threads: int | None = None
    memory: bool = False
    anyway: bool = False
    shrink: int = 1
    without: tuple[str, ...] = ()
    seed: int = 0


def run_bench(
    cases: tuple[Case, ...],
    settings: Settings,
    progress: Progress = lambda step, done: None,
) -> BenchResult:
    """Measure the cases. After a disturbance or Ctrl-C, results so far are kept; see `refusal`.

    Args:
        cases: the cases, at full size.
        settings: the settings.
        progress: called before each step.

    Raises:
        DisturbedError: other processes were busy before anything was measured.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    progress("the load of this machine", 0.0)
    if not settings.anyway:
        check_quiet()
    progress("the ceilings of this machine", 0.0)
    ceilings, share = quietly(lambda: _ceilings(settings), anyway=settings.anyway)
    warnings = _warnings(settings, share)
    results: list[CaseResult] = []
    refusal, interrupted = None, False
    for i, case in enumerate(cases):

        def step(what: str, done: float, i: int = i, case: Case = case) -> None:
            progress(f"{case.id}: {what}", (i + done) / len(cases))

        try:
            results.append(run_case(case.shrunk(settings.shrink), settings, ceilings, step))
        except DisturbedError as error:
            refusal = f"{case.id}: {error}"
            break
        except KeyboardInterrupt:
            refusal, interrupted = f"{case.id}: interrupted", True
            break
    return BenchResult(
        describe_machine(),
        tuple(ceilings.values()),
        tuple(results),
        warnings,
        settings.without,
        refusal,
        interrupted,
    )


def _ceilings(settings: Settings) -> dict[str, Ceiling]:
    features = describe_machine().features
    if settings.shrink > 1:
        trial = ceiling_loops(features, size=128, megabytes=1, steps=100)
        return measure_ceilings(trial, seconds=0.0)
    return measure_ceilings(ceiling_loops(features))


def _warnings(settings: Settings, share: float | None) -> tuple[str, ...]:
    warnings = []
    if settings.anyway:
        warnings.append(
            "measured with --anyway: other processes may have been busy, do not trust these numbers"
        )
    if share is None:
        warnings.append("this system does not report the load by other processes")
    if settings.shrink > 1:
        warnings.append(f"sizes divided by {settings.shrink}: a trial, not a measurement")
    return tuple(warnings)


def run_case(
    case: Case,
    settings: Settings,
    ceilings: Mapping[str, Ceiling],
    progress: Progress = lambda step, done: None,
) -> CaseResult:
    """Check all peers of a case, measure the correct ones, evaluate the targets.

    Raises:
        DisturbedError: other processes were busy in every attempt.
    """
    peers = [peer for peer in peers_of(case) if peer.name not in settings.without]
    reasons = {peer: peer.why_not(case) for peer in peers}
    if all(reasons.values()):  # such as a package that is missing: there is no exact result either
        unmeasured = [VariantResult(p.name, p.ours, refused=tuple(reasons[p])) for p in peers]
        return _result(case, settings, "nothing ran", None, unmeasured)
    # Compiled code of other cases counts toward the recompilation limit.
    torch.compiler.reset()
    progress("preparing", 0.0)
    inputs = [case.inputs(settings.seed + i) for i in range(case.copies)]
    with torch.set_grad_enabled(case.train):
        runs = {
            peer: [peer.prepare(case, copy) for copy in inputs]
            for peer in peers
            if not reasons[peer]
        }
        progress("checking against float64", 0.1)
        verdict = gate(case, {peer: copies[0] for peer, copies in runs.items()}, inputs[0])
        slow = too_slow(case, list(runs), verdict.seconds)
        calls = {
            peer.name: _in_turn(copies)
            for peer, copies in runs.items()
            if not verdict.faults(peer.name) and peer not in slow
        }
        timings, share = quietly(
            lambda: interleave(
                calls,
                rounds=settings.rounds,
                seconds=settings.seconds,
                progress=lambda done: progress("measuring", 0.2 + 0.8 * done),
            ),
            anyway=settings.anyway,
        )
    variants = []
    for peer in peers:
        refused = (*reasons[peer], *((slow[peer],) if peer in slow else ()))
        variant = VariantResult(peer.name, peer.ours, refused=refused)
        if not refused:
            variant = _variant(peer, case, verdict, timings, ceilings)
        if settings.memory and variant.milliseconds:
            progress(f"memory of {peer.name}", 1.0)
            mebibytes = peak_mebibytes(case.id, peer.name, settings.shrink)
            variant = replace(variant, memory_mib=mebibytes)
        variants.append(variant)
    return _result(case, settings, verdict.scope, share, variants)


def _result(
    case: Case,
    settings: Settings,
    scope: str,
    share: float | None,
    variants: Sequence[VariantResult],
) -> CaseResult:
    result = CaseResult(
        id=case.id,
        what=str(case),
        tokens=case.T,
        unit=case.unit,
        ceiling=case.ceiling,
        gate=scope,
        others_share=share,
        variants=tuple(variants),
        targets=(),
    )
    return result if settings.shrink > 1 else replace(result, targets=judge(case, result))


def too_slow(case: Case, peers: list[Peer], seconds: Mapping[str, float]) -> dict[Peer, str]:
    """Return peers that are too slow to measure, each with the reason.

    Exempt are polyhead, peers named in a target, and peers that compile in their first call.
    """
    known = [peer for peer in peers if not peer.ours and not peer.compiles]
    least = min((seconds[peer.name] for peer in known), default=0.0)
    return {
        peer: f"its first call took {seconds[peer.name]:.1f} s, over {_HOPELESS} times the fastest"
        for peer in known
        if peer.name not in case.targets
        and seconds[peer.name] > max(_HOPELESS * least, _HOPELESS_SECONDS)
    }


def _in_turn(copies: list[Run]) -> Callable[[], object]:
    if len(copies) == 1:
        return copies[0]
    endless = itertools.cycle(copies)
    return lambda: next(endless)()


def _variant(
    peer: Peer,
    case: Case,
    verdict: Gate,
    timings: Mapping[str, Timing],
    ceilings: Mapping[str, Ceiling],
) -> VariantResult:
    variant = VariantResult(peer.name, peer.ours, peer.backend(case))
    faults = verdict.faults(peer.name)
    if faults:
        return replace(variant, refused=tuple(str(fault) for fault in faults), wrong=True)
    timing = timings[peer.name]
    seconds = timing.median / case.tokens
    lower, upper = timing.quartiles
    rate = None if case.work is None else case.work / seconds / 1e9
    share = None
    if rate is not None and case.ceiling is not None:
        share = rate / ceilings[case.ceiling].giga_per_second
    return replace(
        variant,
        milliseconds=seconds * 1e3,
        lower=lower / case.tokens * 1e3,
        upper=upper / case.tokens * 1e3,
        samples=len(timing.samples),
        rate=rate,
        share=share,
    )


def judge(case: Case, result: CaseResult) -> tuple[Target, ...]:
    """Compare the targets of the case with its results."""
    targets = []
    for name, wanted in case.targets.items():
        peer = "the best peer" if name == "best" else name
        got = result.speedup_over(name)
        targets.append(Target(f"times as fast as {peer}", wanted, got, _reached(got, wanted)))
    ours = result.ours
    if case.target_share is not None:
        got = None if ours is None else ours.share
        what = f"of the ceiling ({case.ceiling})"
        targets.append(Target(what, case.target_share, got, _reached(got, case.target_share)))
    if case.target_us is not None:
        got = None if ours is None or ours.milliseconds is None else ours.milliseconds * 1e3
        met = None if got is None else got <= case.target_us
        targets.append(Target("us at most", case.target_us, got, met))
    return tuple(targets)


def _reached(got: float | None, wanted: float) -> bool | None:
    return None if got is None else got >= wanted
