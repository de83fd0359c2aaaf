"""Dense masks recognized as rules: what a tensor of booleans, or of 0 and -inf, says in structure.

A recognized mask is the same mask, row for row: its rows are read as ranges of keys, and a rule is
taken only if it gives the very same ranges. They are read again where that costs next to nothing;
elsewhere an earlier reading holds for the same storage, version, shape and strides.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from polyhead.drop_in.row_ranges import EVERYTHING, rule_of_ranges
from polyhead.mask import Mask

__all__ = ["EVERYTHING", "recognize"]

_MOST_MASKS = 16
_LEAST_PAIRS = 2**14  # below, no rule makes a call faster than torch's
# Nanoseconds, of two cores with AVX-512: to read a byte of a mask, to fit a rule to its ranges and
# a row of them, and to compute one score and its share of the output per feature.
_READ_NS, _FIT_NS, _ROW_NS, _SCORE_NS = 0.15, 100e3, 150.0, 0.012
# Shares of a call's time: to read a mask for the first time, and at every call.
_FIRST_SHARE, _AGAIN_SHARE = 0.05, 0.02

_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16)
_UNSTRUCTURED, _LOWEST = 0, 2  # csrc/mask_rows.hpp


@dataclass(frozen=True)
class _Reading:
    """Reading of a mask.

    Attributes:
        storage: which, alive or not.
        version: of the tensor before it was read.
        ranges: of its rows, or None: it has none, or was only seen.
        rule: that of the ranges.
        is_read: whether it was read, or only seen.
        share: of the keys that are allowed.
    """

    storage: StorageWeakRef
    version: int | None = None
    ranges: Tensor | None = None
    rule: Mask | str | None = None
    is_read: bool = False
    share: float = 1.0


_readings: OrderedDict[tuple[object, ...], _Reading] = OrderedDict()
_lock = threading.Lock()


def recognize(attn_mask: Tensor, B: int, H: int, T: int, S: int, size: int) -> Mask | str | None:
    """The rule of a dense mask.

    Args:
        attn_mask: (B or 1, H or 1, T or 1, S or 1), bool, or float: 0 where a query may attend and
            -inf (or a finite float below -1e30, where every row allows a key) where it may not.
        B, H, T, S: sizes of the call.
        size: D + E.

    Returns:
        A mask; `EVERYTHING` if it forbids nothing; None if it has no rule, requires grad, differs
        between heads, is for few pairs, or takes a twentieth
        of the call to read (and comes for the first time).

    >>> allowed = torch.ones(1024, 1024, dtype=torch.bool).tril()
    >>> print(repr(recognize(allowed[None, None], 1, 12, 1024, 1024, 128)))
    causal()
    """
    rows = _rows_of(attn_mask, S)
    if rows is None or T * S < _LEAST_PAIRS:
        return None
    storage = attn_mask.untyped_storage()
    key = (storage._cdata, rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, B, T, S)
    version = _version(attn_mask)
    with _lock:
        known = _readings.get(key)
    is_new = known is None or known.storage.expired()
    reading = _Reading(StorageWeakRef(storage)) if known is None or is_new else known
    call_ns = B * H * T * S * size * _SCORE_NS
    read_ns = rows.numel() * rows.element_size() * _READ_NS
    if read_ns > call_ns * reading.share * _AGAIN_SHARE:
        if version is None:
            return None
        if reading.is_read and version == reading.version:
            return reading.rule
    fit_ns = _FIT_NS + rows.shape[0] * T * _ROW_NS
    # A mask that comes again, as to the next layer, is worth more than a twentieth of one call.
    if not (is_new and read_ns + fit_ns > call_ns * _FIRST_SHARE):
        reading = _read(rows, reading, version, B, T, S)
    with _lock:
        _readings[key] = reading
        _readings.move_to_end(key)
        while len(_readings) > _MOST_MASKS or next(iter(_readings.values())).storage.expired():
            _readings.popitem(last=False)
    return reading.rule


def _rows_of(attn_mask: Tensor, S: int) -> Tensor | None:
    """(B or 1, T or 1, S) without what is only expanded; None: not to be read."""
    if attn_mask.requires_grad or attn_mask.dtype not in _DTYPES or attn_mask.shape[-1] != S:
        return None
    for dim in (0, 1, 2):
        if attn_mask.shape[dim] > 1 and attn_mask.stride(dim) == 0:
            attn_mask = attn_mask.narrow(dim, 0, 1)
    if attn_mask.shape[1] > 1 or (S > 1 and attn_mask.stride(-1) != 1):
        return None
    return attn_mask[:, 0]


def _version(attn_mask: Tensor) -> int | None:
    """A number that changes with every write; None where writes leave no trace."""
    if attn_mask.is_inference() or attn_mask.is_shared():
        return None
    # numpy writes past torch: what it shares, torch cannot resize.
    if not attn_mask.untyped_storage().resizable():
        return None
    return attn_mask._version


def _read(rows: Tensor, reading: _Reading, version: int | None, B: int, T: int, S: int) -> _Reading:
    ranges, kind = torch.ops.polyhead.dense_mask_rows(rows)
    # A row of nothing but the lowest floats gives the mean of all values, and not zeros.
    if kind == _UNSTRUCTURED or (
        kind == _LOWEST and not bool((ranges[..., 0] < ranges[..., 1]).all())
    ):
        return _Reading(reading.storage, version, is_read=True)
    if reading.ranges is not None and torch.equal(ranges, reading.ranges):
        return replace(reading, version=version)
    share = (ranges[..., 1] - ranges[..., 0]).double().mean().item() / S
    rule = rule_of_ranges(ranges, T, S, B)
    return _Reading(reading.storage, version, ranges, rule, is_read=True, share=share)
