from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import polyhead as ph
from polyhead.backends import BACKENDS, BackendName
from polyhead.type_hints import signature_of

ROOT = Path(__file__).parent.parent
DOWNSTREAM = ROOT / "tests/acceptance/downstream.py"
WRONG = """\
import torch
import polyhead as ph

x = torch.ones(1, 4, 8)
mha = ph.MultiHeadAttention(8, 8, 4, 0.0, 2)
mha("text")
mha(x, return_aux=True)
mha(x, backend="cpu")
y: int = mha(x)
aux: ph.Aux = mha(x)
ph.MultiHeadAtention(8, 8, 4, 0.0, 2)
ph.integrations.transformers.PolyheadCash
ph.attention(x, x, x, backend=3)
"""
FIRST_WRONG = 6


def public_classes():
    parts = [ph, ph.check, ph.convert, ph.drop_in, ph.look, ph.positions]
    values = {getattr(part, name) for part in parts for name in part.__all__}
    return [value for value in values if isinstance(value, type)]


def readme_snippets() -> str:
    text = (ROOT / "README.md").read_text("utf-8")
    return "".join(example.source for example in doctest.DocTestParser().get_examples(text))


@pytest.fixture
def files(tmp_path):
    """The downstream file, README's snippets, and a file whose lines from the 6th are wrong."""
    (tmp_path / "readme.py").write_text(readme_snippets(), "utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, "utf-8")
    return [DOWNSTREAM, tmp_path / "readme.py", tmp_path / "wrong.py"]


def assert_only_the_wrong_lines(found: list[tuple[str, int]]) -> None:
    assert {name for name, _ in found} == {"wrong.py"}, found
    assert {line for _, line in found} == set(range(FIRST_WRONG, len(WRONG.splitlines()) + 1))


@pytest.mark.slow
def test_mypy_strict_accepts_downstream_and_readme(files):
    """Without this repository's configuration, so in a cache of its own."""
    options = ["--strict", "--config-file=", f"--cache-dir={ROOT}/.mypy_cache/downstream"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files],
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split(":") for line in run.stdout.splitlines() if ": error:" in line]
    assert lines, run.stdout + run.stderr
    assert_only_the_wrong_lines([(Path(line[0]).name, int(line[1])) for line in lines])


@pytest.mark.slow
def test_pyright_accepts_downstream_and_readme(files, tmp_path):
    """Not among the pinned packages, as it takes 280 MB with its node."""
    pyright = shutil.which("pyright") or shutil.which("basedpyright")
    if pyright is None:
        pytest.skip("pyright is not on the PATH")
    config = {
        "include": [str(file) for file in files],
        "extraPaths": [str(ROOT / "src"), *sys.path[1:]],
        "typeCheckingMode": "strict",
        "reportUnusedExpression": False,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), "utf-8")
    command = [pyright, "-p", str(tmp_path), "--pythonpath", sys.executable, "--outputjson"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [d for d in json.loads(run.stdout)["generalDiagnostics"] if d["severity"] == "error"]
    assert_only_the_wrong_lines(
        [(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found]
    )


def test_downstream_file_runs():
    run = subprocess.run([sys.executable, DOWNSTREAM], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[0] == "torch.Size([1, 4, 8]) torch.Size([1, 2, 4])"


def test_backend_name_lists_the_backends():
    assert typing.get_args(BackendName) == ("auto", *(backend.name for backend in BACKENDS))


def test_public_modules_type_their_call():
    """`signature_of(forward)` in each: `nn.Module` types its own to return Any."""
    modules = [value for value in public_classes() if issubclass(value, nn.Module)]
    assert len(modules) >= 6
    for module in modules:
        source = Path(sys.modules[module.__module__].__file__).read_text("utf-8")
        assert "@signature_of(forward)\n        def __call__(self" in source, module


def test_signature_of_at_run_time_raises():
    with pytest.raises(NotImplementedError, match="TYPE_CHECKING"):
        signature_of(len)
