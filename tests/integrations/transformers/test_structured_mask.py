"""Structured masks: bool tensors to models, polyhead masks to the attention."""

import copy

import pytest
import torch

import polyhead as ph
from polyhead.integrations.transformers.structured_mask import StructuredMask

B, T, S = 2, 3, 5


@pytest.fixture
def mask():
    rule = ph.mask.causal() & ph.mask.lengths([5, 2])
    return StructuredMask(rule, batch=B, T=T, S=S, device="cpu")


@pytest.fixture
def booleans(mask):
    return mask.rule.materialize(T, S)


def test_structured_mask_has_the_tensors_attributes(mask, booleans):
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == booleans.shape == (B, 1, T, S)
    assert (mask.dtype, mask.device, mask.ndim) == (torch.bool, booleans.device, 4)
    assert len(mask) == B


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mask[:, :, -1:, :2],
        lambda mask: mask & mask.flip(-1),
        lambda mask: torch.where(mask, 0.0, -1.0),
        lambda mask: mask.to(torch.float32) + 1,
        lambda mask: mask.expand(B, 7, T, S),
        lambda mask: torch.cat([mask, mask], dim=-1),
        lambda mask: mask.index_select(0, torch.tensor([1, 0])),
    ],
)
def test_structured_mask_operations_materialize(mask, booleans, use):
    used = use(mask)
    assert type(used) is torch.Tensor
    assert torch.equal(used, use(booleans))


def test_structured_mask_without_rule_allows_all():
    mask = StructuredMask(None, batch=B, T=T, S=S, device="cpu")
    assert mask.all()


@pytest.mark.parametrize("hand_on", [torch.Tensor.detach, torch.clone, copy.deepcopy])
def test_structured_mask_detach_and_clone_keep_the_rule(mask, booleans, hand_on):
    other = hand_on(mask)
    assert isinstance(other, StructuredMask)
    assert other.rule == mask.rule
    assert torch.equal(other, booleans)
