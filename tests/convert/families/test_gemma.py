"""Gemma's norm."""

import pytest
import torch

from polyhead.convert.families.gemma import OffsetRMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offset_rms_norm_equals_transformers(dtype):
    modeling = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    theirs, ours = modeling.Gemma3RMSNorm(24, eps=0.25), OffsetRMSNorm(24, eps=0.25)
    assert torch.equal(ours.weight, theirs.weight)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), torch.randn(2, 3, 24).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=4 * eps, atol=4 * eps)
