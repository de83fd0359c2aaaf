"""Machine description: processor, versions, threads, free memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["Machine", "available_bytes", "describe_machine"]

# The instruction sets that decide how fast attention can be.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2"),
)
_PACKAGES = ("polyhead", "torch", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Machine:
    """Hardware and software of a measurement, as needed to compare it with others."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    memory_gib: float | None
    system: str
    python: str
    versions: dict[str, str]
    torch_capability: str

    def __str__(self) -> str:
        memory = "" if self.memory_gib is None else f", {self.memory_gib:.0f} GiB"
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        features = " ".join(self.features) or "features unknown"
        return (
            f"{self.cpu}, {self.cores} cores{memory}, {features}\n"
            f"{self.system}, Python {self.python}, {versions}\n"
            f"{self.threads} threads, torch's kernels for {self.torch_capability}"
        )


def describe_machine() -> Machine:
    """Describe this machine in its current configuration."""
    info = _fields(Path("/proc/cpuinfo"))
    flags = info.get("flags", info.get("Features", "")).split()
    total = _kibibytes("MemTotal")
    return Machine(
        cpu=info.get("model name", platform.processor() or platform.machine()),
        features=tuple(name for name in _FEATURES if name in flags),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=None if total is None else round(total / 2**20, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: number for name in _PACKAGES if (number := _version(name)) is not None},
        torch_capability=torch.backends.cpu.get_cpu_capability(),
    )


def available_bytes() -> int | None:
    """Return the memory available to new tensors, or None where it is not known."""
    kibibytes = _kibibytes("MemAvailable")
    return None if kibibytes is None else kibibytes * 1024


def _kibibytes(name: str) -> int | None:
    text = _fields(Path("/proc/meminfo")).get(name)
    return None if text is None else int(text.split()[0])


def _fields(path: Path) -> dict[str, str]:
    """Parse `name: value` lines of a Linux file, the first of each name; empty elsewhere."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
