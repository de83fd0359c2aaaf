"""`polyhead check`, as it is typed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from polyhead.cli import main

MASKS = Path(__file__).parent / "broken/masks.py"


def run(*args):
    return CliRunner().invoke(main, ["check", *map(str, args)])


def test_a_right_one_exits_with_0():
    result = run(f"{MASKS}:Window", "--arg", "window=3", "--causal")
    assert result.exit_code == 0, result.output
    assert "holds    window_counts_its_tokens" in result.stdout
    assert "causal: yes (you said so)" in result.stdout


def test_a_broken_one_exits_with_1_and_says_why(tmp_path):
    junit = tmp_path / "junit.xml"
    result = run(f"{MASKS}:Inverted", "--junit", junit)
    assert result.exit_code == 1
    assert "the future leaks" in result.stdout
    assert "Probable cause: inverted mask" in result.stdout
    assert 'name="no_future_leak"' in junit.read_text()


def test_json_and_only():
    result = run(f"{MASKS}:Inverted", "--json", "--only", "no_future_leak")
    report = json.loads(result.stdout)
    assert [law["law"] for law in report["laws"]] == ["no_future_leak"]
    assert not report["ok"]


def test_a_function():
    name = "torch.nn.functional:scaled_dot_product_attention"
    result = run(name, "--only", "plain_calls_are_right")
    assert result.exit_code == 0, result.output


def test_the_list_names_every_law():
    result = run("--list")
    assert result.exit_code == 0
    assert "  no_future_leak\n      In a causal module" in result.stdout


def test_time_that_is_up_is_said_and_exits_with_2(tmp_path):
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
    result = run(f"{path}:Slow", *sizes, *only, "--timeout", "1")
    assert result.exit_code == 2, result.output
    assert "not run  batch_rows_are_independent, batch_rows_permute: time was up" in result.stdout


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


def test_what_a_target_prints_is_not_the_report(tmp_path):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    only = ("--only", "output_is_finite")
    result = run(f"{tmp_path / 'hostile.py'}:Prints", *SIZES, "--json", *only)
    assert json.loads(result.stdout)["ok"]
    assert "hello" in result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("Exits", "7 tokens of 8: SystemExit"), ("GivesANumber", "is not (1, 7, features)")],
)
def test_a_call_that_gives_nothing_is_no_success(tmp_path, name, message):
    (tmp_path / "hostile.py").write_text(HOSTILE)
    result = run(f"{tmp_path / 'hostile.py'}:{name}", *SIZES)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("source", "message"),
    [("import sys; sys.exit(0)", "SystemExit"), ("class X(", "SyntaxError"), ("1 / 0", "Zero")],
)
def test_a_file_that_does_not_load_is_no_success(tmp_path, source, message):
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
def test_bad_usage_is_one_message_and_exit_code_2(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
