"""Falcon's number of KV heads, from three options of its config, and its ALiBi."""

import pytest
import torch

from polyhead.convert.families.falcon import LAYOUT, FalconAlibi
from polyhead.convert.layout import Sizes


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 1),
        ({"multi_query": True, "num_kv_heads": 6}, 1),
        ({"multi_query": False, "num_kv_heads": 2}, 6),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"new_decoder_architecture": True, "num_kv_heads": None, "multi_query": True}, 6),
    ],
)
def test_num_kv_heads_is_read_from_config(options, groups):
    assert LAYOUT.sizes({"num_attention_heads": 6, **options}) == Sizes(6, groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_falcon_alibi_in_every_dtype(dtype):
    modeling = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    theirs = modeling.build_alibi_tensor(torch.ones(1, 300, dtype=torch.long), 6, torch.float64)
    ours = FalconAlibi(6, 16).to(dtype)
    assert not ours.state_dict()
    bias = ours(17, 300)
    assert bias.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(bias[0].double(), theirs / 4, rtol=1e-7, atol=0)
