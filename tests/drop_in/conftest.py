"""Fixtures of the drop-ins for torch's function."""

from __future__ import annotations

import sys
import types
import unittest

import pytest

from polyhead.drop_in import recognize, sdpa_function


@pytest.fixture
def any_size(kernels, monkeypatch):
    """Calls of every size go to polyhead, and masks of every size are read."""
    monkeypatch.setattr(sdpa_function, "size_reason", lambda arguments: None)
    monkeypatch.setattr(recognize, "_LEAST_PAIRS", 0)
    monkeypatch.setattr(recognize, "_FIRST_SHARE", float("inf"))
    monkeypatch.setattr(recognize, "_AGAIN_SHARE", float("inf"))
    recognize._readings.clear()
    yield
    recognize._readings.clear()


@pytest.fixture(scope="session")
def torch_samples():
    """torch's own sample inputs for its `scaled_dot_product_attention`, an `OpInfo`."""
    # torch imports it for its own tests of printed text, which nothing here runs.
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
