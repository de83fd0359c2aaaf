"""ONNX export with any number of tokens: onnxruntime gives the module's numbers."""

from __future__ import annotations

import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

QUICK = ["rope"]
SLOW = [
    "head",
    "stacked",
    "grouped",
    "memory",
    "lengths",
    "window",
    "yarn",
    "dynamic",
    "longrope",
    "everything",
]


@pytest.mark.parametrize(
    "variant", QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW], indirect=True
)
def test_onnxruntime_gives_the_numbers_of_the_module(variant):
    module, inputs = variant.build().eval(), variant.inputs(5)
    sizes = {name: {} for name in inputs} | {"x": {1: "T"}}
    if "memory" in inputs:
        sizes["memory"] = {1: "S"}
    program = torch.onnx.export(
        module, (), kwargs=inputs, dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for T in (1, 2, 17, 61):
        inputs = variant.inputs(T)
        (got,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        want = module(**inputs).detach()
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
