"""Stacked heads: the lecture's MultiHeadAttentionWrapper."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ShapeError


def test_the_lecture_s_numbers(lecture, lecture_input):
    torch.manual_seed(123)
    ours = ph.MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)
    torch.manual_seed(123)
    theirs = lecture.MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)
    expected = torch.tensor(
        [
            [-0.451920, 0.221605, 0.477196, 0.106348],
            [-0.587435, 0.005776, 0.589073, 0.325660],
            [-0.630023, -0.063183, 0.620196, 0.385963],
            [-0.567457, -0.084253, 0.547769, 0.358925],
            [-0.552562, -0.098068, 0.532089, 0.342797],
            [-0.529901, -0.108068, 0.507653, 0.349348],
        ]
    ).expand(2, 6, 4)
    torch.testing.assert_close(ours(lecture_input), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs(lecture_input), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [0, -2, 1.5])
def test_num_heads_must_count(heads):
    with pytest.raises(ShapeError, match=f"num_heads must be .* at least 1; got {heads}"):
        ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, heads)


def test_out_features_without_out_proj_is_refused():
    with pytest.raises(ShapeError, match=r"out_features must be num_heads \* d_out = 21 .*got 4"):
        ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, out_features=4)
    assert ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, out_features=21).out_proj is None
    projected = ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, out_proj=True, out_features=4)
    assert projected(torch.zeros(2, 3, 5)).shape == (2, 3, 4)
    with pytest.raises(ShapeError, match=r"out_features .*got 0"):
        ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, out_proj=True, out_features=0)


def test_out_proj_is_applied_to_the_concatenation():
    wrapper = ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, out_proj=True, out_bias=False)
    x = torch.randn(2, 6, 5)
    side_by_side = torch.cat([head(x) for head in wrapper.heads], dim=-1)
    assert wrapper.out_proj.bias is None
    torch.testing.assert_close(wrapper(x), side_by_side @ wrapper.out_proj.weight.T)


@pytest.mark.parametrize("options", [{}, {"out_proj": True}, {"out_proj": True, "out_bias": False}])
def test_contributions_sum_to_the_output(options):
    wrapper = ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, **options).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    contributions = wrapper.head_contributions(x)
    assert contributions.shape == (2, 3, 6, 21)
    assert wrapper.head_contexts(x).shape == (2, 3, 6, 7)
    total = contributions.sum(dim=1)
    if wrapper.out_proj is not None and wrapper.out_proj.bias is not None:
        total = total + wrapper.out_proj.bias
    torch.testing.assert_close(total, wrapper(x), rtol=0, atol=1e-12)


def test_projections_are_each_head_s_in_order():
    wrapper = ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, qkv_bias=True)
    x, memory = torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    projected = wrapper.project_qkv(x, memory)
    assert [tuple(t.shape) for t in projected] == [(2, 3, 6, 7), (2, 3, 4, 7), (2, 3, 4, 7)]
    for index, head in enumerate(wrapper.heads):
        own = head.project_qkv(x, memory)
        assert all(torch.equal(t[:, [index]], o) for t, o in zip(projected, own, strict=True))


def test_heads_work_independently():
    wrapper = ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3, out_proj=True)
    x = torch.randn(2, 6, 5)
    before = wrapper.head_contributions(x)
    torch.nn.init.zeros_(wrapper.heads[1].W_value.weight)
    after = wrapper.head_contributions(x)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not after[:, 1].any()
    assert before[:, 1].any()


def test_aux_is_each_head_s_in_order():
    wrapper, x = ph.MultiHeadAttentionWrapper(5, 7, 11, 0.0, 3), torch.randn(2, 6, 5)
    request = ph.AuxRequest(weights=True, lse=True, stats=True)
    _, aux = wrapper(x, return_aux=request)
    for h, head in enumerate(wrapper.heads):
        _, alone = head(x, return_aux=request)
        assert torch.equal(aux.weights[:, h : h + 1], alone.weights)
        assert torch.equal(aux.lse[:, h : h + 1], alone.lse)
        assert torch.equal(aux.stats.entropy[:, h : h + 1], alone.stats.entropy)
        assert torch.equal(aux.stats.max_logit[:, h : h + 1], alone.stats.max_logit)
    _, nothing = wrapper(x, return_aux=ph.AuxRequest())
    assert (nothing.weights, nothing.lse, nothing.stats) == (None, None, None)
