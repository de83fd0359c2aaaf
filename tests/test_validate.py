"""Validation errors of `attention()`: type and full message."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, BackendError, DeviceError, DtypeError, ShapeError

LAYOUT = "check the order of dimensions: (B, heads, tokens, size)"
FOUR = (
    "must have 4 dimensions (B, heads, tokens, size); got {}; "
    "add the batch with [None], split heads with unflatten and transpose(1, 2)"
)
KEY = (
    "key must be (B, G, S, D) with the query's B = 2 and D = 8, and G at least 1; got {}; " + LAYOUT
)
VALUE = "value must be (B, G, S, E) with the key's (B, G, S) = (2, 2, 7); got {}; " + LAYOUT
BIAS = (
    "bias must broadcast to (B, H, T, S) = (2, 6, 5, 7); got {}; "
    "give each dimension its full size or 1"
)
SINKS = "sinks must be (H,) = (6,), one value per head; got {}; give one for each query head"
SPARSE = torch.ones(2, 2, 5, 8).to_sparse()
SCALE = "leave it out for 1 / sqrt(D); multiply the query by a tensor"

CASES = [
    ({"query": [[1.0]]}, DtypeError, "query must be a tensor; got list; torch.as_tensor it"),
    ({"value": None}, DtypeError, "value must be a tensor; got NoneType; torch.as_tensor it"),
    ({"query": torch.ones(6, 5, 8)}, ShapeError, "query " + FOUR.format("(6, 5, 8)")),
    (
        {"query": SPARSE, "key": SPARSE, "value": SPARSE},
        DtypeError,
        "query must be a dense tensor; got torch.sparse_coo; call .to_dense()",
    ),
    (
        {"value": torch.nested.nested_tensor([torch.ones(2, 7, 8)] * 2, layout=torch.jagged)},
        DtypeError,
        "value must be a dense tensor; got a nested tensor; "
        "pad it with torch.nested.to_padded_tensor, and pass mask.lengths",
    ),
    ({"key": torch.ones(7, 8)}, ShapeError, "key " + FOUR.format("(7, 8)")),
    (
        {"query": torch.ones(2, 6, 5, 8, dtype=torch.long)},
        DtypeError,
        "query must be floating point; got torch.int64; convert it first",
    ),
    (
        {"key": torch.ones(2, 2, 7, 8, dtype=torch.float16)},
        DtypeError,
        "key must have the query's dtype, torch.float32; got torch.float16; cast one",
    ),
    (
        {"value": torch.ones(2, 2, 7, 8, device="meta")},
        DeviceError,
        "value must be on the query's device, cpu; got meta; move one",
    ),
    ({"key": torch.ones(3, 2, 7, 8)}, ShapeError, KEY.format("(3, 2, 7, 8)")),
    ({"key": torch.ones(2, 2, 7, 9)}, ShapeError, KEY.format("(2, 2, 7, 9)")),
    ({"key": torch.ones(2, 0, 7, 8)}, ShapeError, KEY.format("(2, 0, 7, 8)")),
    ({"value": torch.ones(2, 2, 9, 8)}, ShapeError, VALUE.format("(2, 2, 9, 8)")),
    ({"value": torch.ones(2, 3, 7, 8)}, ShapeError, VALUE.format("(2, 3, 7, 8)")),
    (
        {"query": torch.ones(2, 5, 5, 8)},
        ShapeError,
        "query must have a positive multiple of the key's G = 2 heads; got H = 5; "
        "query head h uses KV head h // (H / G)",
    ),
    (
        {"query": torch.ones(2, 0, 5, 8)},
        ShapeError,
        "query must have a positive multiple of the key's G = 2 heads; got H = 0; "
        "query head h uses KV head h // (H / G)",
    ),
    (
        {"query": torch.ones(2, 6, 5, 0), "key": torch.ones(2, 2, 7, 0)},
        ShapeError,
        "query must have a head size D of at least 1; got 0; check its layout",
    ),
    (
        {"mask": torch.ones(5, 7, dtype=torch.bool)},
        DtypeError,
        "mask must be a polyhead.mask.Mask; got Tensor; wrap a bool tensor in polyhead.mask.dense "
        "(True = may attend); pass an additive mask as bias=",
    ),
    (
        {"mask": ph.mask.lengths([1, 2, 3])},
        ShapeError,
        "mask.lengths(lengths) must have one entry per batch row, B = 2; got 3; give one for each",
    ),
    (
        {"mask": ph.mask.causal() & ph.mask.dense(torch.ones(5, 6, dtype=torch.bool))},
        ShapeError,
        "mask.dense(allowed) must broadcast to (B, H, T, S) = (2, 6, 5, 7); got (5, 6); "
        "give each dimension its full size or 1",
    ),
    ({"bias": 0.5}, DtypeError, "bias must be a tensor; got float; torch.as_tensor it"),
    ({"bias": torch.ones(5, 6)}, ShapeError, BIAS.format("(5, 6)")),
    ({"bias": torch.ones(2, 5, 7)}, ShapeError, BIAS.format("(2, 5, 7)")),
    ({"bias": torch.ones(1, 2, 6, 5, 7)}, ShapeError, BIAS.format("(1, 2, 6, 5, 7)")),
    (
        {"bias": torch.ones(5, 7, dtype=torch.bool)},
        DtypeError,
        "bias must be torch.float32 (the query's) or float32; got torch.bool; "
        "wrap it in polyhead.mask.dense instead (True = may attend)",
    ),
    (
        {"bias": torch.ones(5, 7, dtype=torch.float64)},
        DtypeError,
        "bias must be torch.float32 (the query's) or float32; got torch.float64; cast it",
    ),
    (
        {"bias": torch.ones(5, 7, device="meta")},
        DeviceError,
        "bias must be on the query's device, cpu; got meta; move one",
    ),
    ({"sinks": [0.0] * 6}, DtypeError, "sinks must be a tensor; got list; torch.as_tensor it"),
    ({"sinks": torch.ones(5)}, ShapeError, SINKS.format("(5,)")),
    ({"sinks": torch.ones(1, 6)}, ShapeError, SINKS.format("(1, 6)")),
    (
        {"sinks": torch.ones(6, dtype=torch.long)},
        DtypeError,
        "sinks must be floating point; got torch.int64; convert it first",
    ),
    (
        {"sinks": torch.ones(6, device="meta")},
        DeviceError,
        "sinks must be on the query's device, cpu; got meta; move one",
    ),
    (
        {"scale": math.inf},
        ArgumentError,
        "scale must be finite; got inf; leave it out for 1 / sqrt(D)",
    ),
    *(
        (
            {"softcap": softcap},
            ArgumentError,
            f"softcap must be positive; got {softcap}; leave it out for no cap",
        )
        for softcap in (0.0, -30.0, math.nan, math.inf)
    ),
    *(
        ({"scale": scale}, DtypeError, f"scale must be a number; got {got}; {SCALE}")
        for scale, got in (
            ("0.1", "'0.1'"),
            (True, "True"),
            ([0.1], "[0.1]"),
            (1j, "1j"),
            # Kernels compute no gradient of it.
            (torch.tensor(0.5, requires_grad=True), "tensor(0.5000, requires_grad=True)"),
        )
    ),
    *(
        (
            {"softcap": softcap},
            DtypeError,
            f"softcap must be a number; got {softcap!r}; leave it out for no cap",
        )
        for softcap in (True, "30", [30.0])
    ),
    *(
        (
            {"dropout": dropout},
            DtypeError,
            f"dropout must be a number; got {dropout!r}; pass 0.0 for none",
        )
        for dropout in (None, "0.1", [0.1])
    ),
    *(
        (
            {"dropout": dropout},
            ArgumentError,
            f"dropout must be in [0, 1); got {dropout}; pass 0.0 for none",
        )
        for dropout in (1.0, -0.1, math.nan)
    ),
    (
        {"return_aux": True},
        DtypeError,
        "return_aux must be a polyhead.AuxRequest or None; got True; "
        "pass for example AuxRequest(weights=True)",
    ),
]


@pytest.mark.parametrize("function", [ph.attention, torch.no_grad()(ph.attention), ph.explain])
@pytest.mark.parametrize(("change", "error", "message"), CASES)
def test_attention_bad_argument_raises_with_the_value(function, change, error, message):
    arguments = {
        "query": torch.ones(2, 6, 5, 8),
        "key": torch.ones(2, 2, 7, 8),
        "value": torch.ones(2, 2, 7, 8),
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        function(**{**arguments, **change})
    assert type(caught.value) is error
    assert isinstance(caught.value, ValueError)


def test_errors_derive_from_a_builtin_and_are_documented():
    builtin = {
        "ArgumentError": ValueError,
        "ShapeError": ValueError,
        "DeviceError": ValueError,
        "DtypeError": TypeError,
        "BackendError": NotImplementedError,
        "ConversionError": ValueError,
        "ModelError": ValueError,
        "DependencyError": ImportError,
        "PolyheadError": Exception,
    }
    assert set(builtin) == set(ph.errors.__all__)
    for name, parent in builtin.items():
        error = getattr(ph.errors, name)
        assert issubclass(error, parent)
        assert issubclass(error, ph.errors.PolyheadError)
        assert name in ph.errors.__doc__


def test_errors_pickle_with_their_attributes():
    error = ShapeError("key", "must be big", 3, "enlarge it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ShapeError
    assert (again.argument, again.rule, again.got, again.remedy) == (
        "key",
        "must be big",
        3,
        "enlarge it",
    )
    assert str(again) == str(error) == "key must be big; got 3; enlarge it"
    refused = pickle.loads(pickle.dumps(BackendError({"a": ["no", "never"]})))
    assert refused.reasons == {"a": ("no", "never")}
