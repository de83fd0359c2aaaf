"""The ONNX project's own RotaryEmbedding cases, through `rotate`.

One operator a process: onnx's generators accumulate, so these are collected in a child process.
"""

import pickle
import subprocess
import sys

import pytest
import torch

from polyhead.positions import rotate

_COLLECT = """
import pickle, sys, warnings
warnings.simplefilter("ignore")
from onnx import helper
from onnx.backend.test.case.node import collect_testcases
cases = []
for case in collect_testcases("RotaryEmbedding"):
    if case.name.endswith("_expanded"):
        continue
    node = case.model.graph.node[0]
    arrays, expected = case.data_sets[0]
    names = [name for name in node.input if name]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    cases.append((case.name, dict(zip(names, arrays)), attributes, expected[0]))
pickle.dump(cases, sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def cases():
    run = subprocess.run([sys.executable, "-c", _COLLECT], capture_output=True, check=True)
    return pickle.loads(run.stdout)


def test_every_rotary_case(cases):
    assert len(cases) == 8
    for name, arrays, attributes, expected in cases:
        inputs = {key: torch.from_numpy(array) for key, array in arrays.items()}
        x = inputs["input"]
        if x.ndim == 3:
            x = x.unflatten(2, (attributes["num_heads"], -1)).transpose(1, 2)
        cos, sin = inputs["cos_cache"], inputs["sin_cache"]
        if "position_ids" in inputs:
            cos, sin = cos[inputs["position_ids"]], sin[inputs["position_ids"]]
        # With rotary_embedding_dim the caches are as wide as what turns, half of it.
        turned = rotate(
            x, cos[:, None], sin[:, None], interleaved=bool(attributes.get("interleaved", 0))
        )
        if inputs["input"].ndim == 3:
            turned = turned.transpose(1, 2).flatten(2)
        torch.testing.assert_close(
            turned, torch.from_numpy(expected), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
        )
