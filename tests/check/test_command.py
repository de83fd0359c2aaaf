"""`polyhead check` from the command line."""

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from polyhead.cli import main

MASKS = Path(__file__).parent / "broken/masks.py"


def run(*args):
    return CliRunner().invoke(main, ["check", *map(str, args)])


def test_check_of_a_right_module_exits_with_0():
    result = run(f"{MASKS}:Window", "--arg", "window=3", "--causal")
    assert result.exit_code == 0, result.output
    assert "holds    window_counts_its_tokens" in result.stdout
    assert "causal: yes (given)" in result.stdout


def test_check_of_a_broken_module_exits_with_1(tmp_path):
    junit = tmp_path / "junit.xml"
    result = run(f"{MASKS}:Inverted", "--junit", junit)
    assert result.exit_code == 1
    assert "the future leaks" in result.stdout
    assert "Probable cause: inverted mask" in result.stdout
    assert 'name="no_future_leak"' in junit.read_text()


def test_check_json_with_only_reports_one_law():
    result = run(f"{MASKS}:Inverted", "--json", "--only", "no_future_leak")
    report = json.loads(result.stdout)
    assert [law["law"] for law in report["laws"]] == ["no_future_leak"]
    assert not report["ok"]


def test_check_of_a_function_exits_with_0():
    name = "torch.nn.functional:scaled_dot_product_attention"
    result = run(name, "--only", "plain_calls_are_right")
    assert result.exit_code == 0, result.output


def test_list_prints_requirements():
    result = run("--list")
    assert result.exit_code == 0
    assert "  no_future_leak\n      In a causal module" in result.stdout


def test_timeout_is_reported_and_exits_with_2(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\nfrom torch import nn\n"
        "class Slow(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        time.sleep(60 if x.shape[0] == 3 else 0)\n"
        "        return super().forward(x)\n"
    )
    sizes = ("--arg", "in_features=4", "--arg", "out_features=4")
    only = ("--only", "batch_rows_are_independent", "--only", "batch_rows_permute")
    result = run(f"{path}:Slow", *sizes, *only, "--timeout", "6")
    assert result.exit_code == 2, result.output
    assert "not run  batch_rows_are_independent, batch_rows_permute: time limit" in result.stdout


HOSTILE = """
import sys
import torch
from torch import nn

class Prints(nn.Linear):
    def forward(self, x):
        print("hello")
        return super().forward(x)

class Exits(nn.Linear):
    def forward(self, x):
        sys.exit(0)

class GivesANumber(nn.Linear):
    def forward(self, x):
        return super().forward(x).sum()
"""
SIZES = ("--arg", "in_features=8", "--arg", "out_features=8")


def test_target_output_goes_to_stderr(tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    only = ("--only", "output_is_finite")
    result = run(f"{tmp_path / 'hostile.py'}:Prints", *SIZES, "--json", *only)
    assert json.loads(result.stdout)["ok"]
    assert "hello" in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("Exits", "7 tokens of 8: SystemExit"), ("GivesANumber", "is not (1, 7, features)")],
)
def test_call_without_output_exits_with_2(tmp_path, name, message):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    result = run(f"{tmp_path / 'hostile.py'}:{name}", *SIZES)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("source", "message"),
    [("import sys; sys.exit(0)", "SystemExit"), ("class X(", "SyntaxError"), ("1 / 0", "Zero")],
)
def test_unloadable_file_exits_with_2(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    result = run(f"{tmp_path / 'bad.py'}:X")
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("torch.nn.functional:scaled_dot_product_attention", "--causal"), "--causal is for mod"),
        ((f"{MASKS}:Window", "--timeout", "0"), "Invalid value for '--timeout'"),
        ((), "give a TARGET"),
        (("nowhere.py:X",), "must name a file that exists"),
        ((f"{MASKS}:Window", "--arg", "window"), "--arg must be NAME=VALUE"),
        ((f"{MASKS}:Window", "--only", "no_law"), "only must name laws"),
        ((f"{MASKS}:Window", "--junit", "no-folder/x.xml"), "there is no folder"),
    ],
)
def test_bad_usage_prints_one_message_and_exits_with_2(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


UNJUDGED = """
import signal
from torch import nn

class RaisesInInit(nn.Linear):
    def __init__(self, in_features=8):
        raise RuntimeError("no weights here\\nand a second line")

class RaisesInForward(nn.Linear):
    def forward(self, x):
        raise ValueError("the moon is full\\nand a second line")

class RaisesWhenCopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("may not be copied")

class Hidden(nn.Linear):
    def __getattr__(self, name):
        if name == "config":
            raise RuntimeError("no configuration\\nhere")
        return super().__getattr__(name)

class Stops(nn.Linear):
    def __init__(self, in_features=8):
        signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RaisesInInit", "RuntimeError: no weights here from RaisesInInit()"),
        (
            "RaisesInForward",
            "forward must return an output for tokens of some size, and raised for",
        ),
        ("RaisesInForward", "got 7 tokens of 8: ValueError: the moon is full; 8 tokens"),
        ("RaisesWhenCopied", "RuntimeError: may not be copied"),
        ("Hidden", "RuntimeError: no configuration"),
        ("NotThere", "must name something in"),
    ],
)
def test_unjudged_target_prints_one_line_and_exits_with_2(tmp_path, name, message):
    (tmp_path / "unjudged.py").write_text(UNJUDGED)
    result = run(f"{tmp_path / 'unjudged.py'}:{name}", *(SIZES if "Init" not in name else ()))
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert message in lines[0]


@pytest.fixture
def sigint():
    """SIGINT raises KeyboardInterrupt, also where tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_before_the_first_law_exits_with_130(tmp_path):
    (tmp_path / "unjudged.py").write_text(UNJUDGED)
    result = run(f"{tmp_path / 'unjudged.py'}:Stops")
    assert result.exit_code == 130
    assert "stopped by the user" in result.stderr


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_in_a_law_prints_results_and_exits_with_130(tmp_path):
    (tmp_path / "stops.py").write_text(
        "import signal\nfrom torch import nn\n"
        "class Stops(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if x.shape[0] == 3:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "        return super().forward(x)\n"
    )
    only = ("--only", "output_is_finite", "--only", "batch_rows_permute")
    result = run(f"{tmp_path / 'stops.py'}:Stops", *SIZES, *only)
    assert result.exit_code == 130, result.output
    assert "not run  batch_rows_permute" in result.stdout


def test_relative_import_error_names_the_package(tmp_path, monkeypatch):
    """The printed remedy works."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text("")
    (inner.parent / "sizes.py").write_text("SIZE = 8\n")
    (inner / "layer.py").write_text(
        "from torch import nn\nfrom ..sizes import SIZE\n"
        "class Layer(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(SIZE, SIZE)\n"
    )
    result = run(f"{inner / 'layer.py'}:Layer")
    assert result.exit_code == 2
    remedy = f"polyhead check outer.inner.layer:Layer, run in {tmp_path}"
    assert remedy in result.stderr
    monkeypatch.chdir(tmp_path)
    assert run("outer.inner.layer:Layer", "--only", "output_is_finite").exit_code == 0


def test_missing_package_error_names_the_package(tmp_path):
    (tmp_path / "needs.py").write_text("import no_such_package_here\n")
    result = run(f"{tmp_path / 'needs.py'}:X")
    assert result.exit_code == 2
    assert "install no_such_package_here" in result.stderr


def test_help_documents_configuration_values():
    assert "config.NAME=VALUE" in run("--help").stdout
