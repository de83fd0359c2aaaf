"""PNG thumbnails of reports."""

import struct
import zlib

import torch

from polyhead.look import HeadReport, LayerReport
from polyhead.look.picture import grid_png


def layer_of(index, maps):
    keys = torch.zeros(len(maps), maps.shape[1], 1, dtype=torch.int32)
    return LayerReport(
        index, f"layers.{index}", tuple(range(len(maps))), {}, maps, keys, keys * 1.0
    )


def pixels_of(png):
    """Decode a gray PNG without filters to (height, width), verifying its checksums."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert checksum == zlib.crc32(kind + data)
        parts[kind] = data
        at += 12 + size
    assert [*parts] == [b"IHDR", b"IDAT", b"IEND"]
    width, height = struct.unpack(">II", parts[b"IHDR"][:8])
    lines = torch.tensor([*zlib.decompress(parts[b"IDAT"])]).view(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_grid_png_is_dark_where_the_weight_is():
    first = torch.zeros(2, 24, 24)
    first[0, :, 0] = 1.0  # a sink
    first[1] = torch.eye(24)
    second = torch.rand(1, 7, 7)
    report = HeadReport("M", (), None, (layer_of(0, first), layer_of(1, second)))
    pixels = pixels_of(grid_png(report))
    assert pixels.shape == (30, 30)
    sink, diagonal = pixels[2:14, 2:14], pixels[2:14, 16:28]
    assert (sink[:, 0] == 0).all()
    assert (sink[:, 1:] == 240).all()
    assert (diagonal.diagonal() == 0).all()
    assert (pixels[16:28, 16:28] == 255).all()  # no such head
    assert pixels[16:28, 2:14].min() == 0


def test_grid_png_empty_maps_are_blank():
    report = HeadReport("M", (), None, (layer_of(0, torch.zeros(1, 3, 3)),))
    assert set(pixels_of(grid_png(report)).unique().tolist()) == {240, 255}
