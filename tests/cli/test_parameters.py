"""Parameters, of every command: what one command refuses with a hint, all refuse so."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

import polyhead_command
from polyhead.cli import main
from polyhead.cli.parameters import NewFile, OneOf, ReadablePath

COMMANDS = tuple(polyhead_command._COMMANDS)


def parameters(kind):
    """(command, parameter) pairs whose type is of this kind, over all commands."""
    context = click.Context(main)
    return [
        pytest.param(name, parameter, id=f"{name} {parameter.opts[0]}")
        for name in COMMANDS
        for parameter in main.get_command(context, name).params
        if isinstance(parameter.type, kind)
    ]


def refused(*args):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def with_value(command, parameter, value):
    """Arguments that give one parameter a value, and the required ones before it any."""
    if isinstance(parameter, click.Option):
        return [command, parameter.opts[0], value]
    found = main.get_command(click.Context(main), command).params
    place = [p for p in found if isinstance(p, click.Argument)].index(parameter)
    return [command, *[__file__] * place, value]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_choice_and_path_has_a_hint(command):
    for parameter in main.get_command(click.Context(main), command).params:
        if isinstance(parameter.type, click.Choice):
            assert isinstance(parameter.type, OneOf), parameter
        if isinstance(parameter.type, click.Path):
            assert isinstance(parameter.type, NewFile | ReadablePath), parameter


@pytest.mark.parametrize(("command", "parameter"), parameters(OneOf))
def test_mistyped_choice_names_the_nearest(command, parameter):
    right = parameter.type.choices[-1]
    message = refused(*with_value(command, parameter, right[:-1] + "_"))
    assert f"is not one of {parameter.type.choices[0]!r}" in message
    assert f"did you mean {right!r}?" in message or len(right) < 4


@pytest.mark.parametrize(("command", "parameter"), parameters(ReadablePath))
def test_mistyped_path_names_the_nearest(command, parameter, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/weights.pt").touch()
    near = str(tmp_path / "folder/weights.pt")
    wrong = str(tmp_path / "folder/weihgts.pt")
    message = refused(*with_value(command, parameter, wrong))
    assert f"{wrong!r} does not exist; did you mean {near!r}?" in message
    wrong = str(tmp_path / "foldr/weights.pt")
    assert f"did you mean {near!r}?" in refused(*with_value(command, parameter, wrong))
    wrong = str(tmp_path / "unlike")
    assert "does not exist; check the path" in refused(*with_value(command, parameter, wrong))


@pytest.mark.parametrize(("command", "parameter"), parameters(NewFile))
def test_new_file_in_missing_folder_names_the_nearest(command, parameter, tmp_path):
    (tmp_path / "folder").mkdir()
    message = refused(*with_value(command, parameter, str(tmp_path / "foldr/out.pt")))
    assert "there is no folder" in message
    assert f"did you mean {str(tmp_path / 'folder')!r}?" in message
    message = refused(*with_value(command, parameter, str(tmp_path / "unlike/out.pt")))
    assert "unlike'; make it" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_known_by_its_beginning(command):
    for parameter in main.get_command(click.Context(main), command).params:
        long = max(parameter.opts, key=len)
        if isinstance(parameter, click.Option) and len(long) > 6:
            message = refused(command, long[:-1])
            assert f"No such option '{long[:-1]}'" in message
            assert long in message


@pytest.mark.parametrize(("typed", "meant"), [("lok", "look"), ("RUN", "run"), ("chek", "check")])
def test_mistyped_command_names_the_nearest(typed, meant):
    assert f"No such command {typed!r}; did you mean {meant!r}?" in refused(typed)
    assert "choose of bench, check, convert, lesson, look, run" in refused("measure")
