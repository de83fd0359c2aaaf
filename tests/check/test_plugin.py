"""The pytest plugin, as pytest loads it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_one_test_a_law_beside_the_others(tmp_path):
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    target = f"{ROOT / 'tests/check/broken/masks.py'}:Inverted"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "pytest_polyhead",
        "-q",
        "-rf",
        "-p",
        "no:xdist",
    ]
    result = subprocess.run(
        [*command, "--attention", target, "--attention-arg", "context_length=12", "test_own.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "::no_future_leak" in result.stdout
    assert "inverted mask" in result.stdout
    assert "passed" in result.stdout


def test_importing_the_plugin_does_not_import_torch():
    code = "import sys, pytest_polyhead; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT / "src").returncode == 0
    )
