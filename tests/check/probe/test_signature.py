"""Signatures: calling conventions, and the error if every call fails."""

from polyhead.check.probe.signature import no_call


def test_no_call_with_size_errors_requires_d_in():
    error = no_call(["7 tokens of 3: RuntimeError: mat1 and mat2 shapes cannot be multiplied"])
    assert str(error).startswith("d_in must be given")
    assert str(no_call([])).startswith("d_in must be given")


def test_no_call_with_other_errors_shows_the_forward_error():
    error = no_call(["7 tokens of 3: AttributeError: 'Layer' object has no attribute 'size'"])
    assert str(error).startswith("forward must return an output for tokens of some size")
    assert "got 7 tokens of 3: AttributeError: 'Layer' object" in str(error)
