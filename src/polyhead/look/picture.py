"""Thumbnail of a report: the map of each head, one row per layer, one column per head."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from polyhead.look.report import HeadReport

__all__ = ["grid_png"]

_SIDE, _GAP = 12, 2  # pixels of a map, and between maps


def grid_png(report: HeadReport) -> bytes:
    """Return a PNG of all maps, dark where the weight is, each scaled to its own largest weight."""
    columns = max(len(layer.heads) for layer in report.layers)
    step = _SIDE + _GAP
    pixels = torch.full((len(report.layers) * step + _GAP, columns * step + _GAP), 255.0)
    for row, layer in enumerate(report.layers):
        maps = F.adaptive_avg_pool2d(layer.map.float()[:, None], _SIDE)[:, 0]
        most = maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        top = _GAP + row * step
        for column, shade in enumerate(maps.div(most).sqrt()):
            left = _GAP + column * step
            pixels[top : top + _SIDE, left : left + _SIDE] = 240.0 * (1.0 - shade)
    return _png(pixels.round().to(torch.uint8))


def _png(gray: Tensor) -> bytes:
    """Encode (height, width) values from 0 to 255 as a PNG file."""
    height, width = gray.shape
    lines = F.pad(gray, (1, 0))  # each begins with its filter byte: 0, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(lines.flatten().tolist()), 9)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
