"""Error messages of masks that cannot be built, and of masks that do not fit a call."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from polyhead.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from polyhead.mask import (
    causal,
    cu_seqlens,
    custom,
    dense,
    documents,
    left_padding,
    lengths,
    prefix,
    window,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def everywhere(batch, head, query, key):
    return query == query


MUST_BE_BOOL = (
    "allowed must be a bool tensor, True = may attend; got {}; "
    "pass an additive mask as attention(bias=...)"
)
SIZE = "{} must be an integer of at least 0; got {}; count the keys, or pass None for no limit"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: dense(torch.ones(2, 2)), DtypeError, MUST_BE_BOOL.format("torch.float32")),
        (lambda: dense([[True]]), DtypeError, MUST_BE_BOOL.format("list")),
        (
            lambda: dense(torch.ones(3, 4, 5, dtype=torch.bool)),
            ShapeError,
            "allowed must have 2 dimensions (T, S) or 4 (B, H, T, S); got (3, 4, 5); "
            "unsqueeze the missing ones: mask[:, None] if it differs by batch row",
        ),
        (
            lambda: custom(torch.ones(2, 2, dtype=torch.bool)),
            DtypeError,
            "fn must be a function of (batch, head, query, key); got Tensor; "
            "wrap a bool tensor in polyhead.mask.dense instead",
        ),
        (
            lambda: custom(everywhere, heads=0),
            ArgumentError,
            "heads must be an integer of at least 1; got 0; pass the number of heads, or 1",
        ),
        (
            lambda: custom(everywhere, align="left"),
            ArgumentError,
            'align must be "end" or "start"; got \'left\'; see mask.causal',
        ),
        (
            lambda: custom(lambda batch, head, query, key: query - key).materialize(2, 2),
            DtypeError,
            "mask.custom(fn) must return a bool tensor, True = may attend; got torch.int64; "
            "compare",
        ),
        (
            lambda: custom(lambda batch, head, query, key: True).materialize(2, 2),
            DtypeError,
            "mask.custom(fn) must return a bool tensor, True = may attend; got bool; compare",
        ),
        (
            lambda: custom(lambda *_: torch.ones(2, 1, 2, 2) > 0).materialize(2, 2),
            ShapeError,
            "mask.custom(fn) must return a tensor that broadcasts to "
            "(batch, heads, T, S) = (1, 1, 2, 2); got (2, 1, 2, 2); "
            "compute it from the four indices alone, and pass batch= and heads= if it uses them",
        ),
        (lambda: window(before=-3), ArgumentError, SIZE.format("before", -3)),
        (lambda: window(after=1.5), ArgumentError, SIZE.format("after", 1.5)),
        (lambda: window(before=True), ArgumentError, SIZE.format("before", True)),
        (
            lambda: window(),
            ArgumentError,
            "before, after must not both be None; got no limit at all; give one of them",
        ),
        (
            lambda: causal(align="middle"),
            ArgumentError,
            'align must be "end" or "start"; got \'middle\'; see mask.causal',
        ),
        (
            lambda: window(before=1, align="left"),
            ArgumentError,
            'align must be "end" or "start"; got \'left\'; see mask.causal',
        ),
        (
            lambda: prefix(-2),
            ArgumentError,
            "n must be an integer of at least 0; got -2; "
            "use lengths(...) for one number per batch row",
        ),
        (
            lambda: documents(torch.zeros(1, 2, 3).long()),
            ShapeError,
            "ids must be (S,) or (B, S); got (1, 2, 3); give one id per key token",
        ),
        (
            lambda: documents([0.0]),
            DtypeError,
            "ids must be int32 or int64; got torch.float32; convert with .long()",
        ),
        (
            lambda: left_padding([[1]]),
            ShapeError,
            "padding must have one entry per batch row, (B,); got (1, 1); flatten it",
        ),
        (
            lambda: window(before=np.int64(3)),
            ArgumentError,
            "before must be an integer of at least 0; got np.int64(3); convert it with int()",
        ),
        *(
            (
                lambda build=build, given=given: build(given),
                DtypeError,
                f"{name} must be a tensor or a list of integers; got {given!r}; write [n] for one",
            )
            for build, name, given in (
                (lengths, "lengths", 5),
                (lengths, "lengths", None),
                (left_padding, "padding", [[1], [1, 2]]),
                (documents, "ids", ["a", "b"]),
                (cu_seqlens, "cu_seqlens", "05"),
            )
        ),
        (
            lambda: documents([0, 0, 1]).materialize(2, 4),
            ShapeError,
            "mask.documents(ids) must hold one id for each of the S = 4 keys, the T = 2 queries "
            "among them; got (3,); give one id per key token, cached tokens included",
        ),
        (
            lambda: (causal() & dense(torch.ones(3, 4, dtype=torch.bool))).draw(3, 5),
            ShapeError,
            "mask.dense(allowed) must broadcast to T = 3 queries by S = 5 keys; got (3, 4); "
            "materialize it at its own size",
        ),
        *(
            (
                lambda bounds=bounds: cu_seqlens(bounds),
                ArgumentError,
                f"cu_seqlens must begin with 0 and never decrease; got {bounds}; "
                "pass the cumulative sum of the lengths, with a leading 0",
            )
            for bounds in ([1, 4], [0, 3, 2])
        ),
        (
            lambda: lengths([1.5]),
            DtypeError,
            "lengths must be int32 or int64; got torch.float32; convert with .long()",
        ),
        (
            lambda: lengths([[1, 2]]),
            ShapeError,
            "lengths must have one entry per batch row, (B,); got (1, 2); flatten it",
        ),
    ],
)
def test_mask_bad_argument_raises_with_the_value(build, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        build()


@pytest.mark.parametrize(
    ("mask", "device", "error", "message"),
    [
        (
            lengths([1, 2, 3]),
            CPU,
            ShapeError,
            "mask.lengths(lengths) must have one entry per batch row, B = 2; got 3; "
            "give one for each",
        ),
        (
            lengths([1, 2]),
            META,
            DeviceError,
            'mask.lengths(lengths) must be on the query\'s device, meta; got cpu; .to("meta")',
        ),
        (
            dense(torch.ones(5, 8, dtype=torch.bool)),
            CPU,
            ShapeError,
            "mask.dense(allowed) must broadcast to (B, H, T, S) = (2, 3, 5, 7); got (5, 8); "
            "give each dimension its full size or 1",
        ),
        (
            dense(torch.ones(5, 7, dtype=torch.bool)),
            META,
            DeviceError,
            'mask.dense(allowed) must be on the query\'s device, meta; got cpu; .to("meta")',
        ),
        (
            left_padding([1]),
            CPU,
            ShapeError,
            "mask.left_padding(padding) must have one entry per batch row, B = 2; got 1; "
            "give one for each",
        ),
        (
            documents([0, 0, 1]),
            CPU,
            ShapeError,
            "mask.documents(ids) must hold one id for each of the S = 7 keys, the T = 5 queries "
            "among them; got (3,); give one id per key token, cached tokens included",
        ),
        (
            documents(torch.zeros(3, 7, dtype=torch.long)),
            CPU,
            ShapeError,
            "mask.documents(ids) must have one entry per batch row, B = 2; got 3; "
            "give one for each",
        ),
        (
            documents([0] * 7),
            META,
            DeviceError,
            'mask.documents(ids) must be on the query\'s device, meta; got cpu; .to("meta")',
        ),
        (
            custom(everywhere, batch=3),
            CPU,
            ShapeError,
            "mask.custom(batch=) must be 1 or the call's 2; got 3; "
            "pass batch=1 if fn does not depend on it, else the call's 2",
        ),
        (
            custom(everywhere, heads=2),
            CPU,
            ShapeError,
            "mask.custom(heads=) must be 1 or the call's 3; got 2; "
            "pass heads=1 if fn does not depend on it, else the call's 3",
        ),
        (
            causal("start").for_keys(1, 9),
            CPU,
            ShapeError,
            "mask.for_keys(start, S) must leave the call's S = 7 keys; got 1 .. 9; "
            "give the first remaining key, and the number of keys before the slice",
        ),
        (
            causal().for_queries(1, 4, 9),
            CPU,
            ShapeError,
            "mask.for_queries(start, stop) must cover the call's T = 5 queries; got 1 .. 4; "
            "give the range of this chunk",
        ),
    ],
)
def test_mask_that_does_not_fit_the_call_raises(mask, device, error, message):
    compounds = [
        mask,
        ~mask,
        causal() & mask,
        mask | causal(),
        (causal() | ~mask).for_queries(0, 5, 5),
    ]
    for compound in compounds:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            compound.check(2, 3, 5, 7, device)


def test_documents_with_more_queries_than_ids_raises():
    with pytest.raises(ShapeError, match="S = 3 keys, the T = 5 queries among them"):
        documents([0, 0, 1]).check(1, 1, 5, 3, CPU)
