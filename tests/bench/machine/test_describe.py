"""Machine description."""

import torch

from polyhead.bench.machine import describe as machine
from polyhead.bench.machine.describe import available_bytes, describe_machine

CPUINFO = """\
processor\t: 0
model name\t: Some CPU 9000
flags\t\t: fpu avx2 fma avx512f amx_bf16

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu
"""


def test_describe_machine_on_linux(monkeypatch, tmp_path):
    files = {"cpuinfo": CPUINFO, "meminfo": "MemTotal: 2097152 kB\nMemAvailable: 1024 kB\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.rpartition("/")[2])
    here = describe_machine()
    assert (here.cpu, here.features) == ("Some CPU 9000", ("avx2", "fma", "avx512f", "amx_bf16"))
    assert here.threads == torch.get_num_threads()
    assert here.versions["torch"] == torch.__version__
    assert here.memory_gib == 2.0
    assert "Some CPU 9000, " in str(here)
    assert "2 GiB, avx2 fma avx512f amx_bf16" in str(here)
    assert available_bytes() == 1024 * 1024


def test_describe_machine_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "none")
    assert describe_machine().memory_gib is None
    assert "features unknown" in str(describe_machine())
    assert available_bytes() is None
