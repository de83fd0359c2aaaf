"""The pytest plugin, as pytest loads it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONS = ("-p", "no:cacheprovider", "-q", "-rf", "--rootdir")


def run(folder, *targets):
    targets = [word for target in targets for word in ("--attention", target)]
    return pytest.main([*OPTIONS, str(folder), str(folder), *targets])


def test_one_test_a_law_beside_the_others(tmp_path, capsys):
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    assert run(tmp_path, f"{ROOT / 'tests/check/broken/masks.py'}:Inverted") == 1
    out = capsys.readouterr().out
    assert "::no_future_leak" in out
    assert "inverted mask" in out
    assert "passed" in out


def test_a_target_that_cannot_be_checked_is_one_message(tmp_path, capsys):
    assert run(tmp_path, "nowhere.py:X") == pytest.ExitCode.USAGE_ERROR
    assert "must name a file that exists" in capsys.readouterr().err


def test_importing_the_plugin_does_not_import_torch():
    code = "import sys, pytest_polyhead; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT / "src").returncode == 0
    )
