"""Truncated, overwritten and bit-flipped GGUF files: ModelError with the reason, nothing else."""

import random
import sys

import pytest

import polyhead.models.gguf as ours
from polyhead.errors import DependencyError, ModelError
from polyhead.models.gguf import load_gguf


def test_load_gguf_truncated_file_raises(tmp_path, tiny_bytes):
    path = tmp_path / "cut.gguf"
    ends = [0, 1, 4, 8, 23, *range(24, len(tiny_bytes), len(tiny_bytes) // 97)]
    # The last tensor is followed by padding, which a reader does not need.
    for end in (end for end in ends if end < len(tiny_bytes) - 32):
        path.write_bytes(tiny_bytes[:end])
        with pytest.raises(ModelError, match=r"cut\.gguf cannot be read as GGUF"):
            load_gguf(path)


@pytest.mark.parametrize("head", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00"])
def test_load_gguf_random_bytes_raise(tmp_path, head):
    path = tmp_path / "noise.gguf"
    path.write_bytes(head + random.Random(0).randbytes(5000))
    with pytest.raises(ModelError, match=r"noise\.gguf cannot be read as GGUF"):
        load_gguf(path)


def test_load_gguf_other_byte_order_raises(tmp_path, tiny_bytes):
    path = tmp_path / "big.gguf"
    path.write_bytes(tiny_bytes[:4] + b"\0\0\0\x03" + bytes(16))
    with pytest.raises(ModelError, match="byte order of another kind of machine"):
        load_gguf(path)


@pytest.mark.filterwarnings("default")
def test_load_gguf_overflowing_offset_raises(tmp_path, tiny_bytes, recwarn):
    corrupt = bytearray(tiny_bytes)
    name = b"output_norm.weight"
    # After the name: the number of dimensions (4 bytes), one dimension (8), the type (4).
    offset = corrupt.index(name) + len(name) + 16
    corrupt[offset : offset + 8] = b"\xff" * 8
    path = tmp_path / "far.gguf"
    path.write_bytes(corrupt)
    with pytest.raises(ModelError, match=r"far\.gguf cannot be read as GGUF \(FloatingPointError"):
        load_gguf(path)
    assert not recwarn.list


def test_load_gguf_huge_count_raises(tmp_path, tiny_bytes, monkeypatch):
    monkeypatch.setattr(ours, "_MOST_READS", 1000)
    path = tmp_path / "long.gguf"
    path.write_bytes(tiny_bytes)
    with pytest.raises(ModelError, match="the metadata has more than 1000 parts"):
        load_gguf(path)


def test_load_gguf_flipped_bits_raise_model_error_only(tiny_file, tmp_path, tiny_bytes):
    path = tmp_path / "flipped.gguf"
    chance = random.Random(0)
    refused = 0
    # The header; a flipped weight is a weight.
    header = len(tiny_bytes) - sum(array.nbytes for array in tiny_file().tensors.values())
    for _ in range(60):
        corrupt = bytearray(tiny_bytes)
        corrupt[chance.randrange(header)] ^= 1 << chance.randrange(8)
        path.write_bytes(corrupt)
        try:
            load_gguf(path)
        except ModelError as error:
            refused += 1
            assert "flipped.gguf" in str(error)  # noqa: PT017
    assert refused > 20


@pytest.mark.parametrize("package", ["gguf", "tokenizers", "transformers"])
def test_load_gguf_missing_package_raises(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf'the package {package}.* -e "\.\[cli\]"'):
        load_gguf(tmp_path / "any.gguf")


def test_load_gguf_missing_file_raises(tmp_path):
    with pytest.raises(ModelError, match=r"none\.gguf cannot be read.*FileNotFoundError"):
        load_gguf(tmp_path / "none.gguf")
