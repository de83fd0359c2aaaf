"""Signatures: how a module is called, and the error where no call comes back."""

from polyhead.check.probe.signature import no_call


def test_no_call_of_sizes_that_do_not_fit_needs_d_in():
    error = no_call(["7 tokens of 3: RuntimeError: mat1 and mat2 shapes cannot be multiplied"])
    assert str(error).startswith("d_in must be given")
    assert str(no_call([])).startswith("d_in must be given")


def test_no_call_of_another_reason_shows_forwards_own_error():
    error = no_call(["7 tokens of 3: AttributeError: 'Layer' object has no attribute 'size'"])
    assert str(error).startswith("forward must return an output for tokens of some size")
    assert "got 7 tokens of 3: AttributeError: 'Layer' object" in str(error)
