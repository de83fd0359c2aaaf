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

import polyhead_command

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


def test_unknown_command_is_a_usage_error():
    result = run("measure")
    assert result.returncode == 2
    assert "No such command 'measure'" in result.stderr


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
