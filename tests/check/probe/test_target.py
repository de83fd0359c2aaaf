"""Targets: files, packages, notebooks; given and guessed arguments."""

import json

import pytest
from torch import nn

from polyhead.check.probe.target import build, load
from polyhead.errors import ArgumentError

SOURCE = """
from torch import nn

class Head(nn.Module):
    def __init__(self, d_model, n_heads, *, dropout=0.0):
        super().__init__()
        self.size, self.n_heads, self.p = d_model, n_heads, dropout

class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.size = config.n_embd

class Needs(nn.Module):
    def __init__(self, d_model, shape_of_things):
        super().__init__()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "heads.py"
    path.write_text(SOURCE)
    return path


def test_class_in_a_file_with_given_and_guessed_arguments(file):
    module, guessed, make = build(load(f"{file}:Head"), {"n_heads": 3, "dropout": 0.5})
    assert (module.size, module.n_heads, module.p) == (48, 3, 0.5)
    assert guessed == {"d_model": 48}
    assert make() is not module


def test_stand_in_configuration_has_the_usual_names(file):
    assert build(load(f"{file}:Configured"), {})[0].size == 48
    assert build(load(f"{file}:Configured"), {"config.n_embd": 20})[0].size == 20


def test_notebook_cells_run_in_order(tmp_path):
    path = tmp_path / "notes.ipynb"
    cells = [
        {"cell_type": "markdown", "source": ["# Heads"]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", SOURCE]},
        {"cell_type": "code", "source": ["1 / 0"]},
        {"cell_type": "code", "source": ["class Last(Head): pass"]},
    ]
    path.write_text(json.dumps({"cells": cells}))
    module = build(load(f"{path}:Last"), {"d_model": 12, "n_heads": 2})[0]
    assert module.size == 12


def test_package_name_is_imported():
    assert load("torch.nn:MultiheadAttention") is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{file}", "must be FILE.py:NAME"),
        ("{file}:Hed", "modules there: Head, Configured, Needs); got Hed"),
        ("nowhere.py:Head", "must name a file that exists"),
        ("no.such.package:Head", "must be importable"),
        ("{file}:Needs", "must give shape_of_things, which Needs requires"),
        ("{file}:nn.Linear", "must be constructible; got"),
        ("{file}:__name__", "must be a module, a class or a function"),
    ],
)
def test_unloadable_target_raises_one_message(file, name, message):
    with pytest.raises(ArgumentError) as caught:
        build(load(name.format(file=file)), {"in_features": -1} if "Linear" in name else {})
    assert message in str(caught.value)
