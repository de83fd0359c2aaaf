"""torch.export with any number of tokens: the exported program is the module at every length."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

LENGTHS = (2, 3, 17, 61)


def export(module, inputs):
    tokens = Dim("T", min=2, max=64)
    sizes = {name: {} for name in inputs} | {"x": {1: tokens}}
    if "memory" in inputs:
        sizes["memory"] = {1: Dim("S", min=2, max=67)}
    return torch.export.export(module, (), inputs, dynamic_shapes=sizes, strict=False)


def test_an_exported_variant_is_the_module_at_every_length(traced_variant):
    module = traced_variant.build().eval()
    program = export(module, traced_variant.inputs(5))
    for T in LENGTHS:
        inputs = traced_variant.inputs(T)
        torch.testing.assert_close(program.module()(**inputs), module(**inputs))


@pytest.mark.parametrize("variant", ["rope"], indirect=True)
def test_an_exported_program_is_saved_and_trains(variant, tmp_path):
    module = variant.build(backend="sdpa")  # as an exported program does
    program = export(module, variant.inputs(5))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded, inputs = torch.export.load(tmp_path / "program.pt2").module(), variant.inputs(17)
    want = torch.autograd.grad(module(**inputs).square().sum(), module.W_query.weight)
    got = torch.autograd.grad(loaded(**inputs).square().sum(), loaded.W_query.weight)
    torch.testing.assert_close(got, want)
