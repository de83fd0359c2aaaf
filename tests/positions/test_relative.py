"""T5's relative position bias against transformers and the float64 oracle."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ArgumentError, ShapeError
from polyhead.positions import RelativeBias


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 4)])
def test_buckets_match_transformers(bidirectional, num_buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    offsets = torch.arange(-300, 301)
    want = t5.T5Attention._relative_position_bucket(
        offsets, bidirectional, num_buckets, max_distance
    )
    bias = RelativeBias(
        3, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    assert torch.equal(bias.buckets(offsets), want)


def test_relative_bias_is_added_to_the_scores_per_head(naive_attention):
    torch.manual_seed(0)
    bias = RelativeBias(6, num_buckets=8, max_distance=20, bidirectional=True).double()
    torch.nn.init.normal_(bias.weight)
    mha = ph.MultiHeadAttention(
        5, 24, 40, 0.0, 6, num_kv_heads=2, position_bias=bias, mask=None, dtype=torch.float64
    )
    x, memory = torch.randn(2, 3, 5).double(), torch.randn(2, 17, 5).double()
    expected_bias = torch.zeros(6, 3, 17, dtype=torch.float64)
    for t in range(3):
        for s in range(17):
            bucket = bias.buckets(torch.tensor(s - (17 - 3 + t)))
            expected_bias[:, t, s] = bias.weight[bucket].detach()
    query, key, value = mha.project_qkv(x, memory)
    want = naive_attention(query, key, value, bias=expected_bias)
    torch.testing.assert_close(mha.head_contexts(x, memory), want, rtol=1e-12, atol=1e-12)
    mha(x, memory).sum().backward()
    assert bias.weight.grad.any()


def test_relative_bias_shared_by_two_layers_and_a_cache():
    table = RelativeBias(2, num_buckets=8, max_distance=20, bidirectional=False)
    torch.nn.init.normal_(table.weight)
    layers = [ph.MultiHeadAttention(5, 6, 40, 0.0, 2, position_bias=table).eval() for _ in "ab"]
    assert layers[0].position_bias is layers[1].position_bias
    x = torch.randn(2, 17, 5)
    with torch.no_grad():
        cache = layers[0].make_cache(2)
        parts = [layers[0](x[:, a:b], cache=cache) for a, b in ((0, 11), (11, 12), (12, 17))]
        torch.testing.assert_close(torch.cat(parts, dim=1), layers[0](x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 0}, ShapeError, "num_heads .*at least 1; got 0"),
        ({"num_buckets": 3}, ShapeError, "num_buckets .*at least 4; got 3"),
        ({"num_buckets": 8, "max_distance": 7}, ArgumentError, "max_distance .*least 8; got 7"),
    ],
)
def test_relative_bias_bad_size_raises(options, error, message):
    with pytest.raises(error, match=message):
        RelativeBias(**{"num_heads": 2, "bidirectional": True, **options})
