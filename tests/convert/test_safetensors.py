"""The safetensors format, compared with the library that defines it."""

import io
import sys

import pytest
import torch

from polyhead.convert.safetensors import _CODES, TensorFile, opened
from polyhead.errors import ConversionError, DependencyError, ModelError

library = pytest.importorskip("safetensors.torch")


def test_tensor_file_every_dtype_and_offset_is_readable(tmp_path):
    """Odd numbers of bytes between wide dtypes: the library reads each at its offset."""
    torch.manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(_CODES):
        numbers = torch.randint(0, 2, (3, 1 + 2 * i)).to(dtype)
        tensors[f"a.{i}"] = numbers
        tensors[f"scalar.{i}"] = numbers[0, 0]
        tensors[f"turned.{i}"] = numbers.T
        tensors[f"empty.{i}"] = numbers[:, :0]
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        target = TensorFile(file, tensors, {})
        written = sum(target.write(name, tensors[name]) for name in reversed(tensors))
    assert written == target.size
    assert path.stat().st_size % 8 == target.size % 8
    with opened([path]) as (shapes, read, metadata):
        assert metadata == {}
        assert shapes.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (shapes[name].dtype, shapes[name].shape) == (tensor.dtype, tensor.shape)
            assert shapes[name].is_meta
            same = read(name).contiguous().reshape(-1).view(torch.uint8)
            assert torch.equal(same, tensor.contiguous().reshape(-1).view(torch.uint8)), name


def test_tensor_file_unsupported_dtype_raises():
    with pytest.raises(ConversionError, match=r"^a must be .*F32.*; got torch.complex128; write a"):
        TensorFile(io.BytesIO(), {"a": torch.zeros(2, dtype=torch.complex128)}, {})


def test_opened_unsupported_dtype_raises(tmp_path):
    path = tmp_path / "x.safetensors"
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with (
        pytest.raises(ModelError, match=r"a must be of a dtype that torch has, .*; got F4"),
        opened([path]),
    ):
        pass


def test_opened_without_safetensors_raises(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(DependencyError, match=r'pip install -e "\.\[hf\]"'), opened([tmp_path]):
        pass
