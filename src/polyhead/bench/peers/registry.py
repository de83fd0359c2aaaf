"""Registry of peers: those of each case, and the eager one that gives the float64 result."""

from __future__ import annotations

from polyhead.bench.cases import Case
from polyhead.bench.peers.attention import EAGER, OUTPUT_ONLY, POLYHEAD, SDPA, Peer
from polyhead.bench.peers.cached import CACHES
from polyhead.bench.peers.engines import ONNX_RUNTIME, OPENVINO
from polyhead.bench.peers.flex import FLEX
from polyhead.bench.peers.generate import GENERATORS, HF_EAGER
from polyhead.bench.peers.models import AS_IT_IS, MODELS
from polyhead.bench.peers.modules import MODULES, OWN_CLASS

__all__ = ["definition_of", "peers_of"]

_ATTENTION = (POLYHEAD, SDPA, FLEX, EAGER, ONNX_RUNTIME, OPENVINO)


def peers_of(case: Case) -> tuple[Peer, ...]:
    """Return the peers of a case, polyhead first.

    >>> from polyhead.bench.suites import find_cases
    >>> [peer.name for peer in peers_of(find_cases(("P2",))[0])]
    ['polyhead', 'sdpa', 'flex', 'eager', 'ONNX Runtime', 'OpenVINO']
    """
    if case.kind == "module":
        return MODULES
    if case.kind == "generate":
        return GENERATORS
    if case.kind == "model":
        return MODELS
    if case.statistics:
        return (POLYHEAD, OUTPUT_ONLY)
    return CACHES if case.cached else _ATTENTION


def definition_of(case: Case) -> Peer:
    """Return the eager peer of a case, whose float64 run is the exact result."""
    return {
        "attention": EAGER,
        "module": OWN_CLASS,
        "generate": HF_EAGER,
        "model": AS_IT_IS,
    }[case.kind]
