"""Peak memory of a call, beyond its inputs, weights and masks.

Each peer runs in a separate process: it prepares the call, resets the kernel's high-water mark of
resident memory, and reports by how much one call raises it. In a shared process, memory kept by
the allocator from an earlier call would hide some of the next call's.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch

from polyhead.bench.peers.registry import peers_of
from polyhead.bench.suites import find_cases
from polyhead.errors import ArgumentError, PolyheadError

__all__ = ["MemoryProbeError", "check_memory_is_told", "measure_here", "peak_mebibytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class MemoryProbeError(PolyheadError):
    """A memory-measuring process failed."""


def check_memory_is_told() -> None:
    """Raise ArgumentError on a system that does not report a process's peak memory."""
    if not (_STATUS.exists() and _CLEAR.exists()):
        raise ArgumentError(
            "--memory",
            "must be used on Linux, which reports peak memory",
            sys.platform,
            "leave it out",
        )


def peak_mebibytes(case_id: str, peer_name: str, shrink: int) -> float:
    """Measure the peak memory of one call, in a fresh process.

    Args:
        case_id: an id in `polyhead.bench.suites.CASES`.
        peer_name: a peer that can run it.
        shrink: as in `Settings`.

    Raises:
        MemoryProbeError: that process failed; the message ends with its last line of stderr.
    """
    arguments = [case_id, peer_name, str(shrink), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-c", f"import {__name__} as probe; probe.tell()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        # Freed blocks return to the system at once, so that they are not reused uncounted.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise MemoryProbeError(
            f"the process that measures {peer_name}'s memory on {case_id} must succeed; got exit "
            f"code {done.returncode}: {said[0]}; leave out --memory, or --case {case_id}"
        )
    return float(done.stdout)


def measure_here(case_id: str, peer_name: str, shrink: int) -> float:
    """Return the mebibytes by which one call raises this process's peak."""
    case = find_cases((case_id,))[0].shrunk(shrink)
    peer = next(peer for peer in peers_of(case) if peer.name == peer_name)
    with torch.set_grad_enabled(case.train):
        # Memory that libraries allocate at their first call does not count.
        small = case.shrunk(16)
        peer.prepare(small, small.inputs(0))()
        run = peer.prepare(case, case.inputs(0))
        if peer.compiles:
            run()
        _give_back()
        _CLEAR.write_text("5", encoding="ascii")
        before = _kibibytes("VmRSS")
        run()
        return (_kibibytes("VmHWM") - before) / 1024


def tell() -> None:
    """Entry point of the separate process: measure the case in its arguments, print the result."""
    case_id, peer_name, shrink, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(measure_here(case_id, peer_name, int(shrink)))


def _give_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kibibytes(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise MemoryProbeError(f"/proc/self/status must have {name}; got none; leave out --memory")
