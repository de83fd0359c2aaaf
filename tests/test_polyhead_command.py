"""The command as a process: what it imports, and how it ends."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time

import click
import pytest
import torch
from click.testing import CliRunner

import polyhead_command
from polyhead.errors import ArgumentError, ConversionError
from polyhead_command.wording import in_options

RUN = "import polyhead_command; polyhead_command.entry()"


def run(*arguments, code=RUN, **options):
    options = {"capture_output": True, "text": True, "check": False, **options}
    return subprocess.run([sys.executable, "-c", code, *arguments], **options)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_torch(argument):
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {RUN}"
    result = run(argument, code=code)
    assert result.returncode == 0
    assert result.stdout.endswith("\nFalse\n")
    assert importlib.metadata.version("polyhead") in run("--version").stdout


def test_help_and_version_take_less_than_0_3_s():
    def seconds():
        start = time.perf_counter()
        run("--help")
        return time.perf_counter() - start

    empty = min(_seconds_of_python() for _ in range(5))
    # Of Python alone on this machine at this moment, and the 0.3 s of a quiet one.
    assert min(seconds() for _ in range(5)) < max(0.3, 6 * empty)


def _seconds_of_python():
    start = time.perf_counter()
    run(code="pass")
    return time.perf_counter() - start


@pytest.mark.parametrize("name", polyhead_command._COMMANDS)
def test_every_command_listed_is_there(name):
    context = click.Context(polyhead_command.main)
    command = polyhead_command.main.get_command(context, name)
    assert command.name == name
    assert command.help


PLANTED = """\
import sys, types, click, polyhead_command
module = types.ModuleType("polyhead.cli.run")
@click.command("run")
def run_command():
    {body}
module.run_command = run_command
polyhead_command.importlib = types.SimpleNamespace(import_module=lambda name: module)
polyhead_command.entry()
"""


def test_ctrl_c_in_a_command_is_one_line_and_130():
    result = run("run", code=PLANTED.format(body="raise KeyboardInterrupt"))
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "polyhead: interrupted\n"


def test_ctrl_c_while_the_command_loads_is_one_line_and_130():
    code = PLANTED.replace("lambda name: module", "None").replace(
        "polyhead_command.entry()",
        "def load(name): raise KeyboardInterrupt\n"
        "polyhead_command.importlib.import_module = load\npolyhead_command.entry()",
    )
    result = run("run", code=code.format(body="pass"))
    assert (result.returncode, result.stderr) == (130, "polyhead: interrupted\n")


def test_sigterm_lets_the_command_remove_its_files(tmp_path):
    part = tmp_path / "part"
    body = (
        f"import time; open({str(part)!r}, 'w').close()\n"
        "    try: print('at work', flush=True); time.sleep(60)\n"
        f"    finally: __import__('os').remove({str(part)!r})"
    )
    command = [sys.executable, "-c", PLANTED.format(body=body), "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert not part.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = run("--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr == "polyhead: No space left on device\n"


def test_closed_pipe_is_silent():
    read, write = os.pipe()
    os.close(read)
    code = PLANTED.format(body="[print('x' * 4096) for _ in range(100)]")
    result = run("run", code=code, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_polyheads_errors_are_one_line_and_2():
    body = "import polyhead.errors as e; raise e.ModelError('no such model')"
    result = run("run", code=PLANTED.format(body=body))
    assert (result.returncode, result.stderr) == (2, "polyhead: no such model\n")


# The library's errors in the words of a command


@click.command()
@click.argument("output")
@click.option("--from", "source")
@click.option("--heads", "num_heads")
@click.option("--d-in", type=int)
@click.option("--force", "overwrite", is_flag=True)
@click.option("--causal/--bidirectional")
def planted(**options):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ArgumentError("output", "must not exist", "output", "pass overwrite=True"),
            "OUTPUT must not exist; got output; pass --force",
        ),
        (
            ArgumentError("source", "must differ from source='split'", "num_heads", "pass d_in="),
            "--from must differ from --from 'split'; got num_heads; pass --d-in",
        ),
        (
            ArgumentError("--arg", "must give num_heads", "1", "add --arg num_heads=VALUE"),
            "--arg must give num_heads; got 1; add --arg num_heads=VALUE",
        ),
        (
            ArgumentError("num_heads", "must divide d_in = 6", 4, "pass causal=False"),
            "--heads must divide --d-in = 6; got 4; pass --bidirectional",
        ),
        (
            ConversionError("a.b: num_heads must be known; pass num_heads=1, or the source of it"),
            "a.b: --heads must be known; pass --heads 1, or the source of it",
        ),
        (
            ConversionError("source must be given; got x/num_heads.pt"),
            "--from must be given; got x/num_heads.pt",
        ),
    ],
)
def test_in_options_names_options_for_arguments(error, message):
    assert in_options(error, planted) == message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert", "IN", "IN", "--to", "stacked"), "OUT must not exist yet"),
        (("convert", "IN", "IN", "--to", "stacked"), "or pass --force"),
        (("convert", "IN", "new.pt", "--to", "stacked"), "--from must be given where no config"),
        (("convert", "IN", "new.pt", "--from", "split", "--to", "split"), "than --from 'split'"),
        (("convert", "IN", "new.pt", "--from", "split", "--to", "split"), "--to must be another"),
        (("lesson", "--heads", "9"), "--heads must be an integer from 1 to 4; got 9"),
        (("lesson", "--d-out", "9"), "--d-out must be an integer from 1 to 4; got 9"),
        (("check", "torch.nn:Linear", "--only", "output_is_finit"), "--only must name laws"),
        (("check", "torch.nn:Linear", "--only", "output_is_finit"), "mean 'output_is_finite'?"),
        (("check", "torch.nn:Lineer"), "did you mean 'Linear'?"),
        (("check", "no_such_file.py:Name"), "TARGET must name a file that exists"),
    ],
)
def test_commands_speak_of_options(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    weights = {f"W_{name}.weight": torch.ones(4, 4) for name in ("query", "key", "value")}
    torch.save(weights | {"out_proj.weight": torch.ones(4, 4)}, "in.pt")
    result = CliRunner().invoke(
        polyhead_command.main, ["in.pt" if part == "IN" else part for part in args]
    )
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    for name in ("overwrite", "num_heads", "num_kv_heads", "source=", "target "):
        assert name not in result.stderr


# Output that fails, of every command

OUTPUTS = {
    "bench": ("--case", "D1", "--anyway", "--shrink", "64", "--seconds", "0"),
    "check": ("torch.nn:MultiheadAttention", "--only", "calls_are_stateless"),
    "convert": ("in.pt", "out.pt", "--from", "split", "--to", "stacked", "--heads", "2", "--force"),
    "lesson": ("--force",),
    "look": ("one two three", "--terminal"),
    "run": ("one two three",),
}


@pytest.fixture
def in_folder(tmp_path):
    weights = {f"W_{name}.weight": torch.ones(4, 4) for name in ("query", "key", "value")}
    torch.save(weights, tmp_path / "in.pt")
    return tmp_path


def test_outputs_are_of_every_command():
    assert OUTPUTS.keys() == polyhead_command._COMMANDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_line_of_every_command(name, in_folder):
    with open("/dev/full", "w") as full:
        options = {"capture_output": False, "stdout": full, "stderr": subprocess.PIPE}
        result = run(name, *OUTPUTS[name], cwd=in_folder, **options)
    assert result.stderr == "polyhead: No space left on device\n"
    assert result.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_closed_pipe_is_silent_of_every_command(name, in_folder):
    read, write = os.pipe()
    os.close(read)
    options = {"capture_output": False, "stdout": write, "stderr": subprocess.PIPE}
    result = run(name, *OUTPUTS[name], cwd=in_folder, **options)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_convert_stopped_by_a_signal_leaves_no_part(in_folder, number):
    code = (
        "import os, signal, polyhead_command\n"
        "import polyhead.convert.files as files\n"
        "def pieces(*_):\n"
        "    print(sum(name.endswith('.partial') for name in os.listdir()), flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    yield 'one', {}\n"
        "files._pieces = pieces\n"
        "polyhead_command.entry()"
    )
    result = run("convert", *OUTPUTS["convert"], code=code, cwd=in_folder)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "1\n", "")
    assert os.listdir(in_folder) == ["in.pt"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_nohup_is_kept():
    code = PLANTED.format(
        body="import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    )
    result = run("run", code="import signal; signal.signal(1, signal.SIG_IGN)\n" + code)
    assert result.stdout == "True\n"


def test_module_is_run_as_the_command_is():
    result = subprocess.run(
        [sys.executable, "-m", "polyhead.cli", "--version"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert importlib.metadata.version("polyhead") in result.stdout
