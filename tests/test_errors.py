"""Exception tree, messages, pickling and copying."""

import copy
import pickle

import pytest
import torch

from polyhead import errors

ARGUMENT = ("num_heads", "must be positive", 0, "pass at least 1")
BUILTINS = {
    "PolyheadError": (Exception,),
    "ArgumentError": (ValueError,),
    "ShapeError": (ValueError,),
    "DeviceError": (ValueError,),
    "DtypeError": (ValueError, TypeError),
    "BackendError": (NotImplementedError, RuntimeError),
    "ConversionError": (ValueError,),
    "ModelError": (ValueError,),
    "DependencyError": (ImportError,),
}
INSTANCES = [
    errors.PolyheadError("what went wrong"),
    errors.ArgumentError(*ARGUMENT),
    errors.ShapeError("x", "must have 3 dimensions", torch.Size([2, 5]), "add the batch"),
    errors.DeviceError("x", "must be on cpu", torch.device("meta"), "move one"),
    errors.DtypeError("x", "must be torch.float32", torch.float64, "cast one"),
    errors.BackendError({"sdpa": ["has no softcap; got 3.0"], "flex": ("no a", "no b")}),
    errors.ConversionError("weights cannot move"),
    errors.ModelError("no such file"),
    errors.DependencyError("transformers is needed"),
]


def test_all_public_errors_have_cases():
    assert set(errors.__all__) == set(BUILTINS)
    assert {type(instance).__name__ for instance in INSTANCES} == set(BUILTINS)


@pytest.mark.parametrize("name", BUILTINS)
def test_error_derives_from_its_builtin(name):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.PolyheadError)
    assert all(issubclass(kind, builtin) for builtin in BUILTINS[name])


def test_error_tree_matches_the_docstring():
    for kind in (errors.ShapeError, errors.DeviceError, errors.DtypeError):
        assert issubclass(kind, errors.ArgumentError)
    for name in ("BackendError", "ConversionError", "ModelError", "DependencyError"):
        assert not issubclass(getattr(errors, name), errors.ArgumentError)
    for name in ("ArgumentError", "ShapeError", "DeviceError", "ConversionError"):
        assert not issubclass(getattr(errors, name), TypeError)


def test_argument_error_message_and_attributes():
    error = errors.ArgumentError(*ARGUMENT)
    assert str(error) == "num_heads must be positive; got 0; pass at least 1"
    assert (error.argument, error.rule, error.got, error.remedy) == ARGUMENT


def test_backend_error_lists_all_reasons():
    error = errors.BackendError({"sdpa": ["has no softcap; got 3.0"], "flex": ("no a", "no b")})
    assert error.reasons == {"sdpa": ("has no softcap; got 3.0",), "flex": ("no a", "no b")}
    assert str(error).splitlines() == [
        "no requested backend can run this call:",
        "  sdpa: has no softcap; got 3.0",
        "  flex: no a",
        "  flex: no b",
        '  pass backend="auto" to let polyhead choose one that can',
    ]


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy]
)
def test_error_copy_has_the_same_message_and_attributes(error, copied):
    other = copied(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)
